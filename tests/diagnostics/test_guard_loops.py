"""The guard in every kind of loop: closures, TrainStep, scalers, accumulation, several optimizers, and on a device."""

import json
import math
import re

import pytest
import torch

import torch_bp
from tests.diagnostics.test_guard import INF, NAN, Order, X, Y, everything, loss_of, network, run, same
from torch_bp import nn, optim
from torch_bp.diagnostics import late
from torch_bp.optim import lr_scheduler


def smooth():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def trained_by_closures(search, bad):
    model = smooth()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn=search)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=2, trust=1, factor=1.0)
    scale = 1.0

    def closure():
        nonlocal scale
        optimizer.zero_grad()
        loss = loss_of(model, scale)
        loss.backward()
        scale = 1.0
        return loss

    done = []
    for number in range(8 + 2 * len(bad)):
        scale = NAN if number in bad else 1.0
        done.append(guard.step(closure))
    assert [n for n, each in enumerate(done) if not each] == list(bad)
    assert [e.back_to for e in guard.events] == [4] * len(bad)
    return everything(model, optimizer)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_closures_of_lbfgs(search):
    sound = trained_by_closures(search, ())
    assert sound[1]["state"][0]["n_iter"] > 20
    assert same(sound, trained_by_closures(search, (5,)))


def test_lbfgs_that_leaves_the_numbers():
    """A first loss that is sound, and parameters that are not."""
    model = smooth()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e30, max_iter=4)
    guard = torch_bp.DivergenceGuard(model, optimizer)
    before = everything(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model).square() * 1e20
        loss.backward()
        return loss

    assert guard.step(closure) is False
    assert same(everything(model), before)
    assert guard.events[0].reason == "gradient"


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_closures_of_others(name):
    model = smooth()
    optimizer = getattr(optim, name)(model.parameters(), lr=0.1)
    guard = torch_bp.DivergenceGuard(model, optimizer)
    before = everything(model, optimizer)

    def closure(scale):
        optimizer.zero_grad()
        loss = loss_of(model, scale)
        loss.backward()
        return loss

    assert guard.step(lambda: closure(INF)) is False
    now = everything(model, optimizer)
    assert same(now[0], before[0])
    assert now[1]["state"] == {}
    assert guard.step(lambda: closure(1.0)) is True
    assert guard.steps == 2


def test_a_closure_that_raises_leaves_the_guard_usable():
    model = smooth()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    guard = torch_bp.DivergenceGuard(model, optimizer)

    def closure():
        raise KeyError("data")

    with pytest.raises(KeyError):
        guard.step(closure)
    assert run(model, optimizer, guard, [1.0]) == [True]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("capture", ["auto", False])
def test_train_step(accumulate, capture):
    ends = []
    for bad in ((), (5 * accumulate,)):
        model = smooth()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optimizer, accumulate=accumulate, capture=capture)
        data = Order()
        guard = torch_bp.DivergenceGuard(model, optimizer, data=data, every=2, trust=1, factor=1.0)
        number = 0
        while data.place < 8 * accumulate:
            rows, number = next(data), number + 1
            loss = guard.call(step, X[rows] * (NAN if number in bad else 1.0), Y[rows])
            assert (loss is None) == (number in bad)
        assert [(e.reason, e.action) for e in guard.events] == [("step", "rollback")] * len(bad)
        ends.append(everything(model, optimizer, data))
    assert guard.steps == 8 + 3  # the bad one, and two again
    assert same(*ends)


