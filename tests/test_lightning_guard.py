"""The guard in fits: automatic and manual, both engines of BackpropModule, a scaler, accumulation, checkpoints."""

import inspect
import math

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

import torch_bp
from torch_bp import nn, optim
from torch_bp.lightning import BackpropModule, DivergenceGuard
from torch_bp.optim import lr_scheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
KEPT = {"every": 2, "trust": 1, "keep": 3}


def loader(bad=(), count=16, size=8):
    """Batches in order; those in `bad` have a NaN."""
    x, y = X.repeat(count * size // 64 + 1, 1)[: count * size].clone(), Y.repeat(count * size // 64 + 1)[: count * size]
    for number in bad:
        x[number * size] = math.nan
    return DataLoader(TensorDataset(x, y), size)


def only(numbers):
    batches = list(loader())
    return DataLoader([batches[number] for number in numbers], batch_size=None)


def trainer(*callbacks, **options):
    options = {"max_epochs": 1, "enable_checkpointing": False, "logger": False} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(callbacks=list(callbacks), **quiet, **options)


def module(engine="autograd", made=optim.Adam, schedule=True):
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    exponential = (lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9)) if schedule else None
    return BackpropModule(network, nn.CrossEntropyLoss(), lambda p: made(p, lr=0.01), exponential, engine)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("engine", ["autograd", "step"])
