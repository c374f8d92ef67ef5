"""A run that diverges goes back bit for bit, with smaller rates, a few times; a sound run is left alone."""

import copy
import logging
import math
import pickle
import random

import numpy
import pytest
import torch
from torch.optim import lr_scheduler as theirs

import torch_bp
from tests.optim.table import TORCHS
from torch_bp import nn, optim
from torch_bp.optim import lr_scheduler

NAN, INF = math.nan, math.inf
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
Y = X[:, :3].argmax(1)
OURS = {name: getattr(optim, name) for name in (*TORCHS, "Lion")}
THEIRS = {
    f"torch.{name}": getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "ASGD", "Rprop", "Adagrad")
}
OPTIONS = {"SGD": {"momentum": 0.9}, "torch.SGD": {"momentum": 0.9}}
OPTIMIZERS = [(name, made, OPTIONS.get(name, {})) for name, made in {**OURS, **THEIRS}.items()]
OPTIMIZERS += [
    ("torch.Adam fused", torch.optim.Adam, {"fused": True}),
    ("torch.SGD for each", torch.optim.SGD, {"foreach": True}),
]
OPTIMIZERS += [
    ("Adam, tensor rate", optim.Adam, {"lr": torch.tensor(0.01)}),
    ("Adam amsgrad", optim.Adam, {"amsgrad": True}),
]
NAMES = [name for name, *_ in OPTIMIZERS]


def network():
    torch.manual_seed(7)
    return torch.nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def loss_of(model, scale=1.0, rows=slice(None)):
    return scale * nn.functional.cross_entropy(model(X[rows]), Y[rows])


def everything(model, *objects):
    """Copies of all that a run goes on from, but for the snapshots."""
    return copy.deepcopy([dict(model.state_dict()), *(each.state_dict() for each in objects)])