def test_train_step_with_spikes():
    """Its update is made when its loss is known; two spikes take it back, and what waits of a window is dropped."""
    model = nn.MLP([6, 8, 3])
    optimizer = optim.SGD(model.parameters(), lr=1e-4)
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optimizer, accumulate=2)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=10, trust=5)
    for _ in range(60):
        assert guard.call(step, X, Y) is not None
    good = everything(model, optimizer)
    assert guard.steps == step.steps == 30
    assert guard.call(step, X * 1e4, Y) is not None
    assert guard.events[-1].action == "note"
    assert guard.call(step, X * 1e4, Y) is None
    assert guard.events[-1].action == "rollback"
    assert guard.events[-1].back_to == 20
    assert all(p.grad is None for p in model.parameters())
    assert step._window.waiting == 0
    assert not same(everything(model, optimizer), good)
    for _ in range(20):
        assert guard.call(step, X, Y) is not None
    assert same(everything(model)[0].keys(), good[0].keys())


def scaled(model, optimizer, guard, scaler, scale=1.0, clip=False):
    optimizer.zero_grad()
    loss = loss_of(model, scale)
    scaler.scale(loss).backward()
    if clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return guard.step(loss)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("made", [optim.Adam, torch.optim.Adam])
def test_scaler(made, clip):
    ends = []
    for bad in ((), (5,)):
        model = network()
        optimizer = made(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        guard = torch_bp.DivergenceGuard(model, optimizer, scaler=scaler, every=2, trust=1, factor=1.0)
        for number in range(8 + 2 * len(bad)):
            done = scaled(model, optimizer, guard, scaler, INF if number in bad else 1.0, clip)
            assert done == (number not in bad)
        ends.append(everything(model, optimizer, scaler))
    assert same(*ends)
    assert ends[0][2]["scale"] > 1024


def test_scaler_looks_for_its_scale():
    """Overflow of the scaled loss is no divergence, but twenty in a row are."""
    model = network()
    optimizer = optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    guard = torch_bp.DivergenceGuard(model, optimizer, scaler=scaler, retries=0)
    before = everything(model)[0]["0.weight"].clone()
    for _ in range(3):
        scaled(model, optimizer, guard, scaler, 1e3)
    assert guard.events == []
    assert scaler.get_scale() < 2.0**127
    assert torch.equal(model[0].weight, before)
    for _ in range(9):
        scaled(model, optimizer, guard, scaler)
    assert not torch.equal(model[0].weight, before)
    model.register_parameter("odd", torch.nn.Parameter(torch.zeros(1)))
    optimizer.add_param_group({"params": [model.odd]})
    guard.reset()
    with pytest.raises(torch_bp.DivergenceError, match="skipped 20 steps in a row"):  # noqa: PT012
        for number in range(30):
            last = number
            optimizer.zero_grad()
            loss = loss_of(model) + model.odd.sqrt().sum()  # whose derivative is infinite
            scaler.scale(loss).backward()
            guard.step(loss)
    assert last == 20


def test_a_scaler_that_is_off():
    model = network()
    optimizer = optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    guard = torch_bp.DivergenceGuard(model, optimizer, scaler=scaler)
    assert [scaled(model, optimizer, guard, scaler, s) for s in (1.0, NAN, 1.0)] == [True, False, True]


def test_accumulation():
    model = network()
    optimizer = optim.Adam(model.parameters())
    guard = torch_bp.DivergenceGuard(model, optimizer)
    before = everything(model)[0]["0.weight"]
    for window in range(3):
        for part in range(4):
            loss = loss_of(model, 0.25 * (INF if (window, part) == (0, 1) else 1.0), slice(16 * part, 16 * part + 16))
            loss.backward()
        assert guard.step(loss) is (window > 0)  # the last loss is sound, the gradients are not
        if window == 0:
            assert guard.events[0].reason == "gradient"
            assert torch.equal(model[0].weight, before)
        optimizer.zero_grad()


def test_several_optimizers_and_schedules():
    """In turn, each with a loss of its own, whose sizes have nothing to do with each other."""
    one, other = smooth(), smooth()
    model = torch.nn.ModuleList([one, other])
    optimizers = [optim.Adam(one.parameters(), lr=1e-3), optim.SGD(other.parameters(), lr=1e-3)]
    schedules = [lr_scheduler.ExponentialLR(each, 1.0) for each in optimizers]
    guard = torch_bp.DivergenceGuard(model, optimizers, scheduler=schedules, every=10, trust=4)
    for number in range(80):
        for module, optimizer, scale in zip(model, optimizers, (1.0, 1000.0)):
            optimizer.zero_grad()
            loss = loss_of(module, scale)
            (loss / scale).backward()
            bad = number >= 60 and optimizer is optimizers[0]
            guard.step(loss * 500 if bad else loss, optimizer)
        if guard.events and guard.events[-1].action == "rollback":
            break
    assert number == 61
    assert [(e.action, e.optimizer) for e in guard.events] == [("skip", 0), ("rollback", 0)]
    assert "(optimizer 0)" in str(guard.events[0])
    assert [group["lr"] for each in optimizers for group in each.param_groups] == [5e-4, 5e-4]
    assert [schedule.base_lrs for schedule in schedules] == [[5e-4], [5e-4]]


def test_all_optimizers_at_once():
    one, other = smooth(), smooth()
    model = torch.nn.ModuleList([one, other])
    optimizers = [optim.Adam(each.parameters()) for each in model]
    guard = torch_bp.DivergenceGuard(model, optimizers)
    before = everything(model)
    loss = loss_of(one) + loss_of(other)
    loss.backward()
    other[0].bias.grad[0] = NAN
    assert guard.step(loss) is False
    assert same(everything(model), before)
    loss = loss_of(one) + loss_of(other)
    loss.backward()
    assert guard.step(loss) is True
    assert not torch.equal(one[0].weight, before[0]["0.0.weight"])
    assert not torch.equal(other[0].weight, before[0]["1.0.weight"])


def test_tied_and_frozen_parameters_and_those_outside_of_the_model():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad = False
    extra = torch.nn.Parameter(torch.ones(1))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.Adam([*trained, extra], lr=0.1)
    guard = torch_bp.DivergenceGuard(model, optimizer)
    for scale in (1.0, 1.0, NAN):
        optimizer.zero_grad()
        loss = loss_of(model, scale) * extra.sum()
        loss.backward()
        guard.step(loss)
    assert extra.item() == 1.0
    assert model[1].weight is model[0].weight
    numbers = sum(p.numel() for p in model.parameters())
    assert guard.memory()["cpu"] < 4 * numbers + 6000  # tied weights once; at first there was no state


def replaced(model, optimizer):
    model[2] = nn.Linear(8, 3)


def added(model, optimizer):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


def renewed(model, optimizer):
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(8, 6))


