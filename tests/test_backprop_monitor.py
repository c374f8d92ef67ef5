"""The monitor as a callback, in fits of a few steps."""

import inspect

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import torch_bp
from torch_bp import nn, optim
from torch_bp.diagnostics import read_readings
from torch_bp.lightning import BackpropModule, BackpropMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
]
X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
DATA = DataLoader(TensorDataset(X, X.sum(1, keepdim=True)), 8)
ALWAYS = {"every": 1, "budget": None}


def module(**options):
    torch.manual_seed(0)
    return BackpropModule(nn.MLP([4, 6, 1]), nn.MSELoss(), lambda params: optim.Adam(params, lr=1e-2), **options)


def trainer(callback, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | options
    if not options.get("barebones"):
        options |= {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=[callback], accelerator="cpu", **options)


def test_readings_in_memory_and_the_same_weights():
    weights = []
    for callback in (BackpropMonitor("full", **ALWAYS), BackpropMonitor(every=1000)):
        model = module()
        trainer(callback).fit(model, DATA, DATA)
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    callback = BackpropMonitor("full", **ALWAYS)
    trainer(callback).fit(module(), DATA, DATA)
    assert callback.monitor.last.layers["model.0"].update_ratio > 0
    readings = callback.monitor.readings
    assert [r.step for r in readings] == list(range(12))
    assert [r.epoch for r in readings] == [0] * 6 + [1] * 6
    assert [r.validation_loss is not None for r in readings] == [False] * 6 + [True] + [False] * 5
    assert list(readings[0].layers) == ["model.0", "model.2"]
    assert readings[0].layers["model.0"].signal_norm > 0
    expected = torch.nn.functional.mse_loss(module().model(X[:8]), X[:8].sum(1, keepdim=True))
    assert readings[0].loss == pytest.approx(expected.item())


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}], ids=str)
def test_both_engines_say_the_same(options):
    found, weights = [], []
    for engine in ("step", "autograd"):
        callback, model = BackpropMonitor("full", **ALWAYS), module(engine=engine, capture=engine == "step" or "auto")
        trainer(callback, **options).fit(model, DATA, DATA)
        found.append(callback.monitor.readings)
        weights.append([p.detach() for p in model.parameters()])
    assert len(found[0]) == len(found[1]) > 1
    for one, other in zip(*found):
        assert (one.step, one.batch) == (other.step, other.batch)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        for name, layer in other.layers.items():
            for field in ("signal_norm", "signal_ratio", "update_norm", "activation_mean", "dead_units"):
                expected = getattr(layer, field)
                assert getattr(one.layers[name], field) == (
                    None if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-7)
                ), field
            assert one.layers[name].per_example.mean == pytest.approx(layer.per_example.mean, rel=1e-5)
    torch.testing.assert_close(*weights)
    unwatched = module(engine="step")
    trainer(BackpropMonitor(every=1000), **options).fit(unwatched, DATA, DATA)
    assert all(torch.equal(a, b) for a, b in zip(weights[0], unwatched.parameters()))


def test_accumulated_batches_are_one_step():
    callback = BackpropMonitor(**ALWAYS)
    trainer(callback, accumulate_grad_batches=3, max_epochs=1).fit(module(), DATA, DATA)
    first = callback.monitor.readings[0]
    assert len(callback.monitor.readings) == 2
    assert first.batch == 24
    expected = torch.nn.functional.mse_loss(module().model(X[:24]), X[:24].sum(1, keepdim=True))
    assert first.loss == pytest.approx(expected.item(), rel=1e-5)


def test_tensorboard_and_other_loggers(tmp_path):
    for logger in (TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "csv")):
        callback = BackpropMonitor(**ALWAYS)
        trainer(callback, logger=logger, log_every_n_steps=1).fit(module(), DATA, DATA)
        assert len(list(read_readings(f"{logger.log_dir}/readings.jsonl"))) == 12
        if isinstance(logger, TensorBoardLogger):
            found = EventAccumulator(logger.log_dir)
            found.Reload()
            assert {"delta/model.0", "loss/val"} <= set(found.Tags()["scalars"])
            assert "signals/picture" in found.Tags()["images"]
        else:
            logger.save()
            header = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
            assert "delta/model.0" in header


@pytest.mark.filterwarnings("ignore:.*barebones=True")
def test_barebones_is_left_alone():
    callback = BackpropMonitor(**ALWAYS)
    trainer(callback, barebones=True, max_epochs=1).fit(module(), DATA, DATA)
    assert callback.monitor is None