def same(a, b):
    """Whether two nests of containers hold the same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def run(model, optimizer, guard, scales):
    """Train; return what `guard.step` has."""
    done = []
    for scale in scales:
        optimizer.zero_grad()
        loss = loss_of(model, scale)
        loss.backward()
        done.append(guard.step(loss))
    return done


class Order:
    """Data that know their position."""

    def __init__(self, seed=0):
        self.generator, self.place = torch.Generator().manual_seed(seed), 0

    def __next__(self):
        self.place += 1
        return torch.randint(64, (16,), generator=self.generator)

    def state_dict(self):
        return {"place": self.place, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.place = state["place"]
        self.generator.set_state(state["generator"])


@pytest.mark.parametrize(("name", "made", "options"), OPTIMIZERS, ids=NAMES)
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_the_bad_step_changes_nothing_and_the_snapshot_comes_back(name, made, options, bad):
    model = network()
    optimizer = made(model.parameters(), **{"lr": 0.01} | options)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=3, trust=2, factor=1.0)
    run(model, optimizer, guard, [1.0] * 3)
    good = everything(model, optimizer)  # as it was when the snapshot was taken, after three steps
    run(model, optimizer, guard, [1.0] * 2)
    before = everything(model, optimizer)
    optimizer.zero_grad()
    loss = loss_of(model, NAN if bad == "loss" else 1.0)
    loss.backward()
    if bad == "gradient":
        model[0].weight.grad[1, 2] = INF
    states = []
    guard._go_back, back = lambda found: (states.append(everything(model, optimizer)), back(found)), guard._go_back
    assert guard.step(loss) is False
    names = [n for n, _ in model.named_parameters()]
    assert same([states[0][0][n] for n in names], [before[0][n] for n in names])
    assert same(states[0][1], before[1])
    assert same(everything(model, optimizer), good)
    assert [(e.step, e.reason, e.action, e.back_to) for e in guard.events] == [(6, bad, "rollback", 3)]
    assert all(p.grad is None for p in model.parameters())
    assert run(model, optimizer, guard, [1.0] * 4) == [True] * 4
    assert not same(everything(model, optimizer), good)


@pytest.mark.parametrize(("name", "made", "options"), OPTIMIZERS, ids=NAMES)
def test_a_run_that_goes_back_repeats_itself(name, made, options):
    """Bit for bit, with dropout, data, schedules by step and by plateau, and all random numbers."""
    ends = []
    for bad in ((), (9,)):
        torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
        model, data = network(), Order()
        optimizer = made(model.parameters(), **{"lr": 0.01} | copy.deepcopy(options))
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, 20)
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
        guard = torch_bp.DivergenceGuard(
            model, optimizer, scheduler=[schedule, plateau], data=data, factor=1.0, every=2, keep=4, trust=3
        )
        number = 0
        while data.place < 14:
            rows, number = next(data), number + 1
            optimizer.zero_grad()
            loss = loss_of(model, 1 + 0.1 * random.random() + 0.1 * numpy.random.rand(), rows)
            loss.backward()
            guard.step(loss * NAN if number in bad else loss)
            schedule.step()
            plateau.step(loss.item())
        assert [e.back_to for e in guard.events] == [4] * len(bad)
        randomly = [random.random(), numpy.random.rand(), torch.rand(3)]
        ends.append([everything(model, optimizer, schedule, plateau, data), randomly, number])
    assert same(ends[0][:2], ends[1][:2])
    assert ends[1][2] == ends[0][2] + 5  # steps 5 to 8 were made twice, and the bad one


def test_memory_is_used_again():
    model = network()
    optimizer = optim.Adam(model.parameters())
    guard = torch_bp.DivergenceGuard(model, optimizer, every=2, keep=2, trust=1)
    run(model, optimizer, guard, [1.0] * 6)
    places = {b.data_ptr() for slot in guard._ring._slots for b in slot.snapshot._buffers.values()}
    sizes = guard.memory()
    run(model, optimizer, guard, [1.0] * 9)
    run(model, optimizer, guard, [NAN])
    run(model, optimizer, guard, [1.0] * 9)
    snapshots = [s.snapshot for s in guard._ring._slots] + guard._ring._free
    assert {b.data_ptr() for snapshot in snapshots for b in snapshot._buffers.values()} == places
    assert guard.memory() == sizes
    parameters = sum(p.numel() for p in model.parameters())
    numbers = 4 * 3 * parameters  # with two moments
    assert 2 * numbers <= sizes["cpu"] <= 2 * (numbers + 8 * 40 + 6000)


@pytest.mark.parametrize("storage", ["device", "cpu"])
def test_storage(storage):
    model = network()
    optimizer = optim.Adam(model.parameters())
    guard = torch_bp.DivergenceGuard(model, optimizer, storage=storage)
    before = everything(model)
    run(model, optimizer, guard, [1.0, NAN])
    assert list(guard.memory()) == ["cpu"]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[0][name])


SCHEDULES = {
    "StepLR": {"step_size": 3, "gamma": 0.5},
    "MultiStepLR": {"milestones": [2, 5], "gamma": 0.5},
    "ConstantLR": {"factor": 0.3, "total_iters": 6},
    "LinearLR": {"start_factor": 0.2, "total_iters": 9},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 30, "power": 2},
    "CosineAnnealingLR": {"T_max": 7, "eta_min": 0.01},
    "MultiplicativeLR": {"lr_lambda": lambda t: 0.95},
    "LambdaLR": {"lr_lambda": lambda t: 1 / (1 + t)},
    "CosineAnnealingWarmRestarts": {"T_0": 5, "eta_min": 0.01},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 40, "cycle_momentum": False},
}


def make_schedule(module, name, optimizer):
    if name == "sequence":
        parts = [make_schedule(module, each, optimizer) for each in ("LinearLR", "CosineAnnealingLR")]
        return module.SequentialLR(optimizer, parts, milestones=[10])
    if name == "chain":
        return module.ChainedScheduler(
            [make_schedule(module, each, optimizer) for each in ("ConstantLR", "ExponentialLR")]
        )
    return getattr(module, name)(optimizer, **SCHEDULES[name])


@pytest.mark.parametrize("name", [*SCHEDULES, "sequence", "chain"])
@pytest.mark.parametrize("module", [theirs, lr_scheduler], ids=["torch", "torch_bp"])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
def test_the_cut_stays_in_every_schedule(name, module, rate):
    """After going back the rates are half of those of a run without a guard, to the end."""
    if name in ("CyclicLR", "OneCycleLR") and isinstance(rate, torch.Tensor):
        pytest.skip("of their own rates")
    curves = []
    for factor in (None, 0.5):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=copy.deepcopy(rate))
        schedule = make_schedule(module, name, optimizer)
        guard = torch_bp.DivergenceGuard(
            model, optimizer, scheduler=schedule, factor=factor or 1.0, every=2, trust=1, spike=None, rise=None
        )
        rates = []
        for number in range(28):
            if number == 5 and factor is None:
                continue  # the others go back from here to the end of the step before
            run(model, optimizer, guard, [NAN if number == 5 else 1.0])
            schedule.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
        curves.append(rates)
    whole, halved = curves
    assert halved[:5] == whole[:5]
    assert guard.events[0].back_to == 4  # at its end, the schedule was not stepped yet
    assert halved[5:] == pytest.approx([rate / 2 for rate in whole[3:26]])


def test_no_schedule_and_several_groups():
    model = network()
    optimizer = optim.SGD([{"params": model[0].parameters()}, {"params": model[4].parameters(), "lr": 0.02}], lr=0.1)
    guard = torch_bp.DivergenceGuard(model, optimizer, factor=0.1)
    run(model, optimizer, guard, [1.0, NAN, 1.0])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.002])
    assert guard.events[0].factor == pytest.approx(0.1)


def test_rates_come_back():
    """With a schedule that knows nothing of it."""
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
    guard = torch_bp.DivergenceGuard(model, optimizer, scheduler=schedule, factor=0.5, cooldown=4)
    for number in range(9):
        run(model, optimizer, guard, [NAN if number == 1 else 1.0])
        schedule.step()
        # one step back in the schedule, and one more to go
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9 ** (number if number else 1))
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 0


def test_the_update_is_made_with_the_rate_that_comes_back():
    weight = torch.nn.Parameter(torch.zeros(1))
    model = torch.nn.Module()
    model.weight = weight
    for lr in (1.0, torch.tensor(1.0)):
        optimizer = torch.optim.SGD([weight], lr=lr)
        guard = torch_bp.DivergenceGuard(model, optimizer, factor=0.5, cooldown=4, spike=None, rise=None)
        moves = []
        for number in range(8):
            before = weight.item()
            weight.grad = torch.ones(1)
            guard.step(torch.tensor(NAN if number == 1 else 1.0))
            moves.append(before - weight.item())
            assert float(optimizer.param_groups[0]["lr"]) == 1.0
        assert moves[2:] == [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]


def test_retries_and_the_end():
    model = network()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=2, trust=1, retries=2, factor=0.5)
    run(model, optimizer, guard, [1.0] * 3)
    assert run(model, optimizer, guard, [1.0, NAN, 1.0, NAN]) == [True, False, True, False]
    good = everything(model)
    with pytest.raises(torch_bp.DivergenceError, match="within 2 retries") as caught:
        run(model, optimizer, guard, [INF])
    assert [e.action for e in guard.events] == ["rollback", "rollback", "stop"]
    assert [e.back_to for e in guard.events] == [2, 0, 0]  # from where it failed again it goes further back
    assert [e.factor for e in guard.events] == [0.5, 0.25, 0.25]
    assert caught.value.events == guard.events
    assert "step 8: the loss is inf, not finite; went back to step 0, and no retries are left" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), list(map(str, again.events))) == (str(caught.value), list(map(str, guard.events)))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    names = [n for n, _ in model.named_parameters()]
    assert same([model.state_dict()[n] for n in names], [good[0][n] for n in names])


def test_retries_begin_anew_past_the_failure():
    model = network()
    optimizer = optim.Adam(model.parameters())
    guard = torch_bp.DivergenceGuard(model, optimizer, every=2, trust=1, retries=1, factor=0.5)
    for _ in range(4):
        run(model, optimizer, guard, [1.0] * 9 + [NAN])
    assert [e.action for e in guard.events] == ["rollback"] * 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 16)


def test_no_retries():
    model = network()
    optimizer = optim.Adam(model.parameters())
    guard = torch_bp.DivergenceGuard(model, optimizer, retries=0)
    with pytest.raises(torch_bp.DivergenceError):
        run(model, optimizer, guard, [NAN])
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(("followed", "back_to"), [(3, 0), (4, 5)])
def test_a_snapshot_must_be_trusted(followed, back_to):
    model = network()
    optimizer = optim.Adam(model.parameters())
    guard = torch_bp.DivergenceGuard(model, optimizer, every=5, keep=3, trust=4)
    run(model, optimizer, guard, [1.0] * (5 + followed) + [NAN])
    assert [e.back_to for e in guard.events] == [back_to]


def spiky(spikes):
    return [6.0 * 20 if n in spikes else 1.0 for n in range(60)]


def test_spikes_are_left_out_and_two_go_back():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=10, trust=5)
    done = run(model, optimizer, guard, spiky({30}))
    assert [n for n, each in enumerate(done) if not each] == [30]
    assert [(e.action, e.reason) for e in guard.events] == [("skip", "spike")]
    assert optimizer.param_groups[0]["lr"] == 1e-3
    guard.events.clear()
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=10, trust=5)
    done = run(model, optimizer, guard, spiky({37, 38}))
    assert [n for n, each in enumerate(done) if not each] == [37, 38]
    assert [(e.action, e.back_to) for e in guard.events] == [("skip", None), ("rollback", 30)]
    assert guard.events[1].number > guard.events[1].threshold


def test_a_rise_goes_back_to_before_it():
    weight = torch.nn.Parameter(torch.zeros(1))
    model = torch.nn.Module()
    model.weight = weight
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=50, keep=8, trust=50)
    torch.manual_seed(0)
    for number in range(900):
        weight.grad = torch.full((1,), -1.0)  # it counts steps
        level = max(0.2, 2 - number / 100) + max(0, number - 400) / 100
        guard.step(torch.tensor(level) + 0.02 * torch.randn(()))
        if guard.events:
            break
    event = guard.events[0]
    assert (event.reason, event.action) == ("rise", "rollback")
    assert 450 < event.step < 620
    assert event.back_to == weight.item()
    assert 150 <= event.back_to <= 420


@pytest.mark.parametrize("seed", range(24))
def test_real_runs_are_left_alone(seed):
    """Small networks of many kinds, with rates that work."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    name = draw.choice(["SGD", "Adam", "AdamW", "RMSprop", "Lion"])
    lr = {"SGD": 0.05, "Adam": 3e-3, "AdamW": 3e-3, "RMSprop": 1e-3, "Lion": 3e-4}[name]
    x, width = torch.randn(512, 10), draw.choice([8, 32])
    model = nn.MLP([10, width, width, 1 if seed % 2 else 4])
    y = (x[:, :1] * x[:, 1:2] + 0.1 * torch.randn(512, 1)) if seed % 2 else x[:, :4].argmax(1)
    loss_fn = nn.MSELoss() if seed % 2 else nn.CrossEntropyLoss()
    optimizer = getattr(optim, name)(model.parameters(), lr=lr)
    guard = torch_bp.DivergenceGuard(model, optimizer)
    size = draw.choice([4, 16, 64])
    for _ in range(500):
        rows = torch.randint(512, (size,))
        optimizer.zero_grad()
        loss = loss_fn(model(x[rows]), y[rows])
        loss.backward()
        guard.step(loss)
    assert [e for e in guard.events if e.action == "rollback"] == []
    assert len(guard.events) <= 2


