"""Optimizers and schedules together: 1000 steps as in torch, runs cut off and resumed, AMP, compiled steps."""

import copy
import io
import random

import pytest
import torch
import torch.optim.lr_scheduler as their_schedules
from torch._dynamo.utils import counters

import torch_bp.optim.lr_scheduler as our_schedules
from torch_bp import optim

OPTIMIZERS = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "RMSprop": {"lr": 0.01, "momentum": 0.9},
    "Adagrad": {"lr": 0.01},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "Adadelta": {"lr": 0.01},
}
WITHOUT_MOMENTUM = {"Adagrad", "Adadelta"}


def factor(t):
    return 1 / (1 + t / 100)


SCHEDULES = {
    "StepLR": {"step_size": 100, "gamma": 0.7},
    "MultiStepLR": {"milestones": [10, 300, 300]},
    "ConstantLR": {"total_iters": 100},
    "LinearLR": {"total_iters": 900, "end_factor": 0.01},
    "ExponentialLR": {"gamma": 0.995},
    "PolynomialLR": {"total_iters": 900, "power": 2.0},
    "MultiplicativeLR": {"lr_lambda": factor},
    "LambdaLR": {"lr_lambda": factor},
    "CosineAnnealingLR": {"T_max": 999, "eta_min": 1e-4},
    "CosineAnnealingWarmRestarts": {"T_0": 50, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.05, "step_size_up": 70, "mode": "triangular2"},
    "OneCycleLR": {"max_lr": 0.05, "total_steps": 1001},
    "ReduceLROnPlateau": {"patience": 3, "factor": 0.9},
    "SequentialLR": {},
    "ChainedScheduler": {},
}
METRICS = [1 / (1 + t) + (t % 7) / 10 for t in range(1000)]
NOISE = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def build(name, schedule, ours=True, lr=None):
    """`(parameter, optimizer, schedule)`, or None where the schedule wants a momentum that the optimizer has not."""
    optimizers, schedules = (optim, our_schedules) if ours else (torch.optim, their_schedules)
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    options = OPTIMIZERS[name] | ({} if lr is None else {"lr": lr})
    optimizer, kwargs = getattr(optimizers, name)([weight], **options), dict(SCHEDULES[schedule])
    if schedule in ("OneCycleLR", "CyclicLR") and name in WITHOUT_MOMENTUM:
        kwargs["cycle_momentum"] = False
    if schedule == "SequentialLR":
        parts = [schedules.LinearLR(optimizer, total_iters=20), schedules.CosineAnnealingLR(optimizer, 980)]
        return weight, optimizer, schedules.SequentialLR(optimizer, parts, [20])
    if schedule == "ChainedScheduler":
        parts = [schedules.LinearLR(optimizer, total_iters=20), schedules.ExponentialLR(optimizer, 0.995)]
        return weight, optimizer, schedules.ChainedScheduler(parts)
    return weight, optimizer, getattr(schedules, schedule)(optimizer, **kwargs)


def train(weight, optimizer, schedule, steps):
    plateau = isinstance(schedule, their_schedules.ReduceLROnPlateau)
    for t in steps:
        weight.grad = NOISE[t % 64] + 0.1 * weight.detach()
        optimizer.step()
        schedule.step(*([METRICS[t]] if plateau else []))


@every_optimizer
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_thousand_steps_are_torchs(name, schedule):
    mine, other = build(name, schedule), build(name, schedule, ours=False)
    train(*mine, range(1000))
    train(*other, range(1000))
    torch.testing.assert_close(mine[0], other[0], rtol=1e-12, atol=1e-15)
    assert mine[2].get_last_lr() == pytest.approx(other[2].get_last_lr(), rel=1e-12, abs=1e-16)


