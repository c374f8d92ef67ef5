"""Schedules made of schedules: what they do alone, they do as a part of a sequence; warm-up; another length."""

import copy
import pickle

import pytest
import torch
import torch.optim.lr_scheduler as theirs

import torch_bp.optim.lr_scheduler as ours

WAYS = {  # each makes a schedule of an optimizer
    "leaf": lambda o: ours.ExponentialLR(o, 0.5),
    "sequence": lambda o: ours.SequentialLR(o, [ours.ConstantLR(o, 0.5, 2), ours.ConstantLR(o, 0.2, 10)], [2]),
    "chain": lambda o: ours.ChainedScheduler([ours.ConstantLR(o, 0.5, 9), ours.ExponentialLR(o, 0.9)]),
    "chain in sequence": lambda o: ours.SequentialLR(o, [WAYS["leaf"](o), WAYS["chain"](o)], [3]),
    "sequence in sequence": lambda o: ours.SequentialLR(o, [WAYS["chain"](o), WAYS["sequence"](o)], [2]),
    "one cycle": lambda o: ours.OneCycleLR(o, 0.1, total_steps=20, div_factor=1.0),
    "zero": lambda o: ours.SequentialLR(o, [ours.ConstantLR(o, 0.2, 10), WAYS["chain"](o)], [0]),
    "torch's": lambda o: theirs.ChainedScheduler([ours.ConstantLR(o, 0.5, 9), theirs.ExponentialLR(o, 0.9)]),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def rates(make, steps=8, lr=0.1):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr, momentum=0.9)
    schedule = make(optimizer)
    optimizer.step()
    seen = [schedule.get_last_lr()[0]]
    for _ in range(steps):
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
        seen.append(schedule.get_last_lr()[0])
    return seen


@every_way
def test_a_sequence_of_one_changes_nothing(way):
    alone = rates(way)
    for depth in range(1, 4):

        def wrapped(o, depth=depth):
            schedule = way(o)
            for _ in range(depth):
                schedule = ours.SequentialLR(o, [schedule], [])
            return schedule

        assert rates(wrapped) == alone


@every_way
@pytest.mark.parametrize("milestone", [0, 1, 4])
def test_a_part_begins_at_its_milestone(way, milestone):
    def delayed(o):
        first, second = ours.ConstantLR(o, 0.7, 100), way(o)
        return ours.SequentialLR(o, [first, second], [milestone])

    seen = rates(delayed, 12)
    assert seen[:milestone] == [0.7 * 0.1] * milestone
    assert seen[milestone:] == pytest.approx(rates(way, 12 - milestone), rel=1e-14)


@pytest.mark.parametrize("milestones", [[0, 0], [0, 3], [2, 2]])
def test_parts_that_never_run(milestones):
    def make(o):
        return ours.SequentialLR(o, [ours.ConstantLR(o, f, 100) for f in (0.1, 0.2, 0.3)], milestones)

    expected = [0.1 * (0.1, 0.2, 0.3)[sum(t >= m for m in milestones)] for t in range(6)]
    assert rates(make, 5) == pytest.approx(expected)


@every_way
def test_groups_added_later_join(way):
    if way is WAYS["torch's"] or way is WAYS["one cycle"]:
        pytest.skip("torch's part, or one that takes the rate for the peak of its cycle")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    schedule = ours.warmup(way(optimizer), 3, 0.5)
    optimizer.step()
    schedule.step()
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.4 * optimizer.param_groups[0]["lr"] / 0.1})
    optimizer.param_groups[1]["initial_lr"] = 0.4
    for _ in range(8):
        schedule.step()
        first, added = schedule.get_last_lr()
        assert added == pytest.approx(4 * first)


def test_a_chain_is_the_product_of_its_parts():
    parts = [
        lambda o: ours.LinearLR(o, 0.25, total_iters=3),
        lambda o: ours.StepLR(o, 2, 0.5),
        lambda o: ours.CosineAnnealingLR(o, 20),
        lambda o: ours.PolynomialLR(o, 30, 2.0),
    ]
    alone = [rates(part, 10, lr=1.0) for part in parts]
    expected = [torch.tensor(row, dtype=torch.float64).prod().item() for row in zip(*alone)]
    assert rates(lambda o: ours.ChainedScheduler([part(o) for part in parts]), 10, 1.0) == pytest.approx(expected)


def test_torch_begins_a_composite_part_a_step_late():
    """If torch mends this, the rows of test_lr_scheduler.py may all be compared with it."""

    def sequence(module, o):
        parts = [module.ConstantLR(o, 0.5, 2), module.ConstantLR(o, 0.2, 10)]
        return module.SequentialLR(o, parts, [2])

    nested = [rates(lambda o: ours.SequentialLR(o, [sequence(ours, o)], []), 4)]
    with pytest.warns(UserWarning, match="Detected call"):
        nested.append(rates(lambda o: theirs.SequentialLR(o, [sequence(theirs, o)], []), 4))
    alone = pytest.approx([0.05, 0.05, 0.02, 0.02, 0.02])
    assert nested[0] == alone
    assert nested[1] != alone