@pytest.mark.parametrize(("name", "lr"), [("SGD", 3.0), ("Adam", 3.0), ("RMSprop", 3.0)])
def test_a_schedule_to_a_rate_that_is_too_large(name, lr):
    """Without the guard the run is lost; with it, it learns."""
    lost = {}
    for guarded in (False, True):
        torch.manual_seed(0)
        x = torch.randn(512, 10)
        y = x @ torch.randn(10, 1) + x[:, :1] ** 2
        model = nn.MLP([10, 32, 1])
        optimizer = getattr(optim, name)(model.parameters(), lr=lr)
        schedule = lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, total_iters=400)
        guard = torch_bp.DivergenceGuard(model, optimizer, scheduler=schedule, retries=20, every=20, trust=20)
        losses = []
        for _ in range(1500):
            rows = torch.randint(512, (32,))
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            loss.backward()
            guard.step(loss) if guarded else optimizer.step()
            schedule.step()
            losses.append(loss.item())
        lost[guarded] = not sum(losses[-50:]) / 50 < y.var() / 2
    assert lost == {False: True, True: False}
    assert any(e.action == "rollback" for e in guard.events)


def test_it_is_logged(caplog):
    model = network()
    optimizer = optim.Adam(model.parameters())
    guard = torch_bp.DivergenceGuard(model, optimizer)
    with caplog.at_level(logging.WARNING, "torch_bp"):
        run(model, optimizer, guard, [1.0, NAN])
    assert caplog.messages == [f"DivergenceGuard: {guard.events[0]}."]
    assert str(guard.events[0]).startswith("step 2: the loss is nan, not finite; went back to step 0")


