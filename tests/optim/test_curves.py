"""The curves: their examples, many constants against torch's schedules, and the cases that torch does not define."""

import doctest
import math

import pytest
import torch
import torch.optim.lr_scheduler as theirs
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_bp.optim.lr_scheduler as ours
from tests.optim.table import readable
from torch_bp.optim import curves

# A row: the class, its arguments, and the steps to take, past the end where there is one.
ROWS = [
    ("StepLR", {"step_size": 1, "gamma": 0.0}, 4),
    ("StepLR", {"step_size": 1, "gamma": -0.5}, 4),
    ("MultiStepLR", {"milestones": [0, 0, 4], "gamma": 0.5}, 6),
    ("MultiStepLR", {"milestones": [9, 2, 2.0], "gamma": 0.0}, 12),
    ("ConstantLR", {"factor": 0.25, "total_iters": 0}, 4),
    ("ConstantLR", {"factor": 1.0, "total_iters": 1}, 4),
    ("LinearLR", {"start_factor": 0.01, "end_factor": 0.9, "total_iters": 300}, 310),
    ("LinearLR", {"start_factor": 0.1, "total_iters": 0}, 4),
    ("LinearLR", {"start_factor": 0.1, "end_factor": 0.0, "total_iters": 1}, 4),
    ("ExponentialLR", {"gamma": 0.0}, 4),
    ("ExponentialLR", {"gamma": 1.5}, 40),
    ("CosineAnnealingLR", {"T_max": 1, "eta_min": 0.002}, 6),
    ("CosineAnnealingLR", {"T_max": 1205, "eta_min": 1e-5}, 3700),  # where 1 - cos and 1 + cos round apart
    ("CosineAnnealingLR", {"T_max": 2.5}, 12),
    ("CosineAnnealingLR", {"T_max": 5, "eta_min": 0.2}, 22),
    ("CosineAnnealingWarmRestarts", {"T_0": 1, "T_mult": 3}, 50),
    ("PolynomialLR", {"total_iters": 0}, 4),
    ("PolynomialLR", {"total_iters": 7, "power": 0.0}, 10),
    ("PolynomialLR", {"total_iters": 300, "power": 0.9}, 310),
    ("LambdaLR", {"lr_lambda": lambda t: t % 3 / 2}, 9),
    ("MultiplicativeLR", {"lr_lambda": lambda t: 0.9 + t / 100}, 40),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 3}, 40),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 7, "step_size_down": 2, "mode": "triangular2"}, 90),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 5, "mode": "exp_range", "gamma": 0.99}, 900),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 4, "step_size_down": 0}, 9),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 4, "scale_fn": lambda cycle: 1 / cycle}, 50),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.5, "scale_fn": math.cos, "scale_mode": "iterations"}, 9),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9, "three_phase": True, "anneal_strategy": "linear"}, 9),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9, "three_phase": True, "pct_start": 0.7}, 9),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9, "pct_start": 0.0}, 9),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9, "pct_start": 1.0}, 8),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 1}, 1),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9, "base_momentum": 0.7, "max_momentum": 0.9}, 9),
]


def run(module, name, kwargs, steps, metrics=None):
    """The rate and the momentum after the construction and after each step."""
    opt = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    group = opt.param_groups[0]
    schedule = getattr(module, name)(opt, **kwargs)
    opt.step()
    seen = [(group["lr"], group["momentum"])]
    for i in range(steps):
        schedule.step(*([metrics[i]] if metrics else []))
        seen.append((group["lr"], group["momentum"]))
    return seen


def assert_as_torch(*row):
    for t, (got, expected) in enumerate(zip(run(ours, *row), run(theirs, *row), strict=True)):
        for x, y in zip(got, expected):
            assert math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-16), (t, got, expected)


def test_every_curve_has_an_example():
    result = doctest.testmod(curves)
    assert result.failed == 0
    found = [f for f in vars(curves).values() if getattr(f, "__module__", "") == curves.__name__]
    assert len(found) > 15
    assert all(">>> " in f.__doc__ for f in found)


@pytest.mark.parametrize(("name", "kwargs", "steps"), ROWS, ids=readable)
def test_equals_torch(name, kwargs, steps):
    assert_as_torch(name, kwargs, steps)


def options(**kwargs):
    return st.fixed_dictionaries({}, optional=kwargs)