@pytest.mark.parametrize("change", [replaced, added, renewed])
@pytest.mark.parametrize("scales", [[NAN], [1.0] * 3])
def test_parameters_that_change_are_seen(change, scales):
    """At the next snapshot, or when there is nothing to go back to."""
    model = smooth()
    optimizer = optim.Adam(model.parameters())
    guard = torch_bp.DivergenceGuard(model, optimizer, every=4, trust=1)
    run(model, optimizer, guard, [1.0] * 2)
    change(model, optimizer)
    with pytest.raises(RuntimeError, match=r"added, removed or replaced, such as .*; call guard.reset\(\)"):
        run(model, optimizer, guard, scales)
    guard.reset()
    now = everything(model)
    assert run(model, optimizer, guard, [NAN, 1.0]) == [False, True]
    assert guard.events[-1].action == "rollback"
    assert not same(now, everything(model))


def test_a_resumed_guard_goes_on():
    ends = []
    for resumed in (False, True):
        model = smooth()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        guard = torch_bp.DivergenceGuard(model, optimizer, every=4, trust=1, cooldown=20, retries=5)
        run(model, optimizer, guard, [1.0] * 30 + [NAN] + [1.0] * 5)
        if resumed:
            saved = json.loads(json.dumps(guard.state_dict()))
            kept = everything(model, optimizer)
            model = smooth()
            optimizer = optim.Adam(model.parameters(), lr=0.01)
            guard = torch_bp.DivergenceGuard(model, optimizer, every=4, trust=1, cooldown=20, retries=5)
            guard.load_state_dict(saved)
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
            assert guard.state_dict() == saved or math.isnan(saved["events"][0]["number"])
        run(model, optimizer, guard, [1.0] * 7)
        assert 0.5 < guard._recovery.factor < 1
        ends.append([everything(model, optimizer), guard.state_dict()["recovery"], guard.steps, str(guard.events)])
        run(model, optimizer, guard, [NAN])
        assert guard.events[-1].back_to is not None
        assert guard.events[-1].back_to <= ends[-1][1]["position"]
    assert same(*ends)