class Remembers(torch.nn.Module):
    """A layer with a buffer that grows, one that comes, and a count that is in no tensor."""

    def __init__(self):
        super().__init__()
        self.linear, self.count = nn.Linear(6, 3), 0
        self.register_buffer("means", torch.zeros(0))
        self.register_buffer("seen", None)

    def forward(self, x):
        self.count += 1
        self.means = torch.cat([self.means, x.detach().mean()[None]])
        self.seen = torch.zeros(self.count) if self.count % 2 else None
        return self.linear(x)

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def test_buffers_that_grow_and_what_modules_keep_beside_them():
    model = torch.nn.Sequential(Remembers())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=3, trust=2, keep=2)
    kept = {}
    for step in range(9):
        optimizer.zero_grad()
        loss = loss_of(model, NAN if step == 8 else 1.0)
        loss.backward()
        guard.step(loss)
        kept.setdefault(step + 1, everything(model))
    back_to = guard.events[0].back_to
    assert back_to == 6
    assert same(everything(model), kept[back_to])
    assert (model[0].count, len(model[0].means)) == (6, 6)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate")])
def test_no_memory_for_another_snapshot(error, monkeypatch, caplog):
    from torch_bp.diagnostics.run_state import Snapshot

    taken, take = [], Snapshot.take

    def sometimes(self, state):
        taken.append(state)
        if len(taken) in (2, 3):
            raise error
        take(self, state)

    monkeypatch.setattr(Snapshot, "take", sometimes)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=3, trust=2, keep=2)
    for step in range(15):
        optimizer.zero_grad()
        loss = loss_of(model, NAN if step == 14 else 1.0)
        loss.backward()
        assert guard.step(loss) == (step != 14)
    said = [record.getMessage() for record in caplog.records if "no memory for another snapshot" in record.getMessage()]
    assert len(said) == 1
    assert guard.events[0].back_to > 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("another")])
def test_a_run_of_which_there_is_no_snapshot_is_not_guarded(error, monkeypatch):
    from torch_bp.diagnostics.run_state import Snapshot

    def never(self, state):
        raise error

    monkeypatch.setattr(Snapshot, "take", never)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = torch_bp.DivergenceGuard(model, optimizer)
    loss = loss_of(model)
    loss.backward()
    with pytest.raises(RuntimeError, match=str(error)):
        guard.step(loss)