def test_manual_optimization_and_several_optimizers():
    class Manual(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            x, y = batch
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.mse_loss(self.two(self.one(x)), y))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [optim.SGD(part.parameters(), lr=0.01) for part in (self.one, self.two)]

    callback = BackpropMonitor(optimizer=1, **ALWAYS)
    trainer(callback, max_epochs=1).fit(Manual(), DATA)
    reading = callback.monitor.readings[3]
    assert reading.layers["two"].update_norm > 0
    assert reading.layers["one"].update_norm is None
    assert reading.layers["one"].signal_norm > 0
    assert reading.loss > 0


def test_defaults_are_those_of_watch():
    watched = inspect.signature(torch_bp.watch).parameters
    ours = inspect.signature(BackpropMonitor).parameters
    shared = ours.keys() & watched.keys() - {"optimizer"}
    assert ours.keys() - shared == {"optimizer", "validation_loss"}
    assert {name: ours[name].default for name in shared} == {name: watched[name].default for name in shared}


@pytest.mark.parametrize("which", [1, -1, "first"])
def test_an_optimizer_that_is_not_there(which):
    with pytest.raises(ValueError, match="optimizer must be one of the 1 of the module, 0 to 0, got"):
        trainer(BackpropMonitor(optimizer=which, **ALWAYS), max_epochs=1).fit(module(), DATA, DATA)


def test_a_checkpoint_takes_it_along(tmp_path):
    first, callback = module(), BackpropMonitor("full", **ALWAYS)
    fit = trainer(callback, max_epochs=1)
    fit.fit(first, DATA, DATA)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = BackpropMonitor("full", **ALWAYS)
    trainer(again, max_epochs=2).fit(module(), DATA, DATA, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert [r.step for r in again.monitor.readings] == list(range(6, 12))


def test_what_fails_leaves_nothing_behind():
    class Broken(BackpropModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    model = Broken(nn.MLP([4, 6, 1]), nn.MSELoss(), lambda params: optim.Adam(params, lr=1e-2))
    callback = BackpropMonitor(**ALWAYS)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(callback).fit(model, DATA, DATA)
    assert not any(m._forward_hooks for m in model.modules())
    assert len(callback.monitor.readings) == 2


def test_an_optimizer_of_torch_is_measured_in_its_closure():
    updates = []
    for kind in (torch.optim.Adam, optim.Adam):
        model = BackpropModule(
            nn.MLP([4, 6, 1], init="auto"), nn.MSELoss(), lambda params, kind=kind: kind(params, lr=1e-2)
        )
        model.load_state_dict(module().state_dict())
        callback = BackpropMonitor(**ALWAYS)
        trainer(callback, max_epochs=1).fit(model, DATA, DATA)
        layer = callback.monitor.last.layers["model.2"]
        updates += [[layer.grad_norm, layer.weight_norm, layer.update_norm]]
    assert updates[0] == pytest.approx(updates[1], rel=1e-4)


@pytest.mark.parametrize("engine", ["step", "autograd"])
def test_gradients_are_checked_and_findings_kept(engine, caplog):
    callback = BackpropMonitor(every=3, budget=None, check_every=5)
    trainer(callback).fit(module(engine=engine), DATA, DATA)
    readings = callback.monitor.readings
    assert [r.step for r in readings] == [0, 3, 5, 6, 9, 10]
    assert [r.step for r in readings if r.gradient_errors] == [0, 5, 10]
    assert all(set(r.gradient_errors) <= {"loss", "model.0", "model.2"} for r in readings)
    assert len(readings[0].gradient_errors) == 3
    assert [found.kind for found in callback.monitor.findings] == []
    assert not [record for record in caplog.records if record.name == "torch_bp"]


@pytest.mark.parametrize("options", [{}, {"silent": True}, {"diagnose": False}], ids=str)
def test_verdicts_under_a_trainer(options, caplog):
    sick = module()
    torch.nn.init.constant_(sick.model[0].bias, -100.0)
    callback = BackpropMonitor(**ALWAYS, **options)
    trainer(callback).fit(sick, DATA, DATA)
    wanted = [] if "diagnose" in options else ["dead units"]
    assert [found.kind for found in callback.monitor.findings if found.layer == "model.0"] == wanted
    said = [record for record in caplog.records if "layer model.0" in record.getMessage()]
    assert len(said) == (not options)


def test_a_second_fit_of_a_trainer_goes_on(tmp_path):
    callback, model = BackpropMonitor(**ALWAYS), module()
    runner = trainer(callback, logger=CSVLogger(tmp_path), max_epochs=1)
    runner.fit(model, DATA, DATA)
    runner.fit_loop.max_epochs = 2
    runner.fit(model, DATA, DATA)
    assert [r.step for r in read_readings(f"{runner.log_dir}/readings.jsonl")] == list(range(12))
    trainer(callback).fit(module(), DATA, DATA)  # another one begins anew
    assert callback.monitor.readings[0].step == 0