share, count = st.floats(0.01, 1.0), st.integers(1, 15)
RANDOM = {
    "StepLR": st.fixed_dictionaries({"step_size": count}, optional={"gamma": share}),
    "MultiStepLR": st.fixed_dictionaries({"milestones": st.lists(count)}, optional={"gamma": share}),
    "ConstantLR": options(factor=share, total_iters=count),
    "LinearLR": options(start_factor=share, end_factor=st.floats(0.0, 1.0), total_iters=count),
    "ExponentialLR": st.fixed_dictionaries({"gamma": share}),
    "CosineAnnealingLR": st.fixed_dictionaries({"T_max": count}, optional={"eta_min": share}),
    "CosineAnnealingWarmRestarts": st.fixed_dictionaries(
        {"T_0": count}, optional={"T_mult": st.integers(1, 3), "eta_min": share}
    ),
    "PolynomialLR": options(total_iters=count, power=st.floats(0.1, 3.0)),
    "CyclicLR": st.fixed_dictionaries(
        {"base_lr": share, "max_lr": share, "step_size_up": count},
        optional={
            "step_size_down": count,
            "mode": st.sampled_from(["triangular", "triangular2", "exp_range"]),
            "gamma": share,
            "cycle_momentum": st.booleans(),
        },
    ),
    "OneCycleLR": st.fixed_dictionaries(  # a share that makes no phase empty: torch would divide by zero
        {"max_lr": share, "total_steps": st.integers(20, 40), "pct_start": st.sampled_from([0.11, 0.3, 0.47])},
        optional={"three_phase": st.booleans(), "anneal_strategy": st.sampled_from(["cos", "linear"])},
    ),
}


@pytest.mark.parametrize("name", RANDOM)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_torch_for_random_constants(name, data):
    assert_as_torch(name, data.draw(RANDOM[name]), 20)


plateau_options = options(
    mode=st.sampled_from(["min", "max"]),
    threshold_mode=st.sampled_from(["rel", "abs"]),
    threshold=st.just(0.0) | st.floats(0.0, 0.5),
    patience=st.integers(0, 3),
    cooldown=st.integers(0, 3),
    factor=st.floats(0.1, 0.9),
    min_lr=st.floats(0.0, 0.05),
    eps=st.floats(0.0, 0.05),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(kwargs=plateau_options, metrics=st.lists(st.floats(-1, 1) | st.sampled_from([0.5, -0.5, math.nan, math.inf])))
def test_plateau_equals_torch(kwargs, metrics):
    assert_as_torch("ReduceLROnPlateau", kwargs, len(metrics), metrics)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("total_steps", "pct_start"), [(2, 0.5), (1, 1.0), (4, 0.25)])
def test_one_cycle_skips_a_phase_without_steps(total_steps, pct_start, three_phase):
    kwargs = {"max_lr": 0.5, "total_steps": total_steps, "pct_start": pct_start, "three_phase": three_phase}
    with pytest.raises(ZeroDivisionError):
        run(theirs, "OneCycleLR", kwargs, 0)
    seen = run(ours, "OneCycleLR", kwargs, total_steps)
    assert seen[0] == pytest.approx((0.5, 0.85))
    last = 1 if total_steps == 1 else total_steps - 1
    assert seen[last] == pytest.approx((0.5 / 25 / 1e4, 0.95))


def test_one_cycle_that_only_rises_may_take_its_last_step():
    kwargs = {"max_lr": 0.5, "total_steps": 9, "pct_start": 1.0}
    assert run(ours, "OneCycleLR", kwargs, 9)[-2:] == [(0.5, 0.85), pytest.approx((0.5 / 25 / 1e4, 0.95))]


