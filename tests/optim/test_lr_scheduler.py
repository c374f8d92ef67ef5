"""The schedules against torch's: one row per configuration, and properties that hold for every row."""

import copy
import inspect
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.optim.lr_scheduler as theirs

import torch_bp.optim.lr_scheduler as ours
from tests.optim.table import readable


def lambda_1(t):
    return 1 / (1 + t)


def lambda_2(t):
    return 0.9 if t % 3 else 0.5


# A row: the class, its arguments, and the steps to take, past the end where there is one.
ROWS = [
    ("StepLR", {"step_size": 3}, 12),
    ("MultiStepLR", {"milestones": [2, 5, 5, 9], "gamma": 0.5}, 12),
    ("ConstantLR", {}, 9),
    ("LinearLR", {}, 9),
    ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 6}, 10),
    ("ExponentialLR", {"gamma": 0.9}, 30),
    ("ExponentialLR", {"gamma": 0.1}, 400),
    ("CosineAnnealingLR", {"T_max": 10}, 45),
    ("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.002}, 45),
    ("CosineAnnealingWarmRestarts", {"T_0": 4}, 14),
    ("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2, "eta_min": 0.002}, 50),
    ("PolynomialLR", {"total_iters": 9, "power": 2.0}, 14),
    ("LambdaLR", {"lr_lambda": lambda_1}, 12),
    ("LambdaLR", {"lr_lambda": [lambda_1, lambda_2]}, 12),
    ("MultiplicativeLR", {"lr_lambda": lambda_2}, 12),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 3, "step_size_down": 5}, 30),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": [0.5, 0.2], "step_size_up": 4, "mode": "triangular2"}, 30),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.5, "mode": "exp_range", "gamma": 0.9, "cycle_momentum": False}, 30),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 20}, 20),
    ("OneCycleLR", {"max_lr": [0.5, 0.2], "epochs": 4, "steps_per_epoch": 5, "anneal_strategy": "linear"}, 20),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 20, "three_phase": True, "max_momentum": [0.9, 0.8]}, 20),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 9, "cycle_momentum": False, "div_factor": 3.0}, 9),
    ("ReduceLROnPlateau", {"patience": 0, "factor": 0.5, "cooldown": 2, "min_lr": [0.01, 0.001]}, 30),
    ("ReduceLROnPlateau", {"mode": "max", "patience": 1, "threshold": 0.1, "threshold_mode": "abs"}, 30),
]
METRICS = [1.0, 0.9, 0.95, math.nan, 0.91, 0.5, 0.5, 0.49999, 1.2, 1.3, 1.25, 0.4, math.inf, 0.39, 0.45]
GROUP_KEYS = ("lr", "momentum", "betas", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
# The first row of each class, and of each that a composer takes.
FIRST = {name: (name, kwargs) for name, kwargs, _ in reversed(ROWS)}
PARTS = [row for name, row in FIRST.items() if name != "ReduceLROnPlateau"]
# The orders of constructing (c), loading the schedule's state (s) and loading the optimizer's (o).
ORDERS = ["cso", "cos", "ocs", "cs"]


every_row = pytest.mark.parametrize(("name", "kwargs", "steps"), ROWS, ids=readable)
every_class = pytest.mark.parametrize(("name", "kwargs"), FIRST.values(), ids=FIRST)


def optimizer(kind=torch.optim.SGD, tensor=False, lrs=(0.1, 0.03)):
    lrs = [torch.tensor(lr, dtype=torch.float64) if tensor else lr for lr in lrs]
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {"betas": (0.8, 0.99)}
    return kind([{"params": [torch.zeros(1)], "lr": lr} for lr in lrs], lr=0.1, **options)


def build(module, opt, name, kwargs, **more):
    schedule = getattr(module, name)(opt, **copy.deepcopy(kwargs), **more)
    opt.step()  # before the first step of a schedule, as torch wants it
    return schedule


def advance(schedule, steps=1):
    plateau = isinstance(schedule, theirs.ReduceLROnPlateau)
    for _ in range(steps):
        schedule.step(*([METRICS[schedule.last_epoch % len(METRICS)]] if plateau else []))
    return schedule


def values(opt):
    found = [group[key] for group in opt.param_groups for key in GROUP_KEYS if key in group]
    return [float(x) for value in found for x in (value if isinstance(value, tuple) else [value])]


def same(got, expected):
    return len(got) == len(expected) and all(
        math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-16) for x, y in zip(got, expected)
    )