@pytest.fixture
def delayed(monkeypatch):
    """As on a CUDA device: numbers are read a step later."""
    monkeypatch.setattr(late, "asynchronous", lambda loss: True)


@pytest.mark.parametrize(
    ("made", "options", "untouched"),
    [
        (torch.optim.Adam, {"fused": True}, True),
        (torch.optim.AdamW, {"fused": True}, True),
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}, True),
        (torch.optim.Adagrad, {"fused": True}, True),
        (torch.optim.Adam, {}, False),
        (optim.Adam, {}, False),
    ],
)
def test_a_step_later(delayed, made, options, untouched):
    model = network()
    optimizer = made(model.parameters(), lr=0.01, **options)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=2, trust=2, factor=1.0)
    run(model, optimizer, guard, [1.0] * 2)
    good = everything(model, optimizer)
    run(model, optimizer, guard, [1.0] * 3)
    before = everything(model, optimizer)
    assert run(model, optimizer, guard, [NAN]) == [True]  # as far as is known
    names = [name for name, _ in model.named_parameters()]
    kept = same([model.state_dict()[n] for n in names], [before[0][n] for n in names])
    assert kept == untouched
    assert not hasattr(optimizer, "found_inf")
    assert run(model, optimizer, guard, [1.0]) == [False]
    assert same(everything(model, optimizer), good)
    assert [(e.reason, e.back_to) for e in guard.events] == [("loss", 2)]
    assert run(model, optimizer, guard, [1.0] * 3) == [True] * 3


def test_a_spike_is_left_out_on_the_device(delayed):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    guard = torch_bp.DivergenceGuard(model, optimizer)
    run(model, optimizer, guard, [1.0] * 30)
    before = everything(model)[0]["0.weight"]
    run(model, optimizer, guard, [100.0])
    assert torch.equal(model[0].weight, before)
    run(model, optimizer, guard, [1.0])
    assert [e.reason for e in guard.events] == ["spike"]


def test_settle_looks_at_the_last_step(delayed):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    guard = torch_bp.DivergenceGuard(model, optimizer)
    run(model, optimizer, guard, [1.0])
    assert guard.settle() is True
    run(model, optimizer, guard, [NAN])
    assert not all(torch.isfinite(p).all() for p in model.parameters())
    assert guard.settle() is False
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert guard.settle() is True


def test_scaler_a_step_later(delayed):
    model = network()
    optimizer = optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    guard = torch_bp.DivergenceGuard(model, optimizer, scaler=scaler)
    assert [scaled(model, optimizer, guard, scaler, s) for s in (1.0, NAN, 1.0, 1.0)] == [True, True, False, True]


def test_halves():
    """For loops that others run."""
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    guard = torch_bp.DivergenceGuard(model, optimizer)
    loss = loss_of(model)
    loss.backward()
    assert guard.before_update(loss) is True
    optimizer.step()
    assert guard.after_update() is True
    assert guard.before_update(loss * NAN) is False
    assert guard.before_update(loss) is False  # the same step of the loop goes on
    assert guard.after_update() is False
    assert guard.before_update(loss) is True
    assert guard.before_update(loss) is True
    assert guard.after_update() is True
    assert guard.steps == 3