def test_a_factor_that_leaves_zero_gives_the_closed_form():
    kwargs = {"factor": 0.0, "total_iters": 3}
    with pytest.raises(ZeroDivisionError):
        run(theirs, "ConstantLR", kwargs, 3)
    assert [lr for lr, _ in run(ours, "ConstantLR", kwargs, 5)] == [0.0, 0.0, 0.0, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_a_factor_that_stays_leaves_the_rate_exactly(rate):
    for factor in (0.0, 0.3):
        moved = curves.move(rate, 0.2, factor, factor, eta_min=0.7)  # (0.1 - 0.7) + 0.7 is not 0.1
        assert moved == rate
        assert moved is not rate or isinstance(rate, float)


@pytest.mark.parametrize("T_mult", [1, 2, 3, 5])
def test_warm_restarts_count_as_torch_does_step_by_step(T_mult):
    schedule = theirs.CosineAnnealingWarmRestarts(torch.optim.SGD([torch.zeros(1)]), 2, T_mult)
    for t in range(800):
        assert curves.warm_restarts(t, 2, T_mult) == (schedule.T_cur, schedule.T_i)
        schedule.step()


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_warm_restarts_step_to_fractions_and_to_every_restart():
    mine, other = (
        module.CosineAnnealingWarmRestarts(torch.optim.SGD([torch.zeros(1)], lr=0.1), T_0=2, T_mult=3)
        for module in (ours, theirs)
    )
    for epoch in (0.5, 1.9, None, 3.25, None, None, 7.75, 30.5, 0.0, None):
        mine.step(epoch)
        other.step(epoch)
        assert mine.get_last_lr() == pytest.approx(other.get_last_lr(), rel=1e-12)
        assert mine.last_epoch == other.last_epoch
    for restart in (2, 8, 26, 80, 242, 728):  # torch's logarithm misses some of them
        mine.step(restart)
        assert mine.get_last_lr() == [0.1]
    for module in (ours, theirs):
        schedule = module.CosineAnnealingWarmRestarts(torch.optim.SGD([torch.zeros(1)]), T_0=2)
        with pytest.raises(ValueError, match="Expected non-negative epoch, but got -1"):
            schedule.step(-1)


# Constants that torch refuses: the class, its arguments, and the steps after which it does.
REFUSED = [
    ("StepLR", {"step_size": 3, "last_epoch": 3}, 0),
    ("ConstantLR", {"factor": 1.5}, 0),
    ("ConstantLR", {"factor": -0.5}, 0),
    ("LinearLR", {"start_factor": 0.0}, 0),
    ("LinearLR", {"start_factor": 1.5}, 0),
    ("LinearLR", {"end_factor": -0.5}, 0),
    ("CosineAnnealingWarmRestarts", {"T_0": 0}, 0),
    ("CosineAnnealingWarmRestarts", {"T_0": 1.5}, 0),
    ("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 0}, 0),
    ("CosineAnnealingWarmRestarts", {"T_0": 2, "eta_min": "0"}, 0),
    ("OneCycleLR", {"max_lr": 0.5}, 0),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 0}, 0),
    ("OneCycleLR", {"max_lr": 0.5, "epochs": -1, "steps_per_epoch": 3}, 0),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9, "pct_start": 1.5}, 0),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9, "pct_start": 1}, 0),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9, "anneal_strategy": "cubic"}, 0),
    ("OneCycleLR", {"max_lr": [0.5, 0.5], "total_steps": 9}, 0),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9}, 10),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9, "last_epoch": 3}, 0),
    ("LambdaLR", {"lr_lambda": [math.exp, math.exp]}, 0),
    ("MultiplicativeLR", {"lr_lambda": [math.exp, math.exp]}, 0),
    ("MultiplicativeLR", {"lr_lambda": 3}, 0),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "mode": "square"}, 0),
    ("CyclicLR", {"base_lr": [0.1, 0.1], "max_lr": 0.5}, 0),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "last_epoch": 3}, 0),
    ("ReduceLROnPlateau", {"factor": 1.0}, 0),
    ("ReduceLROnPlateau", {"mode": "both"}, 0),
    ("ReduceLROnPlateau", {"threshold_mode": "both"}, 0),
    ("ReduceLROnPlateau", {"min_lr": [0.1, 0.1]}, 0),
]


@pytest.mark.parametrize(("name", "kwargs", "steps"), REFUSED, ids=readable)
def test_refuses_what_torch_refuses_in_its_words(name, kwargs, steps):
    refusals = []
    for module in (ours, theirs):
        run(module, name, kwargs, steps - 1) if steps else None
        with pytest.raises((ValueError, TypeError, KeyError)) as info:
            run(module, name, kwargs, steps)
        refusals.append((info.type, str(info.value)))
    assert refusals[0] == refusals[1]


@pytest.mark.parametrize("row", {row[0]: row for row in [*ROWS, ("ReduceLROnPlateau", {}, 0)]}.values())
def test_refuses_what_is_no_optimizer(row):
    name, kwargs, _ = row
    if "lr_lambda" in kwargs:  # there torch counts the groups first
        kwargs = {"lr_lambda": []}
    with pytest.raises((TypeError, AttributeError), match=r"int is not an Optimizer|'int' object has no attribute"):
        getattr(ours, name)(3, **kwargs)


@pytest.mark.parametrize(("T_0", "T_mult"), [(0, 2), (-1, 1), (3, 0)])
def test_warm_restarts_need_a_cycle(T_0, T_mult):
    with pytest.raises(ValueError, match=f"got T_0={T_0}, T_mult={T_mult}"):
        curves.warm_restarts(5, T_0, T_mult)


def test_unknown_strategy():
    with pytest.raises(ValueError, match="strategy must be 'cos' or 'linear', got 'cubic'"):
        curves.anneal(0.0, 1.0, 0.5, "cubic")