@every_way
def test_composites_are_schedulers_that_copy_and_load(way):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    schedule = ours.warmup(way(optimizer), 2, 0.5)
    assert isinstance(schedule, theirs.LRScheduler)
    optimizer.step()
    for _ in range(3):
        schedule.step()
    for again in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        expected = copy.deepcopy(schedule)
        for _ in range(6):
            assert again.get_last_lr() == expected.get_last_lr() == [again.optimizer.param_groups[0]["lr"]]
            again.step()
            expected.step()


@every_way
def test_warmup(way):
    for steps in (0, 1, 5):
        seen = rates(lambda o, steps=steps: ours.warmup(way(o), steps, start_factor=0.1), 12)
        rise = [0.1 * (0.1 + 0.9 * t / steps) for t in range(steps)]
        assert seen == pytest.approx(rise + rates(way, 12 - steps), rel=1e-12)


def test_warmup_refuses():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = ours.ExponentialLR(optimizer, 0.9)
    for steps in (-1, 2.5):
        with pytest.raises(ValueError, match=f"steps must be an integer >= 0, got {steps}"):
            ours.warmup(schedule, steps)
    for other in (optimizer, 3):
        with pytest.raises(TypeError, match=f"schedule must be a .* schedule, got {type(other).__name__}"):
            ours.warmup(other, 3)
    with pytest.raises(ValueError, match="Starting multiplicative factor expected"):
        ours.warmup(schedule, 3, 0.0)
    with pytest.raises(ValueError, match="does not support `ReduceLROnPlateau`"):
        ours.warmup(ours.ReduceLROnPlateau(optimizer), 3)
    optimizer.step()
    schedule.step()
    with pytest.raises(RuntimeError, match="schedule must not have taken steps, got one at step 1"):
        ours.warmup(schedule, 3)


LENGTHS = {  # a schedule of a length, as a function of the optimizer and the length
    "ConstantLR": lambda o, n: ours.ConstantLR(o, 0.5, n),
    "LinearLR": lambda o, n: ours.LinearLR(o, 1.0, 0.1, n),
    "PolynomialLR": lambda o, n: ours.PolynomialLR(o, n, 2.0),
    "CosineAnnealingLR": lambda o, n: ours.CosineAnnealingLR(o, n, eta_min=0.01),
    "OneCycleLR": lambda o, n: ours.OneCycleLR(o, 0.3, n, pct_start=0.4),
    "OneCycleLR three": lambda o, n: ours.OneCycleLR(o, 0.3, n, three_phase=True),
    "SequentialLR": lambda o, n: ours.warmup(ours.CosineAnnealingLR(o, n - 2), 2, 0.5),
    "ChainedScheduler": lambda o, n: ours.ChainedScheduler([ours.LinearLR(o, 0.5), ours.PolynomialLR(o, n)]),
    "nested": lambda o, n: ours.warmup(LENGTHS["ChainedScheduler"](o, n - 2), 2, 0.5),
}


@pytest.mark.parametrize("make", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("lengths", [(8, 20), (20, 8)])
def test_rescale_goes_on_as_planned_for_the_new_length(make, lengths):
    old, new = lengths
    for taken in range(8):
        optimizers = [torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9) for _ in range(3)]
        schedule, planned, resumed = (make(o, n) for o, n in zip(optimizers, (old, new, old)))
        for optimizer in optimizers:
            optimizer.step()
        for _ in range(taken):
            schedule.step()
            planned.step()
        schedule.rescale(new)
        with pytest.warns(
            UserWarning, match=rf"run of {new} steps.* constructed for {old}\..*total_steps={old}\)"
        ) as seen:
            resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))  # which carries the new length
        assert len(seen) == 1
        assert seen[0].filename == __file__
        for t in range(taken, new):
            got, expected, again = ((o.param_groups[0]["lr"], o.param_groups[0]["momentum"]) for o in optimizers)
            assert got == pytest.approx(expected, rel=1e-12, abs=1e-16), (taken, t)
            assert again == got
            assert schedule.get_last_lr() == [got[0]]
            if t < new - 1:
                for each in (schedule, planned, resumed):
                    each.step()