@every_optimizer
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_cut_off_goes_on_to_the_last_bit(name, schedule):
    whole = build(name, schedule)
    train(*whole, range(60))
    for order in ("optimizer last", "schedule last", "schedule made last"):
        cut = random.Random(f"{name} {schedule} {order}").randrange(1, 60)
        first = build(name, schedule)
        train(*first, range(cut))
        buffer = io.BytesIO()
        torch.save([first[0].detach(), first[1].state_dict(), first[2].state_dict()], buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        weight, optimizer, again = build(name, schedule, lr=7.0)
        with torch.no_grad():
            weight.copy_(saved[0])
        if order == "optimizer last":
            again.load_state_dict(saved[2])
            optimizer.load_state_dict(saved[1])
        else:
            optimizer.load_state_dict(saved[1])
            if order == "schedule made last":
                loaded = optimizer.state_dict()
                weight, optimizer, again = build(name, schedule)
                with torch.no_grad():
                    weight.copy_(saved[0])
                optimizer.load_state_dict(loaded)
            again.load_state_dict(saved[2])
        train(weight, optimizer, again, range(cut, 60))
        assert torch.equal(weight, whole[0]), (order, cut)
        assert again.get_last_lr() == whole[2].get_last_lr()


@pytest.mark.parametrize("optimizers", [optim, torch.optim], ids=["ours", "torch's"])
@pytest.mark.parametrize("skips", [1, 3])
def test_a_step_that_amp_skips_is_no_wrong_order(optimizers, skips):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizers.SGD([weight], lr=0.1)
    schedule = our_schedules.ChainedScheduler(
        [our_schedules.StepLR(optimizer, 3), our_schedules.LambdaLR(optimizer, factor)]
    )
    scaler = torch.amp.GradScaler("cpu")
    for t in range(skips + 2):  # warnings are errors here
        optimizer.zero_grad()
        scaler.scale(weight.sum() * (torch.inf if t < skips else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        assert (weight[0] == 1.0) == (t < skips)


def test_a_wrong_order_is_seen_with_finite_gradients():
    weight = torch.nn.Parameter(torch.ones(2))
    for optimizer in (optim.SGD([weight], lr=0.1), optim.Adam([weight])):
        schedule = our_schedules.ExponentialLR(optimizer, 0.9)
        weight.grad = torch.ones(2)
        with pytest.warns(UserWarning, match=r"before `optimizer.step") as caught:
            schedule.step()
        assert caught[0].filename == __file__
        schedule.step()  # once


@every_optimizer
@pytest.mark.parametrize("schedule", ["CosineAnnealingLR", "LambdaLR", "ReduceLROnPlateau", "SequentialLR"])
def test_a_compiled_step_is_compiled_once(name, schedule):
    """With the rate in a tensor, which schedules write in place."""
    torch._dynamo.reset()
    counters.clear()
    rate = torch.tensor(0.01, dtype=torch.float64)
    weight, optimizer, schedule = build(name, schedule, lr=rate)
    twin = build(name, type(schedule).__name__, ours=False)

    def run(weight, optimizer, schedule, compiled=True):
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for t in range(8):
            weight.grad = NOISE[t] + 0.1 * weight.detach()
            step()
            schedule.step(*([METRICS[t]] if isinstance(schedule, their_schedules.ReduceLROnPlateau) else []))
            yield counters["stats"]["unique_graphs"]

    graphs = [*run(weight, optimizer, schedule)]
    assert optimizer.param_groups[0]["lr"] is rate
    assert 1 <= graphs[1] == graphs[-1]  # the first step makes the state
    rounded = "Adam" in name  # a compiled step keeps the step count, and what follows from it, in float32
    assert [*run(*twin, compiled=rounded)]
    torch.testing.assert_close(weight, twin[0], rtol=1e-6 if rounded else 1e-12, atol=1e-15)


@pytest.fixture
def in_double():
    """Step counts, too, and what follows from them, which a compiled step keeps in tensors."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [*sorted({*OPTIMIZERS} - WITHOUT_MOMENTUM), "Lion"])
@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("rate", [float, torch.tensor], ids=["number", "tensor"])
def test_a_compiled_step_whose_momentum_changes(name, schedule, rate, in_double):
    """As in eager, and with no graph of its own for each momentum."""
    results = []
    for compiled in (True, False):
        torch._dynamo.reset()
        counters.clear()
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = getattr(optim, name)([weight], **OPTIMIZERS.get(name, {}) | {"lr": rate(0.01)})
        options = {"OneCycleLR": {"max_lr": 0.05, "total_steps": 13}, "CyclicLR": {"base_lr": 0.01, "max_lr": 0.05}}
        cycle = getattr(our_schedules, schedule)(optimizer, **options[schedule])
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        graphs, momenta = [], []
        for t in range(12):
            group = optimizer.param_groups[0]
            momenta.append(group["betas"][0] if "betas" in group else group["momentum"])
            weight.grad = NOISE[t] + 0.1 * weight.detach()
            step()
            cycle.step()
            graphs.append(counters["stats"]["unique_graphs"])
        assert len({*momenta}) > 6
        assert graphs[-1] == graphs[2] == (2 if compiled else 0)  # one with the first momentum, one with any
        results.append((weight, optimizer.state[weight]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-15)


def test_states_hold_copies():
    _, _, schedule = build("SGD", "SequentialLR", lr=torch.tensor(0.01, dtype=torch.float64))
    state = copy.deepcopy(schedule.state_dict())
    before = schedule.state_dict()
    schedule.optimizer.step()
    schedule.step()
    assert before["_param_groups"]["groups"][0]["lr"] == state["_param_groups"]["groups"][0]["lr"]