GOOD = torch.nn.Linear(2, 1)
OPTIMIZER = torch.optim.SGD(GOOD.parameters(), lr=0.1)
BAD = [
    ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
    ({"optimizer": []}, ValueError, "optimizer must be one or several, got none"),
    ({"optimizer": GOOD}, TypeError, "optimizer must be a torch.optim.Optimizer, or several, got Linear"),
    ({"scheduler": 3}, TypeError, "scheduler must be a schedule of one of the optimizers, or several, got int"),
    (
        {"scheduler": torch.optim.lr_scheduler.ExponentialLR(torch.optim.SGD(GOOD.parameters(), lr=1.0), 1.0)},
        TypeError,
        "scheduler must be a schedule of one of the optimizers, or several, got ExponentialLR",
    ),
    ({"scaler": 2.0}, TypeError, "scaler must be a torch.amp.GradScaler, got float"),
    ({"data": [X]}, TypeError, "data must have state_dict and load_state_dict, or be a torch.Generator, got Tensor"),
    ({"factor": 0}, ValueError, "factor must be in (0, 1], got 0"),
    ({"factor": 1.5}, ValueError, "factor must be in (0, 1], got 1.5"),
    ({"factor": "half"}, ValueError, "factor must be in (0, 1], got 'half'"),
    ({"factor": NAN}, ValueError, "factor must be in (0, 1], got nan"),
    ({"retries": -1}, ValueError, "retries must be an integer >= 0, got -1"),
    ({"cooldown": 1.5}, ValueError, "cooldown must be an integer >= 0, got 1.5"),
    ({"every": 0}, ValueError, "every must be an integer >= 1, got 0"),
    ({"keep": 1}, ValueError, "keep must be an integer >= 2, got 1"),
    ({"trust": 0}, ValueError, "trust must be an integer >= 1, got 0"),
    ({"trust": 201}, ValueError, "trust must be at most (keep - 1) * every = 200, got 201"),
    ({"storage": "disk"}, ValueError, "storage must be 'device' or 'cpu', got 'disk'"),
    ({"spike": 0}, ValueError, "spike must be positive and finite, got 0"),
    ({"rise": INF}, ValueError, "rise must be positive and finite, got inf"),
    ({"rise": True}, ValueError, "rise must be positive and finite, got True"),
    ({"patience": 0}, ValueError, "patience must be an integer >= 1, got 0"),
    ({"window": 8}, ValueError, "window must be an integer >= 16, got 8"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_arguments(arguments, error, message):
    arguments = {"model": GOOD, "optimizer": OPTIMIZER} | arguments
    with pytest.raises(error, match=re.escape(message)):
        torch_bp.DivergenceGuard(arguments.pop("model"), arguments.pop("optimizer"), **arguments)
    assert not OPTIMIZER._optimizer_step_pre_hooks


def test_bad_steps():
    guard = torch_bp.DivergenceGuard(GOOD, OPTIMIZER)
    with pytest.raises(TypeError, match="loss must be a tensor of one element, got float"):
        guard.step(0.5)
    with pytest.raises(TypeError, match=r"loss must be a tensor of one element, got shape \(3,\)"):
        guard.step(torch.zeros(3))
    with pytest.raises(ValueError, match="optimizer must be one of the guard's, got another SGD"):
        guard.step(torch.zeros(()), torch.optim.SGD(GOOD.parameters(), lr=1.0))
    scaler = torch.amp.GradScaler("cpu")
    guard = torch_bp.DivergenceGuard(GOOD, OPTIMIZER, scaler=scaler)
    with pytest.raises(RuntimeError, match="a closure must be for one optimizer without a GradScaler"):
        guard.step(lambda: torch.zeros(()))


def test_an_optimizer_that_is_applied_in_the_backward():
    model = smooth()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    handle = optim.apply_in_backward(model, optimizer)
    with pytest.raises(RuntimeError, match="optimizer must step after the backward"):
        torch_bp.DivergenceGuard(model, optimizer)
    handle.remove()
    torch_bp.DivergenceGuard(model, optimizer)