def test_rescale_after_the_end_and_of_a_changed_rate():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = ours.CosineAnnealingLR(optimizer, 4)
    optimizer.step()
    for _ in range(4):
        schedule.step()
    assert schedule.get_last_lr() == [0.0]
    schedule.rescale(8)
    assert schedule.get_last_lr() == pytest.approx([0.05])
    optimizer.param_groups[0]["lr"] *= 3
    schedule.rescale(4 * 3)
    assert schedule.get_last_lr() == pytest.approx([3 * 0.1 * 0.75])


def test_rescale_writes_tensor_rates_in_place():
    rate = torch.tensor(0.1, dtype=torch.float64)
    schedule = ours.LinearLR(torch.optim.SGD([torch.zeros(1)], lr=rate), 1.0, 0.0, 4)
    schedule.optimizer.step()
    schedule.step()
    schedule.rescale(2)
    assert schedule.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.05)
    assert schedule.get_last_lr()[0] is not rate


def test_rescale_refuses():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    optimizer.step()
    for make in LENGTHS.values():
        for bad in (0, -3, 2.5, True):
            with pytest.raises(ValueError, match=f"total_steps must be a positive integer, got {bad}"):
                make(optimizer, 9).rescale(bad)
    cycle = LENGTHS["OneCycleLR"](optimizer, 9)
    optimizer.step()
    for _ in range(5):
        cycle.step()
    before = cycle.state_dict()
    with pytest.raises(ValueError, match="total_steps must be at least 5, the steps already taken, got 4"):
        cycle.rescale(4)
    assert cycle.state_dict() == before
    with pytest.raises(ValueError, match="total_steps must be more than 2, the last milestone, got 2"):
        LENGTHS["SequentialLR"](optimizer, 9).rescale(2)
    parts = ours.ChainedScheduler([WAYS["leaf"](optimizer), WAYS["leaf"](optimizer)])
    with pytest.raises(ValueError, match=r"a part must have a length.*got ExponentialLR, ExponentialLR"):
        parts.rescale(9)
    with pytest.raises(ValueError, match=r"the last part must have a length.*got LinearLR, ExponentialLR"):
        ours.warmup(WAYS["leaf"](optimizer), 3).rescale(9)


def test_a_constant_of_no_length_has_no_end_as_a_part_too():
    def sequence(module, o):
        return module.SequentialLR(o, [module.ConstantLR(o, 1.0), module.ConstantLR(o, 0.3, total_iters=0)], [2])

    for module in (ours, theirs):
        assert rates(lambda o, module=module: module.ConstantLR(o, 0.3, total_iters=0), 3) == pytest.approx([0.03] * 4)
    assert rates(lambda o: sequence(ours, o), 4) == pytest.approx([0.1, 0.1, 0.03, 0.03, 0.03])
    assert rates(lambda o: sequence(theirs, o), 4) == pytest.approx([0.1] * 5)


ENDLESS = {
    "StepLR": (lambda o: ours.StepLR(o, 3), "`step_size`"),
    "MultiStepLR": (lambda o: ours.MultiStepLR(o, [3]), "`milestones`"),
    "ExponentialLR": (lambda o: ours.ExponentialLR(o, 0.9), "`gamma`"),
    "MultiplicativeLR": (lambda o: ours.MultiplicativeLR(o, lambda t: 0.9), "new length"),
    "LambdaLR": (lambda o: ours.LambdaLR(o, lambda t: 0.9), "new length"),
    "CyclicLR": (lambda o: ours.CyclicLR(o, 0.1, 0.2), "`total_size`"),
    "CosineAnnealingWarmRestarts": (lambda o: ours.CosineAnnealingWarmRestarts(o, 4), "`T_i`"),
    "ReduceLROnPlateau": (ours.ReduceLROnPlateau, "`patience`"),
}


def test_every_schedule_rescales_or_says_why_not():
    known = {v for v in vars(ours).values() if isinstance(v, type) and issubclass(v, theirs.LRScheduler)}
    known = {kind.__name__ for kind in known if kind.__module__.startswith("torch_bp")}
    assert known == {name.split()[0] for name in LENGTHS if name != "nested"} | ENDLESS.keys()
    for name, (make, remedy) in ENDLESS.items():
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
        schedule = make(optimizer)
        before = schedule.state_dict()
        with pytest.raises(
            ValueError, match=f"^{name}: there is no length for rescale to change: .*{remedy}.* instead"
        ):
            schedule.rescale(9)
        assert schedule.state_dict() == before


@pytest.mark.parametrize("make", LENGTHS.values(), ids=LENGTHS)
def test_to_the_same_length_nothing_changes(make):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    schedule = make(optimizer, 30)
    optimizer.step()
    for _ in range(7):
        schedule.step()
    before = copy.deepcopy((schedule.state_dict(), optimizer.state_dict()))
    schedule.rescale(30)
    assert (schedule.state_dict(), optimizer.state_dict()) == before
