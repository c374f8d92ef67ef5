"""`BackpropModule` in fits on a part of the digits: both engines, and all that Lightning does around a step."""

import copy
import math
from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from recipes.data import Table
from torch_bp import nn, optim
from torch_bp.lightning import BackpropModule, LRFinder
from torch_bp.lightning.lr_finder import _instantiated
from torch_bp.optim import lr_scheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
DIGITS = Table(load_digits, per_feature=False)
BATCHES = 7  # of an epoch, the last one with 8 rows
ENGINES = ("autograd", "step")


class Record(Callback):
    """What a fit looks like from outside."""

    def __init__(self):
        self.seen = {"loss": [], "norm": [], "lr": [], "global_step": []}

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        assert pl_module.engine == "autograd" or all(p.grad is None for p in pl_module.parameters())

    def on_before_backward(self, trainer, pl_module, loss):
        assert loss.requires_grad

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.seen["norm"].append(nn.utils.get_total_norm(gradients).item())
        self.seen["lr"].append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen["loss"].append(outputs["loss"].item())
        self.seen["global_step"].append(trainer.global_step)


class Network(nn.Sequential):
    """Knows how often its Python has run while it was trained."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.calls = deque()  # which no step takes for a part of the model

    def forward(self, *x):
        self.calls += [len(x[0])] if self.training else []
        return super().forward(sum(x))


def make(engine, kind=BackpropModule, dropout=0.3, **options):
    torch.manual_seed(0)
    hidden = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout)
    given = {
        "model": Network(*hidden, nn.Linear(16, 10)),
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(optim.Adam, lr=1e-2),
        "metrics": {"accuracy": partial(MulticlassAccuracy, num_classes=10, average="micro", validate_args=False)},
        "prediction": nn.Softmax(dim=-1),
    }
    return kind(engine=engine, **given | options)


def loader(part, rows=200, batch_size=32):
    return DataLoader(TensorDataset(*DIGITS.parts[part][:rows]), batch_size)


def trainer(*callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    options = {"max_epochs": 2, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return Trainer(callbacks=list(callbacks), **quiet, **options)


def fit(engine, *callbacks, of=None, train=None, ckpt_path=None, **options):
    """Fit a module from the same start, and return it, its trainer, and what was seen."""
    module, record = make(engine, **of or {}), Record()
    lightning = trainer(record, *callbacks, **options)
    torch.manual_seed(1)
    lightning.fit(module, train or loader("train"), loader("val"), ckpt_path=ckpt_path, weights_only=False)
    return SimpleNamespace(module=module, trainer=lightning, seen=record.seen)


def assert_same(a, b):
    """Bit for bit."""
    for name, value in a.module.state_dict().items():
        assert torch.equal(b.module.state_dict()[name], value), name
    assert a.seen == b.seen
    assert a.trainer.callback_metrics == b.trainer.callback_metrics
    assert a.trainer.global_step == b.trainer.global_step > 0


class Frozen(BackpropModule):
    def on_train_epoch_start(self):
        self.model[0].requires_grad_(self.current_epoch == 1)


class Penalty(BackpropModule):
    """Reaches the last layer before the explicit gradients do, and the first one after them."""

    def training_step(self, batch, batch_idx):
        before = self.model[0].weight.square().sum()
        loss = super().training_step(batch, batch_idx)
        return 0.1 * before + loss + 0.1 * self.model[4].weight.square().sum()


class Moment(torch.nn.Module):
    """A loss with two targets."""

    def forward(self, output, y, weight):
        return (nn.functional.cross_entropy(output, y, reduction="none") * weight).mean()


class Largest(Metric):
    """Keeps what it is given until it is asked."""

    def __init__(self):
        super().__init__()
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, output, target):
        self.seen.append(output)

    def compute(self):
        return torch.cat(self.seen).amax(1).mean()


def pairs():
    """Two inputs and two targets."""
    x, y = DIGITS.parts["train"][:200]
    data = [((a, 2 * a), (b, w)) for a, b, w in zip(x, y, torch.linspace(0.5, 1, 200))]
    return DataLoader(data, 32)


def schedule(name, **arguments):
    return {"scheduler": partial(getattr(lr_scheduler, name), **arguments)}


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
FITS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "norm": {"gradient_clip_val": 0.5},
    "value": {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 3},
    "cosine": {"of": schedule("CosineAnnealingLR", T_max=9), "accumulate_grad_batches": 3},
    "1cycle": {"of": schedule("OneCycleLR", max_lr=0.05)},
    "epochs": {"of": schedule("StepLR", step_size=1) | {"interval": "epoch"}},
    "plateau": {"of": schedule("ReduceLROnPlateau", patience=0)},
    "max_steps": {"max_steps": 3, "accumulate_grad_batches": 3},
    "double": {"precision": "64-true"},
    "no metrics": {"of": {"metrics": None}},
    "metrics that keep": {"of": {"metrics": {"largest": Largest}, "prediction": None}},
    "torch": {"of": {"optimizer": SGD}},
    "LBFGS": {"of": {"optimizer": partial(torch.optim.LBFGS, lr=0.1, max_iter=3), "dropout": 0.0}},
    "function": {"of": {"loss": nn.functional.cross_entropy}},
    "frozen": {"of": {"kind": Frozen}},
}
CLOSE = {  # torch's own loss is not ours; a penalty's gradients are added in another order
    "loss": {"of": {"optimizer": SGD, "loss": torch.nn.CrossEntropyLoss()}},
    "penalty": {"of": {"optimizer": SGD, "kind": Penalty}, "accumulate_grad_batches": 3},
}


@pytest.mark.parametrize("options", FITS.values(), ids=FITS)
def test_engines_agree(options):
    by_autograd, by_step = (fit(engine, **options) for engine in ENGINES)
    assert_same(by_autograd, by_step)
    assert len(by_step.module.model.calls) < len(by_autograd.module.model.calls)


class Hooked(BackpropModule):
    """Doubles a gradient, counts others, and watches a layer."""

    def on_fit_start(self):
        self.seen = []
        self.model[0].weight.register_hook(lambda gradient: 2 * gradient)
        self.model[4].weight.register_post_accumulate_grad_hook(lambda p: self.seen.append(p.grad.sum().item()))
        self.model[2].register_forward_hook(lambda layer, args, output: self.seen.append(output.sum().item()))


def test_hooks_are_called():
    runs = [fit(engine, of={"kind": Hooked, "optimizer": SGD}, accumulate_grad_batches=3) for engine in ENGINES]
    assert_same(*runs)
    assert runs[0].module.seen == runs[1].module.seen
    plain = fit("step", of={"optimizer": SGD}, accumulate_grad_batches=3)
    assert runs[0].seen["norm"] != pytest.approx(plain.seen["norm"], rel=1e-2)


def test_fits_are_what_they_are_called():
    """The cases above reach what they are for."""
    found = fit("step", **FITS["accumulated"])
    assert found.trainer.global_step == 2 * math.ceil(BATCHES / 3)
    assert found.seen["global_step"] == [0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5, 6]
    assert list(found.module.model.calls) == [32, 32, 8]  # alone, onto others; the last batch
    assert min(fit("step", **FITS["norm"]).seen["norm"]) > 0.5
    cosine = fit("step", **FITS["cosine"]).seen["lr"]
    assert cosine == pytest.approx([0.005 * (1 + math.cos(math.pi * t / 9)) for t in range(6)])
    assert max(fit("step", **FITS["1cycle"]).seen["lr"]) == pytest.approx(0.05, rel=0.1)
    assert next(fit("step", **FITS["double"]).module.model.parameters()).dtype == torch.float64


CALLBACKS = {
    "early stopping": lambda: EarlyStopping("loss/val", patience=1, min_delta=0.3),
    "accumulation": lambda: GradientAccumulationScheduler({0: 1, 1: 3, 2: 2}),
    "averaging": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2, annealing_epochs=1),
}


@pytest.mark.parametrize("make_callback", CALLBACKS.values(), ids=CALLBACKS)
def test_callbacks(make_callback):
    runs = [fit(engine, make_callback(), max_epochs=8) for engine in ENGINES]
    assert_same(*runs)
    if make_callback is CALLBACKS["early stopping"]:
        assert runs[0].trainer.current_epoch < 8


@pytest.mark.parametrize("every", [BATCHES, 4], ids=["at the end of an epoch", "within an epoch"])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resume(every, tmp_path):
    """From a checkpoint of either engine, with either engine, a fit goes on as ever."""
    of = {"dropout": 0.0} | schedule("OneCycleLR", max_lr=0.05)

    def run(engine, folder, **options):
        callback = ModelCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, every_n_train_steps=every)
        return fit(engine, callback, of=of, max_epochs=3, enable_checkpointing=True, **options)

    whole = [run(engine, engine) for engine in ENGINES]
    assert_same(*whole)
    paths = [tmp_path / engine / f"step={every}.ckpt" for engine in ENGINES]
    resumed = [run(engine, f"{engine}{k}", ckpt_path=path) for engine in ENGINES for k, path in enumerate(paths)]
    for other in resumed[1:]:
        assert_same(resumed[0], other)
    if every == BATCHES:  # Lightning begins a broken epoch with its first batch
        for name, value in whole[0].module.state_dict().items():
            assert torch.equal(resumed[0].module.state_dict()[name], value), name


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_low_precision(precision):
    by_autograd, by_step = (fit(engine, precision=precision, of={"dropout": 0.0}) for engine in ENGINES)
    assert_same(by_autograd, by_step)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_float16_with_a_scaler(options):
    """Lightning takes a scaler on the CPU from those who bring one."""
    runs = []
    for engine in ENGINES:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        runs.append(fit(engine, plugins=[plugin], of={"dropout": 0.0, "optimizer": SGD}, **options))
        assert scaler.get_scale() < 2.0**24, "no step has overflowed"
    torch.testing.assert_close(*(run.module.state_dict() for run in runs), rtol=1e-4, atol=1e-5)


class Unknown(nn.Linear):
    """Something that has no explicit backward."""

    def forward(self, x):
        return torch.special.expit(super().forward(x))


def test_what_has_no_explicit_backward_goes_through_autograd_if_asked():
    of = {"model": Unknown(64, 10), "optimizer": SGD}
    with pytest.raises(RuntimeError, match="expit"):
        fit("step", of=of)
    runs = [fit(engine, of={**of, "model": copy.deepcopy(of["model"]), "fallback": "autograd"}) for engine in ENGINES]
    torch.testing.assert_close(*(run.module.state_dict() for run in runs), rtol=1e-5, atol=1e-6)


def test_without_capture_the_model_is_called_for_every_batch():
    by_autograd, by_step = fit("autograd"), fit("step", of={"capture": False})
    assert len(by_step.module.model.calls) == len(by_autograd.module.model.calls)


@pytest.mark.parametrize("options", CLOSE.values(), ids=CLOSE)
def test_engines_agree_closely(options):
    runs = [fit(engine, **options) for engine in ENGINES]
    torch.testing.assert_close(*(run.module.state_dict() for run in runs), rtol=1e-5, atol=1e-6)
    for name in ("loss", "norm"):
        assert runs[0].seen[name] == pytest.approx(runs[1].seen[name], rel=1e-5)


def test_what_is_added_to_the_loss_counts():
    norms = [fit("step", of={"optimizer": SGD, "kind": kind}).seen["norm"] for kind in (BackpropModule, Penalty)]
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)


def test_several_inputs_and_targets():
    runs = [fit(e, of={"loss": Moment(), "metrics": None}, train=pairs(), limit_val_batches=0) for e in ENGINES]
    assert_same(*runs)


class Scaled(BackpropModule):
    def training_step(self, batch, batch_idx):
        return 2 * super().training_step(batch, batch_idx)


class Twice(BackpropModule):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)


class Learned(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))


class Two(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def of_first(outputs, y):
    return nn.functional.cross_entropy(outputs[0], y)


ERRORS = {
    "scaled": ({"kind": Scaled}, RuntimeError, "must not be scaled after training_step .*, got 2 times the loss"),
    "twice": ({"kind": Twice}, RuntimeError, "training_step must run once for each backward"),
    "loss": ({"loss": Learned()}, RuntimeError, "loss must have no parameters to train for engine='step'"),
    "output": (
        {"model": Two(64, 10), "loss": of_first},
        TypeError,
        "model must return a tensor for metrics .*, got tuple",
    ),
    "schedule": (schedule("OneCycleLR", max_lr=0.05, total_steps=3), ValueError, "at least 14, the length of the fit"),
}


@pytest.mark.parametrize(("of", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_refused_in_a_fit(of, error, message):
    with pytest.raises(error, match=message):
        fit("step", of=of, limit_val_batches=0)


def test_what_the_step_cannot_do():
    """Trainers that cannot be had on this machine."""
    module = make("step")
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(model=module, precision_plugin=None))
    with pytest.raises(RuntimeError, match="strategy must be one device or DDPStrategy"):
        module.training_step((torch.zeros(2, 64), torch.zeros(2)), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "numba"}, "engine must be 'autograd' or 'step', got 'numba'"),
        ({"engine": "step", "interval": "steps"}, "interval must be 'step' or 'epoch', got 'steps'"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("argument", ["optimizer", "scheduler"])
def test_optimizer_and_schedule_are_made_in_the_fit(argument):
    made = optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    if argument == "scheduler":
        made = torch.optim.lr_scheduler.StepLR(made, 2)
    with pytest.raises(
        TypeError, match=rf"BackpropModule: {argument} must be a function .*, got (SGD|StepLR); .* functools.partial"
    ):
        make("step", **{argument: made})


def test_a_second_fit_and_evaluation():
    """Other batches, another trainer, the same module."""
    found = []
    for engine in ENGINES:
        run = fit(engine)
        again = trainer(max_epochs=1)
        again.fit(run.module, loader("train", batch_size=20), loader("val"))
        assert run.module._explicit is None
        [metrics] = again.test(run.module, loader("test"), verbose=False)
        predicted = again.predict(run.module, loader("test"))
        assert metrics.keys() == {"loss/test", "accuracy/test"}
        right = torch.cat([batch["prediction"] == batch["target"] for batch in predicted]).float().mean()
        assert metrics["accuracy/test"] == pytest.approx(right.item())
        found.append([metrics, *run.module.state_dict().values()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


class Copies(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.module = copy.deepcopy(pl_module)


def test_a_copy_is_on_its_own():
    callback = Copies()
    run = fit("step", callback, of={"metrics": None})  # Lightning knows metrics by their addresses
    before = copy.deepcopy(run.module.state_dict())
    torch.testing.assert_close(callback.module.state_dict(), before, rtol=0, atol=0)
    trainer(max_epochs=1).fit(callback.module, loader("train"), loader("val"))
    torch.testing.assert_close(run.module.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(callback.module.model[0].weight, run.module.model[0].weight)


def test_range_test():
    tried = []
    for engine in ENGINES:
        finder = LRFinder(min_lr=1e-5, steps=20)
        lightning = trainer(finder, max_epochs=-1, limit_val_batches=0)
        lightning.fit(make(engine, dropout=0.0), loader("train"), loader("val"))
        tried.append((finder.test.lr, finder.test.losses))
    assert tried[0] == tried[1]
    assert len(tried[0][0]) > 10


def test_by_a_configuration():
    """As LightningCLI makes it of a file."""
    arguments = {
        "model": {"class_path": "torch_bp.nn.MLP", "init_args": {"sizes": [64, 16, 10]}},
        "loss": "torch_bp.nn.CrossEntropyLoss",
        "optimizer": {"class_path": "torch_bp.optim.Adam", "init_args": {"lr": 0.01}},
        "scheduler": {"class_path": "torch_bp.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.05}},
        "metrics": {
            "accuracy": {
                "class_path": "torchmetrics.classification.MulticlassAccuracy",
                "init_args": {"num_classes": 10, "validate_args": False},
            }
        },
        "engine": "step",
    }
    node = {"class_path": "torch_bp.lightning.BackpropModule", "init_args": arguments}
    module = _instantiated(LightningModule, node)
    lightning = trainer()
    lightning.fit(module, loader("train"), loader("val"))
    assert isinstance(lightning.optimizers[0], optim.Adam)
    assert lightning.lr_scheduler_configs[0].scheduler.total_steps == 2 * BATCHES
    assert {"loss/train", "loss/val", "accuracy/train", "accuracy/val"} <= lightning.callback_metrics.keys()
