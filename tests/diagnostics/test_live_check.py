"""Gradient checks in a training that goes on: what they find, what they leave alone, and when there are none."""

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import torch_bp
from torch_bp.diagnostics import examine

X, Y = torch.randn(32, 6, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 3


class WrongTanh(torch.autograd.Function):
    """Its backward forgets a factor."""

    @staticmethod
    def forward(ctx, z):
        y = z.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy * (1 - y)


class WrongLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.square().mean()

    @staticmethod
    def backward(ctx, dy):
        return dy * torch.ones(32, 3) / 96


class Wrong(nn.Module):
    def forward(self, z):
        return WrongTanh.apply(z)


class Squares(nn.Module):
    def forward(self, z, y):
        return WrongLoss.apply(z)


def network(activation=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(16, 16), activation(), nn.Linear(16, 3)),
    )


def run(model, loss_fn=None, steps=5, engine="autograd", output=None, autocast=False, **options):
    loss_fn = loss_fn or nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    options = {"every": 3, "budget": None, "silent": True, **options}
    if engine == "step":
        step = torch_bp.TrainStep(model, loss_fn, optimizer)
        monitor = torch_bp.watch(step, output=output, **options)
    else:
        monitor = torch_bp.watch(model, optimizer, output, loss_fn=loss_fn, **options)
    with monitor:
        for _ in range(steps):
            if engine == "step":
                step(X, Y)
                continue
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = loss_fn(model(X), Y)
            loss.backward()
            optimizer.step()
    return monitor


ENGINES = ["autograd", "step"]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_right_is_not_named(engine, tmp_path):
    model = torch_bp.convert(network())
    monitor = run(model, engine=engine, check_every=2, output=tmp_path)
    checked = [reading for reading in monitor.readings if reading.gradient_errors]
    assert [reading.step for reading in checked] == [0, 2, 4]
    assert [reading.step for reading in monitor.readings] == [0, 2, 3, 4]
    for reading in checked:
        assert set(reading.gradient_errors) <= {"loss", "0", "1", "4", "6"}
        assert len(reading.gradient_errors) >= 4  # rounding may hide one
        assert all(error < 1e-2 for error in reading.gradient_errors.values())
        assert reading.gradient_tolerance == 2e-2
    assert monitor.findings == []
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "0", "1", "4", "6"):
        shown = [(e.step, e.value) for e in events.Scalars(f"gradcheck/{name}")]
        assert shown == [(r.step, pytest.approx(r.gradient_errors[name])) for r in checked if name in r.gradient_errors]


def test_a_part_of_the_name_module_is_not_the_model():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Linear(6, 3))

        def forward(self, x):
            return 2 * self.module(x)

    monitor = run(Twice(), check_every=2, steps=1)
    reading = monitor.readings[0]
    assert set(reading.gradient_errors) == {"loss", "module.0"}
    assert list(reading.layers) == ["module.0"]


def test_a_wrong_backward_is_found_where_it_is(tmp_path):
    monitor = run(network(Wrong), check_every=2, output=tmp_path)
    found = next(each for each in monitor.findings if each.kind == "wrong gradient")
    assert (found.layer, found.step, found.last_step, found.severity) == ("4", 0, 4, "error")
    assert found.value > 2e-2 == found.threshold
    assert "the backward of 4, or of what lies between it and 6, is wrong" in found.cause
    assert monitor.last.gradient_errors["6"] < 2e-2
    assert list(examine(tmp_path).findings) == monitor.findings


@pytest.mark.parametrize("last", ["what follows it", "loss"])
def test_what_is_wrong_at_the_end(last):
    model = network()
    if last == "loss":
        monitor = run(model, Squares(), check_every=5)
    else:
        model.append(Wrong())
        monitor = run(model, check_every=5)
    found = next(each for each in monitor.findings if each.kind == "wrong gradient")
    assert found.layer == ("" if last == "loss" else "6")
    assert last in found.cause


def state(model, optimizer):
    buffers = [t.clone() for t in model.state_dict().values()]
    gradients = [p.grad.clone() for p in model.parameters()]
    moments = [t.clone() for each in optimizer.state.values() for t in each.values()]
    draws = [torch.rand(3), torch.tensor(random.random()), torch.tensor(np.random.rand())]
    return buffers + gradients + moments + draws