def assert_twins(mine, other, steps=0):
    """Two schedules agree, now and for some steps."""
    for step in range(steps + 1):
        if step:
            advance(mine)
            advance(other)
        got, expected = values(mine.optimizer), values(other.optimizer)
        assert same(got, expected), (step, got, expected)
        assert same(mine.get_last_lr(), other.get_last_lr())


def twins(name, kwargs, **more):
    return [build(module, optimizer(**more), name, kwargs) for module in (ours, theirs)]


def saved(schedule):
    """The states of the optimizer and of the schedule, through a file."""
    buffer = io.BytesIO()
    torch.save((schedule.optimizer.state_dict(), schedule.state_dict()), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(make, states, order):
    """`make(optimizer)` gives the schedule; without the optimizer's state the fresh optimizer has other rates."""
    opt = optimizer(lrs=(0.1, 0.03) if "o" in order else (7.0, 5.0))
    for letter in order:
        if letter == "c":
            schedule = make(opt)
        elif letter == "s":
            schedule.load_state_dict(copy.deepcopy(states[1]))
        else:
            opt.load_state_dict(copy.deepcopy(states[0]))
    opt.step()
    return schedule


@every_row
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_equals_torch_over_the_run_and_past_its_end(name, kwargs, steps, kind):
    mine, other = twins(name, kwargs, kind=kind)
    assert isinstance(mine, getattr(theirs, name))
    assert_twins(mine, other, steps)


@every_row
def test_a_rate_changed_from_outside_moves_as_in_torch(name, kwargs, steps):
    mine, other = twins(name, kwargs)
    for i in range(min(steps, 20)):
        for schedule in (mine, other):
            advance(schedule, max(steps // 20, 1))
            schedule.optimizer.param_groups[i % 2]["lr"] = 0.2 + 0.01 * i
        assert_twins(mine, other)


@every_row
def test_a_tensor_rate_is_written_in_place(name, kwargs, steps):
    mine, other = twins(name, kwargs, tensor=True)
    group = mine.optimizer.param_groups[0]
    rate, state = group["lr"], mine.state_dict()
    assert_twins(mine, other, min(steps, 25))
    held = [*mine.get_last_lr(), *getattr(mine, "base_lrs", []), group.get("initial_lr")]
    assert group["lr"] is rate
    assert all(value is not rate for value in held)
    mine.load_state_dict(state)
    assert group["lr"] is rate
    assert_twins(mine, build(theirs, optimizer(tensor=True), name, kwargs))


@every_row
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_step_to_an_epoch(name, kwargs, steps):
    mine, other = twins(name, kwargs)
    for epoch in (2, None, 0, 3, None, steps, 0, None):
        if epoch is None and mine.last_epoch >= steps:
            continue
        for schedule in (mine, other):
            metric = [0.5] if name == "ReduceLROnPlateau" else []
            schedule.step(*metric, *([epoch] if epoch is not None else []))
        assert_twins(mine, other)


@pytest.mark.parametrize(("name", "kwargs", "steps"), [row for row in ROWS if row[0] != "ReduceLROnPlateau"])
def test_constructed_with_last_epoch(name, kwargs, steps):
    for k in range(min(steps, 10)):
        mine, other = twins(name, kwargs)
        advance(other, k + 1 if "T_mult" in kwargs else k)
        mine = build(ours, advance(mine, k).optimizer, name, kwargs, last_epoch=k)
        if "T_mult" not in kwargs:  # there torch begins in a wrong cycle; its uninterrupted run is right
            other = build(theirs, other.optimizer, name, kwargs, last_epoch=k)
        assert_twins(mine, other, min(steps - k - 1, 5))


@every_row
def test_states_load_both_ways(name, kwargs, steps):
    mine, other = twins(name, kwargs)
    assert set(mine.state_dict()) - set(other.state_dict()) == {"_param_groups"}
    assert set(other.state_dict()) <= set(mine.state_dict())
    for (source, target), k in itertools.product([(ours, theirs), (theirs, ours)], [0, 1, min(steps // 2, 25)]):
        first = advance(build(source, optimizer(), name, kwargs), k)
        second = resumed(lambda opt, to=target: build(to, opt, name, kwargs), saved(first), "cos")
        assert_twins(second, first, min(steps - k, 5))
        # torch has no such entry, or passes on an old one of ours
        third = resumed(lambda opt: build(ours, opt, name, kwargs), saved((first, second)[source is ours]), "ocs")
        assert_twins(third, first)


@every_row
@pytest.mark.parametrize("order", ORDERS)
def test_resumes_in_every_order(name, kwargs, steps, order):
    for k in (0, 1, min(steps // 2, 25), min(steps, 45)):
        schedule = advance(build(ours, optimizer(), name, kwargs), k)
        again = resumed(lambda opt: build(ours, opt, name, kwargs), saved(schedule), order)
        assert_twins(again, schedule, min(steps - k, 5))


@pytest.mark.parametrize("name", ["ConstantLR", "LinearLR", "CosineAnnealingWarmRestarts", "OneCycleLR"])
def test_torch_resumes_with_a_wrong_rate_where_we_load(name):
    """If torch mends this, writing the rates in load_state_dict can go."""
    schedule = advance(build(theirs, optimizer(), *FIRST[name]), 6)
    again = resumed(lambda opt: build(theirs, opt, *FIRST[name]), saved(schedule), "ocs")
    assert not same(values(again.optimizer), values(schedule.optimizer))


def test_a_state_overrules_the_constructor_and_may_have_more_groups():
    schedule = advance(build(ours, optimizer(), *FIRST["OneCycleLR"]), 5)
    other = pytest.warns(UserWarning, match=r"run of 20 steps \(total_steps\), the schedule was constructed for 7")
    with other:
        again = resumed(lambda opt: ours.OneCycleLR(opt, 0.1, total_steps=7), saved(schedule), "cs")
    assert_twins(again, schedule, 10)
    alone = ours.OneCycleLR(optimizer(lrs=(0.1,)), 0.1, total_steps=7)
    with other:
        alone.load_state_dict(schedule.state_dict())
    assert advance(alone).get_last_lr() == advance(schedule).get_last_lr()[:1]


def composed(module, kind, *rows, milestones=()):
    def make(opt):
        parts = [row(opt) if callable(row) else build(module, opt, *row) for row in rows]
        return getattr(module, kind)(*((opt, parts, [*milestones]) if milestones else (parts,)))

    return make


def composites(module):
    chained, sequential = (module, "ChainedScheduler"), (module, "SequentialLR")
    step, constant, linear = FIRST["StepLR"], FIRST["ConstantLR"], FIRST["LinearLR"]
    warm, one_cycle = FIRST["CosineAnnealingWarmRestarts"], FIRST["OneCycleLR"]
    polynomial = ("PolynomialLR", {"total_iters": 9})
    nested = composed(*chained, constant, FIRST["ExponentialLR"])
    return [
        composed(*chained, linear, step, polynomial),
        composed(*sequential, linear, one_cycle, milestones=[3]),
        composed(*sequential, one_cycle, step, milestones=[6]),
        composed(*sequential, constant, warm, polynomial, milestones=[3, 7]),
        composed(*sequential, nested, warm, milestones=[4]),
        composed(*chained, composed(*sequential, linear, step, milestones=[3]), polynomial),
    ]


@pytest.mark.parametrize("which", range(6))
def test_composers_nest_and_resume(which):
    if which != 4:  # a composite in a sequence, which torch begins a step late: see test_composite.py
        assert_twins(*(composites(module)[which](optimizer()) for module in (ours, theirs)), 12)
    for order, k in itertools.product(ORDERS, range(9)):
        schedule = advance(composites(ours)[which](optimizer()), k)
        assert_twins(resumed(composites(ours)[which], saved(schedule), order), schedule, 3)
        if order == "cos" or order == "ocs":  # torch is right, or ours writes the rates
            schedule = advance(composites(theirs)[which](optimizer()), k)
            assert_twins(resumed(composites(ours)[which], saved(schedule), order), schedule, 3)


@pytest.mark.parametrize("first", PARTS, ids=lambda row: row[0])
def test_pairs_as_in_torch(first):
    for second in PARTS:
        for kind, milestones in (("ChainedScheduler", ()), ("SequentialLR", (4,))):
            pair = (composed(m, kind, first, second, milestones=milestones)(optimizer()) for m in (ours, theirs))
            assert_twins(*pair, 12)


@every_class
def test_groups_added_later_join(name, kwargs):
    mine, other = (advance(schedule, 2) for schedule in twins(name, kwargs))
    for schedule in (mine, other):
        schedule.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.5})
        schedule.min_lrs, schedule.default_min_lr = [0.0] * 3, 0.0  # as torch's ReduceLROnPlateau asks
    if name in ("LambdaLR", "MultiplicativeLR", "CyclicLR"):  # one function, or one pair of bounds, for all groups
        advance(mine)
        first, *_, added = mine.optimizer.param_groups
        expected = {"LambdaLR": 0.5 * lambda_1(3), "MultiplicativeLR": 0.5 * lambda_2(3), "CyclicLR": first["lr"]}
        assert math.isclose(added["lr"], expected[name])
    alone = ("OneCycleLR", "CosineAnnealingWarmRestarts", "LambdaLR", "MultiplicativeLR", "CyclicLR")
    for _ in range(0 if name in alone else 8):  # torch goes on with these
        assert same(advance(mine).get_last_lr(), advance(other).get_last_lr())
    least = -1 if name == "PolynomialLR" else 0
    assert all(least < advance(mine).get_last_lr()[2] <= 1.5 for _ in range(10))
    if name not in ("OneCycleLR", "ReduceLROnPlateau", "CyclicLR"):
        assert mine.optimizer.param_groups[2]["initial_lr"] == mine.base_lrs[2] == 0.5


@every_class
def test_pickle_and_deepcopy(name, kwargs):
    schedule = advance(build(ours, optimizer(), name, kwargs), 3)
    for again in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert again.optimizer is not schedule.optimizer
        assert_twins(advance(again), advance(copy.deepcopy(schedule)), 5)


@every_class
def test_jsonargparse_builds_it_from_text(name, kwargs):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(ours, name), "schedule", skip={"optimizer"})
    chosen = parser.parse_object({"schedule": kwargs}).schedule
    assert_twins(build(ours, optimizer(), name, vars(chosen)), build(theirs, optimizer(), name, kwargs), 5)


@pytest.mark.parametrize("module", [ours, theirs])
def test_a_step_before_the_optimizers_warns(module):
    schedule = module.StepLR(optimizer(), 3)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()


def test_every_schedule_of_torchs_is_ours():
    for name in set(theirs.__all__) - {"LRScheduler"}:
        assert getattr(ours, name).__module__.startswith("torch_bp.")
        assert name in FIRST or name in ("SequentialLR", "ChainedScheduler")
    assert ours.LRScheduler is theirs.LRScheduler  # the base class that user code tests for


@pytest.mark.parametrize("name", ["LambdaLR", "MultiplicativeLR", "CyclicLR"])
def test_a_group_added_later_needs_its_own_where_the_groups_differ(name):
    kwargs = {"max_lr": [0.5, 0.2], "base_lr": 0.1} if name == "CyclicLR" else {"lr_lambda": [lambda_1, lambda_2]}
    schedule = advance(build(ours, optimizer(), name, kwargs), 2)
    schedule.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.5})
    values = "max_lrs" if name == "CyclicLR" else "lr_lambdas"
    with pytest.raises(ValueError, match=f"{name}: {values} must have a value for each of 3 parameter groups, got 2"):
        advance(schedule)
    getattr(schedule, values).append(0.3 if name == "CyclicLR" else lambda_1)
    assert len(advance(schedule).get_last_lr()) == 3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("three_phase", [False, True])
def test_a_group_added_later_goes_on_in_one_cycle_as_if_it_had_been_there(kind, tensor, three_phase):
    kwargs = {"max_lr": [0.5, 0.2], "total_steps": 12, "div_factor": 7.0, "three_phase": three_phase}
    schedule = advance(build(ours, optimizer(kind, tensor), "OneCycleLR", kwargs), 3)
    rate = torch.tensor(0.3, dtype=torch.float64) if tensor else 0.3
    schedule.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": rate})
    kwargs["max_lr"] = [0.5, 0.2, 0.3]
    fresh = build(ours, optimizer(kind, tensor, (0.1, 0.1, 0.1)), "OneCycleLR", kwargs)
    assert_twins(advance(schedule), advance(fresh, 4), 8)
    assert not any(isinstance(schedule.optimizer.param_groups[2][key], torch.Tensor) for key in ("max_lr", "min_lr"))
    assert (schedule.optimizer.param_groups[2]["lr"] is rate) == tensor


def test_what_a_group_added_later_brings_for_its_cycle_stays():
    schedule = advance(build(ours, optimizer(), "OneCycleLR", {"max_lr": [0.0, 0.5], "total_steps": 9}), 2)
    group = {"params": [torch.zeros(1)], "lr": 0.3, "max_lr": 0.4, "base_momentum": 0.5}
    schedule.optimizer.add_param_group(group)
    added = advance(schedule).optimizer.param_groups[2]
    assert (added["max_lr"], added["base_momentum"], added["max_momentum"]) == (0.4, 0.5, 0.95)
    assert same([added["initial_lr"], added["min_lr"]], [0.4 / 25, 0.4 / 25 / 1e4])


@pytest.mark.parametrize("kwargs", [{"max_lr": 0.0}, {"max_lr": 0.5, "base_momentum": [0.8, 0.7]}])
def test_a_group_added_later_must_bring_what_the_others_do_not_tell(kwargs):
    schedule = advance(build(ours, optimizer(), "OneCycleLR", kwargs | {"total_steps": 9}), 2)
    schedule.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.5})
    with pytest.raises(KeyError, match=r"param_groups\[2\] must have .*'base_momentum'\), got .*without.*Pass"):
        advance(schedule)
    schedule.optimizer.param_groups[2] |= {"max_lr": 0.5, "initial_lr": 0.1, "min_lr": 0.0}
    schedule.optimizer.param_groups[2] |= {"base_momentum": 0.8, "max_momentum": 0.9}
    advance(schedule)


class Halving:
    """A function with a state, which is saved."""

    def __init__(self, power=1):
        self.power = power

    def __call__(self, t):
        return 0.5 ** (self.power * t)


LATE = dict(FIRST.values()) | {
    "LambdaLR": {"lr_lambda": Halving()},
    "MultiplicativeLR": {"lr_lambda": Halving()},
    "ReduceLROnPlateau": {"patience": 0, "factor": 0.5},
}


@pytest.mark.parametrize("stepped", [0, 2], ids=["before", "after"])
@pytest.mark.parametrize("order", ["aso", "aos", "as", "sao"])
@pytest.mark.parametrize("name", LATE)
def test_a_state_with_a_group_added_later_loads_before_a_step(name, order, stepped):
    """Added (a), the schedule's state (s) and the optimizer's (o) loaded; saved before and after it took steps."""

    def make(*lrs):
        return build(ours, optimizer(lrs=lrs), name, copy.deepcopy(LATE[name]))

    schedule = advance(make(0.1, 0.03), 3)
    schedule.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.5})
    opt_state, state = saved(advance(schedule, stepped))
    again = make(7.0, 5.0)
    for letter in order:
        if letter == "a":
            again.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 3.0})
        elif letter == "s":
            again.load_state_dict(state)
        else:
            again.optimizer.load_state_dict(opt_state)
    if not stepped:  # the momentum of the group begins with the loading
        advance(again)
        advance(schedule)
    assert_twins(again, schedule, 3)


