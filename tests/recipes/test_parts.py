"""The parts of the recipes: data, schedules, norms, and the errors of the command line."""

import importlib.util
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch

from recipes.callbacks import Norms
from recipes.data import Table
from recipes.module import MLP
from torch_bp import nn, optim

Cli = Callable[..., None]
Capture = pytest.CaptureFixture[str]

# Lightning calls what jsonargparse has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.mark.parametrize("name", ["digits", "diabetes", "breast_cancer"])
def test_split(name: str) -> None:
    dataset = getattr(sklearn.datasets, f"load_{name}")
    torch.manual_seed(1)
    data, again = Table(dataset), Table(dataset)
    y = dataset(return_X_y=True)[1]

    for part, rows in data.rows.items():
        assert np.array_equal(rows, again.rows[part])
        assert len(rows) == pytest.approx({"train": 0.7, "val": 0.15, "test": 0.15}[part] * len(y), abs=1)
        if data.rescale is None:
            shares = np.bincount(y[rows]) / len(rows) - np.bincount(y) / len(y)
            assert np.abs(shares).max() <= 1 / len(rows)
    assert sorted(np.concatenate(list(data.rows.values()))) == list(range(len(y)))
    assert not np.array_equal(data.rows["test"], Table(dataset, split_seed=1).rows["test"])


def test_split_of_the_digits_is_this_one() -> None:
    """A change of it, by us or by scikit-learn, changes every published result."""
    assert Table(sklearn.datasets.load_digits).rows["test"][:5].tolist() == [900, 95, 1566, 1614, 1273]


def test_scaling_by_the_train_part_alone() -> None:
    x, y = sklearn.datasets.load_diabetes(return_X_y=True)
    data = Table(sklearn.datasets.load_diabetes)
    train = x[data.rows["train"]]
    for part, rows in data.rows.items():
        inputs, targets = data.parts[part].tensors
        np.testing.assert_allclose(inputs, (x[rows] - train.mean(0)) / train.std(0), atol=1e-5)
        np.testing.assert_allclose(targets[:, 0], y[rows])
    assert data.rescale == (y[data.rows["train"]].mean(), y[data.rows["train"]].std())

    pixels, _ = Table(sklearn.datasets.load_digits, per_feature=False).parts["train"].tensors
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((0, 1), abs=1e-4)


def test_several_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"y of shape \(rows,\), got \(20, 3\) and \(20, 3\)"):
        Table(sklearn.datasets.load_linnerud)


def test_order_depends_on_seed_and_epoch() -> None:
    data = Table(sklearn.datasets.load_digits)

    def order(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(seed)
        sampler: Any = data.train_dataloader().sampler
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == list(range(len(data.rows["train"])))
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


def test_norms() -> None:
    torch.manual_seed(0)
    model = MLP(4, 2, optimizer=optim.SGD, loss=nn.CrossEntropyLoss, hidden=[3])
    model.loss(model(torch.randn(5, 4)), torch.randint(2, (5,))).backward()
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    logged: dict[int, dict[str, float]] = {}
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.setdefault(step, metrics))
    for step in range(9):
        trainer: Any = SimpleNamespace(loggers=[logger], log_every_n_steps=4, global_step=step)
        Norms().on_before_optimizer_step(trainer, model, optimizer)

    assert list(logged) == [3, 7]
    first, output = model.model.linear1, model.model.output
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert logged[3] == pytest.approx(
        {
            "weight/linear1": first.weight.norm().item(),
            "weight/output": output.weight.norm().item(),
            "grad/linear1": first.weight.grad.norm().item(),
            "grad/output": output.weight.grad.norm().item(),
            "grad/total": grads.norm().item(),
            "lr/group0": 0.5,
        }
    )


SCHEDULERS = "torch_bp.optim.lr_scheduler."


@pytest.mark.parametrize(
    ("flags", "total", "last_epoch"),
    [
        (["OneCycleLR", "--model.lr_scheduler.max_lr=0.1"], 20, 20),
        (["OneCycleLR", "--model.lr_scheduler.max_lr=0.1", "--model.lr_scheduler.total_steps=30"], 30, 20),
        (["StepLR", "--model.lr_scheduler.step_size=1", "--model.interval=epoch"], None, 2),
        (["CosineAnnealingLR", "--model.lr_scheduler.T_max=20"], None, 20),
    ],
)
def test_schedules(cli: Cli, flags: list[str], total: int | None, last_epoch: int) -> None:
    short = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=10"]
    cli("fit", "digits", *short, f"--model.lr_scheduler={SCHEDULERS}{flags[0]}", *flags[1:])
    (state,) = torch.load("logs/digits/version_0/checkpoints/last.ckpt", weights_only=True)["lr_schedulers"]
    assert state.get("total_steps") == total
    assert state["last_epoch"] == last_epoch


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.max_epochs=-1"], "total_steps must be positive and finite, got inf"),
        (["--model.lr_scheduler.total_steps=10"], "OneCycleLR: total_steps must be at least 1200, .* got 10"),
    ],
)
def test_schedules_that_cannot_be(cli: Cli, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cli("fit", "digits", *flags)


@pytest.mark.parametrize(
    ("command", "flags", "messages"),
    [
        ("fit", ["--trainer.max_epochz=3"], ["unrecognized arguments: --trainer.max_epochz=3"]),
        ("fit", ["--model.hidden=[64,0]"], ['"hidden"', "v>0"]),
        ("fit", ["--model.optimizer=torch_bp.optim.Adamm"], ["'torch_bp.optim' has no attribute 'Adamm'"]),
        ("fit", ["--config=nowhere.yaml"], ["File does not exist", "nowhere.yaml"]),
        ("fit", ["--trainer.logger.save_dir=file"], ["file/digits/version_0 must be writable", "save_dir FOLDER"]),
        ("fit", ["--ckpt_path=last"], ["--ckpt_path last", "logs/digits", "Run `fit` first"]),
        ("test", [], ["--ckpt_path last", "logs/digits", "Run `fit` first"]),
    ],
)
def test_usage_errors(
    cli: Cli, command: str, flags: list[str], messages: list[str], capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        cli(command, "digits", *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages), error


def test_threads(cli: Cli) -> None:
    before = torch.get_num_threads()
    cli("fit", "digits", f"--threads={before + 1}", "--trainer.fast_dev_run=true")
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_print_config(cli: Cli, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("fit", "digits", "--print_config")
    assert stop.value.code == 0
    assert "class_path: recipes.module.MLP" in capsys.readouterr().out


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lightning" else find_spec(name))
    with pytest.raises(SystemExit, match=r'recipes: lightning not installed.*pip install "torch_bp\[recipes\]"'):
        runpy.run_module("recipes", run_name="__main__")