@pytest.mark.parametrize("engine", ENGINES)
def test_a_training_with_checks_is_the_same_to_the_last_bit(engine):
    states, modes = [], []
    for check_every in (None, 2):
        model = network() if engine == "autograd" else torch_bp.convert(network())
        random.seed(0)
        np.random.seed(0)
        monitor = run(model, engine=engine, check_every=check_every, steps=6)
        assert any(reading.gradient_errors for reading in monitor.readings) == (check_every is not None)
        states.append(state(model, monitor.optimizer))
        modes.append([module.training for module in model.modules()])
        assert not model._forward_hooks
    assert all(torch.equal(a, b) for a, b in zip(*states))
    assert modes[0] == modes[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_that_are_read_are_those_of_the_training(engine):
    losses = []
    for check_every in (None, 1):
        monitor = run(torch_bp.convert(network()), engine=engine, check_every=check_every, every=1)
        losses.append([(reading.loss, reading.validation_loss) for reading in monitor.readings])
    assert losses[0] == losses[1]


def test_autocast_is_that_of_the_pass():
    monitor = run(network(), check_every=4, autocast=True)
    assert monitor.last.gradient_tolerance == 0.5
    assert monitor.findings == []


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x, *, scale=1.0, shift=0.0):
        return self.inner(x) * scale + shift


@pytest.mark.parametrize("named", [False, True])
def test_models_and_losses_with_named_arguments(named):
    model, loss_fn = Several(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"every": 1, "budget": None, "check_every": 1, "silent": True}
    with torch_bp.watch(model, optimizer, loss_fn=loss_fn, **options) as monitor:
        output = model(x=X, scale=2.0) if named else model(X, scale=2.0)
        loss = loss_fn(input=output, target=Y) if named else loss_fn(output, target=Y)
        loss.backward()
        optimizer.step()
    assert set(monitor.last.gradient_errors) == {"loss", "inner"}
    assert monitor.findings == []


def without_loss(model, loss_fn, monitor):
    monitor.loss(nn.functional.cross_entropy(model(X), Y)).backward()


def of_another_output(model, loss_fn, monitor):
    loss_fn(model(X) * 2, Y).backward()


def without_model(model, loss_fn, monitor):
    loss_fn(model[6](model[0](X)), Y).backward()


def written_over(model, loss_fn, monitor):
    x = X.clone()
    loss_fn(model(x), Y).backward()
    x.zero_()


def not_finite(model, loss_fn, monitor):
    loss_fn(model(X * float("inf")), Y).backward()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (without_loss, "loss_fn was not called in the step"),
        (of_another_output, "not called with what the model returned"),
        (without_model, "the model was not called in the step"),
        (written_over, "the batch was written to"),
        (not_finite, "loss_fn must return one finite number"),
    ],
)
def test_why_there_is_no_check_is_said_once(step, words, caplog):
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"every": 1, "budget": None, "check_every": 1, "silent": True}
    with torch_bp.watch(model, optimizer, loss_fn=loss_fn, **options) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            step(model, loss_fn, monitor)
            optimizer.step()
    assert [reading.gradient_errors for reading in monitor.readings] == [{}] * 3
    said = [record.getMessage() for record in caplog.records if "no gradient check" in record.getMessage()]
    assert len(said) == 1
    assert words in said[0]


def test_a_batch_is_checked_once(caplog):
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch_bp.watch(model, optimizer, loss_fn=loss_fn, every=1, budget=None, check_every=1, silent=True):
        loss_fn(model(X), Y).backward()
        optimizer.step()
        assert caplog.records == []
        without_model(model, loss_fn, None)
        optimizer.step()
    assert "the model was not called in the step" in caplog.text


def test_a_loss_that_nobody_names(caplog):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch_bp.watch(model, optimizer, check_every=1) as monitor:
        monitor.loss(nn.functional.cross_entropy(model(X), Y)).backward()
        optimizer.step()
    assert "the loss is not known; pass its module as loss_fn" in caplog.text


def test_what_cannot_be_checked_is_refused():
    model = network()
    with pytest.raises(ValueError, match="check_every must be a whole number of 1 or more, got 0"):
        torch_bp.watch(model, check_every=0)
    with pytest.raises(ValueError, match="check_every must be None for a compiled model, got 3"):
        torch_bp.watch(torch.compile(copy.deepcopy(model)), check_every=3)


def test_hooks_of_others_are_left():
    model, seen = network(), []
    model[0].register_forward_hook(lambda *_: seen.append(len(model[0]._forward_hooks)))
    monitor = run(model, every=1, check_every=1, steps=3)
    assert len(monitor.last.gradient_errors) == 5
    assert set(seen) == {1, 2}  # nothing of the monitor is there while it checks
    assert len(model[0]._forward_hooks) == 1
