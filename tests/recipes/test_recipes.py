"""The recipes end to end: what a run leaves behind, and that it is repeated, resumed and evaluated as it should."""

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from recipes.module import MLP

Cli = Callable[..., None]
Capture = pytest.CaptureFixture[str]
DIGITS = Path("logs/digits")

pytestmark = [
    # Lightning calls what jsonargparse has renamed.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    # A resumed run searches for its best checkpoint anew, in its own folder: Lightning says so, and rightly.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


def load(run: Path, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def scalars(run: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def assert_same_weights(a: Path, b: Path) -> None:
    a_state, b_state = load(a)["state_dict"], load(b)["state_dict"]
    assert a_state.keys() == b_state.keys()
    for key in a_state:
        assert torch.equal(a_state[key], b_state[key]), key


@pytest.mark.parametrize(
    ("recipe", "metric", "least"),
    [("digits", "accuracy/test", 0.97), ("diabetes", "r2/test", 0.30), ("breast_cancer", "accuracy/test", 0.92)],
)
def test_result(cli: Cli, recipe: str, metric: str, least: float) -> None:
    cli("fit", recipe)
    (value,) = scalars(Path(f"logs/{recipe}/version_0"))[metric].values()
    assert value >= least


def test_run_folder(cli: Cli, capsys: Capture) -> None:
    cli("fit", "digits", "--trainer.max_epochs", "3")
    run = DIGITS / "version_0"

    out = capsys.readouterr().out
    assert all(text in out for text in ("accuracy/test", "time of the fit", str(run), "last.ckpt"))
    assert out.endswith("\ntensorboard --logdir logs\n")
    files = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    assert files == {"checkpoints", "config.yaml", "hparams.yaml", "metrics.csv"}
    assert {path.name for path in run.glob("checkpoints/*")} == {"best.ckpt", "last.ckpt"}
    assert load(run)["global_step"] == 120
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 3

    layers = ("linear1", "linear2", "output")
    per_step = {f"{kind}/{layer}" for kind in ("weight", "grad") for layer in layers}
    per_step |= {"grad/total", "lr/group0"}
    per_epoch = {f"{metric}/{stage}" for metric in ("loss", "accuracy") for stage in ("train", "val")}

    found = scalars(run)
    assert found.keys() == {*per_step, *per_epoch, "loss/test", "accuracy/test", "epoch"}
    assert all(math.isfinite(value) for points in found.values() for value in points.values())
    assert {tuple(found[tag]) for tag in per_step} == {tuple(range(9, 120, 10))}
    assert {tuple(found[tag]) for tag in per_epoch} == {(39, 79, 119)}
    assert list(found["accuracy/test"]) == [120]

    events = EventAccumulator(str(run)).Reload()
    content = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["optimizer/class_path"].string_value.endswith("Adam")
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"loss/test", "accuracy/test"}


def test_last_is_last_and_best_is_best(cli: Cli) -> None:
    """Weights that do not move are best at once: the later epochs are no better."""
    still = ("--model.lr_scheduler", "null", "--model.optimizer.lr", "0")
    cli("fit", "digits", *still, "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "10")
    run = DIGITS / "version_0"
    assert (load(run, "best")["global_step"], load(run, "last")["global_step"]) == (10, 20)


def test_same_seed_same_run(cli: Cli) -> None:
    cli("fit", "digits", "--trainer.max_epochs", "1")
    cli("fit", str(DIGITS / "version_0/config.yaml"))
    cli("fit", "digits", "--trainer.max_epochs", "1", "--seed_everything", "1")
    assert_same_weights(DIGITS / "version_0", DIGITS / "version_1")
    metrics = [(DIGITS / f"version_{i}/metrics.csv").read_text() for i in range(3)]
    assert metrics[0] == metrics[1] != metrics[2]


@pytest.mark.parametrize("recipe", ["digits", "diabetes", "breast_cancer"])
def test_engines_agree(cli: Cli, recipe: str) -> None:
    """The whole run, with its dropout, to the last bit of what it logs."""
    for engine in ("autograd", "step"):
        cli("fit", recipe, "--trainer.max_epochs", "2", "--model.engine", engine)
    runs = [Path(f"logs/{recipe}/version_{i}") for i in range(2)]
    assert_same_weights(*runs)
    first, second = map(scalars, runs)
    assert first == second
    assert len(first) > 5


def test_resume(cli: Cli, tmp_path: Path) -> None:
    """Without dropout, which draws from the global generator, a resumed run ends in the same weights."""
    keep = {"class_path": "ModelCheckpoint", "init_args": {"filename": "{epoch}", "save_top_k": -1}}
    (tmp_path / "keep.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [keep], "max_epochs": 3}}))
    flags = ("--config", "keep.yaml", "--model.dropout", "0")
    cli("fit", "digits", *flags)
    whole, resumed = DIGITS / "version_0", DIGITS / "version_1"
    cli("fit", "digits", *flags, "--ckpt_path", str(whole / "checkpoints/epoch=0.ckpt"))

    assert_same_weights(whole, resumed)
    assert load(resumed)["lr_schedulers"] == load(whole)["lr_schedulers"]
    rates = scalars(resumed)["lr/group0"]
    assert list(rates) == list(range(49, 120, 10))
    assert rates == {step: rate for step, rate in scalars(whole)["lr/group0"].items() if step >= 40}


def test_resume_past_the_end_of_the_schedule(cli: Cli) -> None:
    cli("fit", "digits", "--trainer.max_epochs", "1", "--model.hidden", "[8]")
    refused = pytest.raises(ValueError, match=r"OneCycleLR: total_steps must be at least 80, .*, got 40\. Shorten")
    with refused, pytest.warns(UserWarning, match=r"run of 40 steps \(total_steps\), .* constructed for 80"):
        cli("fit", "digits", "--trainer.max_epochs", "2", "--ckpt_path", "last")


def test_a_range_test_keeps_and_reports_nothing(cli: Cli, capsys: Capture) -> None:
    flags = ("--trainer.max_epochs=-1", "--trainer.max_steps=30", "--trainer.callbacks.steps=30")
    cli("fit", "digits", "--trainer.callbacks=torch_bp.lightning.LRFinder", *flags)
    assert not list(Path("logs").rglob("*.ckpt"))
    assert "accuracy" not in capsys.readouterr().out


def test_evaluation(cli: Cli, capsys: Capture) -> None:
    cli("fit", "digits", "--trainer.max_epochs", "1", "--model.hidden", "[32]")
    run = DIGITS / "version_0"
    (accuracy,) = scalars(run)["accuracy/test"].values()
    files = set(run.rglob("*"))
    capsys.readouterr()

    cli("test", "digits")  # the latest run's last checkpoint, which also knows the width of its network
    assert f"{accuracy:.4f}" in capsys.readouterr().out
    cli("validate", "digits", "--ckpt_path", "best")
    assert "best.ckpt" in capsys.readouterr().out
    cli("predict", "digits", "--ckpt_path", str(run / "checkpoints/last.ckpt"))
    assert "predictions.csv" in capsys.readouterr().out
    assert set(run.rglob("*")) - files == {run / "predictions.csv"}
    assert [path.name for path in DIGITS.iterdir()] == ["version_0"]

    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 270
    assert sum(row["target"] == row["prediction"] for row in rows) / 270 == pytest.approx(accuracy, abs=1e-6)
    assert all(0 < float(row["probability"]) <= 1 for row in rows)

    newer = DIGITS / "version_1"
    shutil.copytree(run, newer)
    (newer / "checkpoints/last.ckpt").touch()
    cli("test", "digits")
    assert str(newer) in capsys.readouterr().out
    assert MLP.load_from_checkpoint(run / "checkpoints/best.ckpt").model.output.in_features == 32


def test_predictions_of_a_regression(cli: Cli) -> None:
    """They are in the target's own unit."""
    cli("fit", "diabetes", "--trainer.max_epochs", "2")
    run = Path("logs/diabetes/version_0")
    cli("predict", "diabetes")
    with (run / "predictions.csv").open() as file:
        target, prediction = torch.tensor(
            [[float(row["target"]), float(row["prediction"])] for row in csv.DictReader(file)]
        ).T
    (rmse,) = scalars(run)["rmse/test"].values()
    assert (prediction - target).square().mean().sqrt().item() == pytest.approx(rmse, rel=1e-5)
    assert target.min() >= 25  # the least of the table


@pytest.mark.parametrize("recipe", ["digits", "diabetes", "breast_cancer"])
def test_fast_dev_run_leaves_nothing(cli: Cli, recipe: str, tmp_path: Path) -> None:
    for command in ("fit", "predict"):
        cli(command, recipe, "--trainer.fast_dev_run", "true")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_if_so_asked(cli: Cli, tmp_path: Path) -> None:
    cli("fit", "digits", "--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.max_steps=2")
    assert list(tmp_path.iterdir()) == []


def test_trainer_flags(cli: Cli) -> None:
    flags = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1e-3, "precision": "bf16-mixed"}
    cli("fit", "digits", *(f"--trainer.{name}={value}" for name, value in flags.items()))
    assert load(DIGITS / "version_0")["lr_schedulers"][0]["total_steps"] == 40
    assert min(scalars(DIGITS / "version_0")["grad/total"].values()) > 1e-3  # read before it is clipped