@pytest.mark.parametrize("made", [optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_fit_goes_back_and_on(engine, made):
    """After the bad batch it is where it was, and does what a fit without that batch does from there."""
    model, guard = module(engine, made), DivergenceGuard(factor=1.0, **KEPT)
    trainer(guard).fit(model, loader(bad=[5]))
    assert [(e.reason, e.action, e.step, e.back_to) for e in guard.events] == [("loss", "rollback", 6, 4)]
    other = module(engine, made)
    trainer().fit(other, only(number for number in range(16) if number not in (4, 5)))
    assert equal(weights(model), weights(other))


def test_the_cut_stays_in_the_schedule():
    model, guard = module(), DivergenceGuard(factor=0.5, **KEPT)
    fit = trainer(guard)
    fit.fit(model, loader(bad=[5]))
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 0.01 * 0.9**14)
    assert fit.lr_scheduler_configs[0].scheduler.base_lrs == [0.005]


def test_cooldown():
    model, guard = module(schedule=False), DivergenceGuard(factor=0.5, cooldown=8, **KEPT)
    fit = trainer(guard)
    fit.fit(model, loader(bad=[11]))
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.01
    assert guard.guard._recovery.factor == pytest.approx(0.5 + 0.5 * 4 / 8)


def test_accumulation():
    """Windows of four: the bad one is the third; its gradients go nowhere."""
    model, guard = module(), DivergenceGuard(factor=1.0, **KEPT)
    trainer(guard, accumulate_grad_batches=4).fit(model, loader(bad=[9]))
    assert [(e.step, e.back_to) for e in guard.events] == [(3, 0)]
    assert guard.guard.steps == 4
    other = module()
    # the first snapshot is of before the first update, and the schedule goes on from there
    trainer(accumulate_grad_batches=4).fit(other, only(range(12, 16)))
    assert equal(weights(model), weights(other))


class ByHand(LightningModule):
    """Two networks, an optimizer for each."""

    def __init__(self, bad=(), factor=100.0):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(3)
        self.networks = torch.nn.ModuleList(nn.MLP([6, 8, 3]) for _ in range(2))
        self.bad, self.factor, self.updates = bad, factor, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        for number, (network, optimizer) in enumerate(zip(self.networks, self.optimizers())):
            before = weights(network)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            self.manual_backward(loss * (math.inf if (batch_idx, number) in self.bad else 1.0))
            optimizer.step()
            self.updates.append(not equal(before, weights(network)))

    def configure_optimizers(self):
        return [optim.Adam(network.parameters(), lr=0.01) for network in self.networks]


@pytest.mark.parametrize("which", [0, 1])
def test_manual_optimization_of_two_networks(which):
    model, guard = ByHand(bad=[(7, which)]), DivergenceGuard(factor=0.5, **KEPT)
    fit = trainer(guard)
    fit.fit(model, loader())
    assert [(e.reason, e.step, e.back_to, e.optimizer) for e in guard.events] == [("loss", 8, 6, which)]
    left_out = [number for number, made in enumerate(model.updates) if not made]
    assert left_out == ([14, 15] if which == 0 else [15])
    assert [each.param_groups[0]["lr"] for each in fit.optimizers] == [0.005, 0.005]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_lbfgs():
    model = module(made=lambda p, lr: torch.optim.LBFGS(p, lr=0.1, max_iter=3), schedule=False)
    guard = DivergenceGuard(factor=0.5, **KEPT)
    trainer(guard).fit(model, loader(bad=[5]))
    assert [(e.reason, e.step, e.back_to) for e in guard.events] == [("loss", 6, 4)]
    assert guard.guard.steps == 16
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_scaler():
    """The guard sees losses as they are, and leaves overflow to the scaler."""
    model, guard = module(), DivergenceGuard(factor=0.5, **KEPT)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []
    guard.on_train_batch_start = lambda *_: seen.append(
        guard.guard and list(guard.guard._judge._tests[None]._losses)[-1:]
    )
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer(guard, plugins=[precision]).fit(model, loader(bad=[5]))
    assert [(e.reason, e.back_to) for e in guard.events] == [("loss", 4)]
    assert all(0 < loss < 10 for losses in seen[1:] for loss in losses)
    assert scaler.get_scale() == 2.0**10
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_retries_end_the_fit_with_sound_weights():
    model, guard = module(), DivergenceGuard(retries=1, **KEPT)
    with pytest.raises(torch_bp.DivergenceError, match="within 1 retries"):
        trainer(guard).fit(model, loader(bad=[5, 6, 7]))
    assert [e.action for e in guard.events] == ["rollback", "stop"]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_events_are_logged(tmp_path):
    model, guard = module(), DivergenceGuard(**KEPT)
    trainer(guard, logger=CSVLogger(tmp_path, name="", version="")).fit(model, loader(bad=[5, 12]))
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    found = [dict(zip(columns, row.split(","))) for row in rows[1:]]
    found = [(row["step"], row["guard/rollback"], row["guard/factor"]) for row in found if row["guard/rollback"]]
    assert found == [("6", "1.0", "0.5"), ("13", "2.0", "0.25")]


def test_checkpoints_carry_it(tmp_path):
    """A fit in two parts has the history and the cut of one in one."""
    ends = []
    for parts in (1, 2):
        guard, model, path = DivergenceGuard(factor=0.5, **KEPT), module(), None
        for part in range(1, parts + 1):
            guard, model = DivergenceGuard(factor=0.5, **KEPT), module()
            fit = trainer(guard, max_epochs=2 if part == parts else 1)
            fit.fit(model, loader(bad=[5]), ckpt_path=path)
            path = tmp_path / f"{parts}.ckpt"
            fit.save_checkpoint(path)
        lr = fit.optimizers[0].param_groups[0]["lr"]
        ends.append([[(e.step, e.reason, e.factor) for e in guard.events], guard.guard.steps, lr])
    assert ends[0] == ends[1]
    assert [e[0] for e in ends[0][0]] == [6, 22]


def test_arguments_are_those_of_the_plain_guard():
    plain = inspect.signature(torch_bp.DivergenceGuard).parameters
    taken = {name: each.default for name, each in plain.items() if name not in ("model", "optimizer", "scheduler")}
    del taken["scaler"]  # of the Trainer, as these
    ours = {name: each.default for name, each in inspect.signature(DivergenceGuard).parameters.items()}
    assert ours == taken


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"factor must be in \(0, 1\], got 2"):
        DivergenceGuard(factor=2)
    with pytest.raises(TypeError, match="data must have state_dict"):
        trainer(DivergenceGuard(data=[3])).fit(module(), loader())


def test_sound_fits_are_left_alone():
    model, guard = module(), DivergenceGuard()
    other = module()
    trainer(guard, max_epochs=20).fit(model, loader())
    trainer(max_epochs=20).fit(other, loader())
    assert guard.events == []
    assert equal(weights(model), weights(other))
    assert guard.guard.steps == 320