@pytest.mark.parametrize("name", ["LambdaLR", "MultiplicativeLR"])
def test_functions_of_groups_that_differ_are_appended_before_loading(name):
    schedule = build(ours, optimizer(), name, {"lr_lambda": [Halving(1), Halving(2)]})
    schedule.optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.5})
    schedule.lr_lambdas.append(Halving(3))
    state = saved(advance(schedule))[1]
    again = build(ours, schedule.optimizer, name, {"lr_lambda": [Halving(i) for i in (4, 5, 6)]})
    again.load_state_dict(state)
    assert [function.power for function in again.lr_lambdas] == [1, 2, 3]
    again = build(ours, optimizer(), name, {"lr_lambda": [Halving(4), Halving(5)]})
    with pytest.raises(ValueError, match=f"{name}: lr_lambdas must have a value for each of 3 parameter groups, got 2"):
        again.load_state_dict(state)
    again.lr_lambdas.append(Halving())
    again.load_state_dict(state)
    assert again.lr_lambdas[2].power == 3


def test_plateau_takes_last_epoch_as_every_other_schedule_does():
    """Libraries hand it to all but torch's class, which they know by identity."""
    options = {"patience": 0, "factor": 0.5}
    fresh = ours.ReduceLROnPlateau(optimizer(), **options)
    given = ours.ReduceLROnPlateau(optimizer(), **options, last_epoch=-1)
    assert fresh.state_dict() == given.state_dict()
    assert fresh.last_epoch == theirs.ReduceLROnPlateau(optimizer(), **options).last_epoch
    resumed = ours.ReduceLROnPlateau(optimizer(), **options, last_epoch=4)
    assert resumed.last_epoch == 4
    resumed.step(1.0), resumed.step(1.0)
    assert resumed.last_epoch == 6
    assert resumed.get_last_lr() == pytest.approx([0.05, 0.015])
    with pytest.raises(TypeError):
        ours.ReduceLROnPlateau(optimizer(), "min", 0.1, 10, 1e-4, "rel", 0, 0, 1e-8, -1)
    parameters = dict(inspect.signature(ours.ReduceLROnPlateau).parameters)
    parameters.pop("last_epoch")
    expected = inspect.signature(theirs.ReduceLROnPlateau).parameters
    assert [(p.name, p.default, p.kind) for p in parameters.values()] == [
        (p.name, p.default, p.kind) for p in expected.values()
    ]
