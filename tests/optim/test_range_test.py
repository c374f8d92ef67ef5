"""The range test: that it finds rates of the right size, and that it leaves everything as it was."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from torch_bp import nn, optim
from torch_bp.optim import RangeTest, lr_find
from torch_bp.optim.untouched import untouched

RULES = ["steepest", "minimum", "valley"]


def problem(kind=optim.SGD, **options):
    """Least squares with inputs of variance 1: SGD is stable below a rate of about 1 for 2 x^2 / 2 and its like."""
    model = torch.nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
    x = torch.randn(256, 8)
    return model, kind(model.parameters(), **{"lr": 0.05} | options), [(x, x.sum(1, keepdim=True))]


def snapshot(model, optimizer):
    tensors = [t.clone() for t in (*model.parameters(), *model.buffers())]
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    numbers = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    flags = [m.training for m in model.modules()]
    return tensors, gradients, copy.deepcopy(optimizer.state_dict()), numbers, flags


def everything(model, optimizer):
    """The objects that must stay the same ones."""
    params = list(model.parameters())
    return [*params, *model.buffers(), *(p.grad for p in params), optimizer.param_groups[0]["lr"], optimizer.state]


def assert_same(first, second):
    torch.testing.assert_close(first[:3], second[:3], rtol=0, atol=0)
    assert first[3:] == second[3:]


@pytest.mark.parametrize("rule", RULES)
def test_finds_the_right_size_on_a_parabola(rule):
    """loss = 2 w^2 has the curvature 4: gradient descent needs lr < 0.5, and is best at 0.25."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    test = lr_find(model, lambda y, target: 2 * y.square().sum(), optimizer, [(torch.ones(1, 1), None)], steps=200)
    assert test.diverged
    assert 0.004 < test.suggestion(rule) < 0.5
    assert 0.5 < test.lr[-1] < 10
    assert test.lr == sorted(test.lr)
    assert len(test.lr) == len(test.losses) == len(test.smoothed) < 200


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kind", "least", "most"), [(optim.SGD, 1e-3, 1.0), (optim.Adam, 1e-3, 1.0)])
def test_finds_a_rate_that_trains(rule, kind, least, most):
    model, optimizer, batches = problem(kind)
    lr = lr_find(model, nn.MSELoss(), optimizer, batches).suggestion(rule)
    assert least <= lr <= most
    optimizer.param_groups[0]["lr"] = lr
    [(x, y)] = batches
    first = nn.MSELoss()(model(x), y).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.MSELoss()(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first


KINDS = [
    (optim.SGD, {"momentum": 0.9}),
    (optim.Adam, {}),
    (optim.AdamW, {"amsgrad": True}),
    (optim.RMSprop, {"momentum": 0.5}),
    (optim.Adagrad, {}),
    (torch.optim.Adam, {"lr": torch.tensor(0.05)}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("begun", [0, 3])
def test_leaves_everything_as_it_was(kind, options, failing, begun):
    model, optimizer, batches = problem(kind, **options)
    model[2].eval()
    data = TensorDataset(*batches[0])
    loader = DataLoader(data, 32, shuffle=True, generator=torch.Generator().manual_seed(3))

    def step():
        optimizer.zero_grad()
        x, y = next(iter(loader))
        nn.MSELoss()(model(x), y).backward()
        optimizer.step()

    for _ in range(begun):
        step()
    twin = copy.deepcopy((model, optimizer, loader))
    held = [
        *model.parameters(),
        *model.buffers(),
        *(p.grad for p in model.parameters()),
        optimizer.param_groups[0]["lr"],
    ]
    before, calls = snapshot(model, optimizer), []

    def loss(output, target):
        calls.append(None)
        np.random.rand()
        random.random()
        if failing and len(calls) == 7:
            raise KeyError("seven")
        return (output - target).square().mean()

    if failing:
        with pytest.raises(KeyError, match="seven"):
            lr_find(model, loss, optimizer, loader)
    else:
        lr_find(model, loss, optimizer, loader)
    assert_same(snapshot(model, optimizer), before)
    now = [
        *model.parameters(),
        *model.buffers(),
        *(p.grad for p in model.parameters()),
        optimizer.param_groups[0]["lr"],
    ]
    assert all(a is b for a, b in zip(held, now))
    for _ in range(3):
        step()
    after = snapshot(model, optimizer)
    model, optimizer, loader = twin
    torch.set_rng_state(torch.tensor(before[3][0], dtype=torch.uint8))
    for _ in range(3):
        step()
    assert_same(snapshot(model, optimizer)[:3], after[:3])


def test_its_steps_do_not_count_for_the_order_of_a_schedule():
    model, optimizer, batches = problem()
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    lr_find(model, nn.MSELoss(), optimizer, batches)
    with pytest.warns(UserWarning, match=r"before `optimizer.step"):
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05 * 0.9


def test_buffers_that_a_module_replaces():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()), persistent=False)

    module = Counting()
    kept = module.calls
    with untouched(module):
        module.calls += 1
        module.calls = module.calls + 1
        module.register_buffer("more", torch.ones(1))
    assert module.calls is kept
    assert module.calls == 0
    assert not hasattr(module, "more")


class Odd(torch.nn.Module):
    """Buffers in which several numbers are one in memory."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 1)
        self.norm = torch.nn.BatchNorm1d(8)
        self.register_buffer("expanded", torch.tensor([[1.0], [2.0]]).expand(2, 3))
        self.register_buffer("windows", torch.arange(5.0).unfold(0, 3, 1))
        self.register_buffer("empty", torch.zeros(1).expand(0))
        self.register_buffer("sparse", torch.eye(2).to_sparse())

    def forward(self, x):
        self.expanded[:, 0] += 1
        self.windows[:, 0] += 1
        return self.linear(self.norm(x))


def test_buffers_that_overlap():
    model = Odd().eval()
    x = torch.randn(32, 8)
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    model(x).sum().backward()
    held, before = everything(model, optimizer), snapshot(model, optimizer)
    assert model.expanded[:, 0].tolist() == [2.0, 3.0]
    lr_find(model, nn.MSELoss(), optimizer, [(x, x.sum(1, keepdim=True))])
    assert_same(snapshot(model, optimizer), before)
    assert all(a is b for a, b in zip(held, everything(model, optimizer)))
    assert model.expanded.stride() == (1, 0)


def test_what_cannot_be_taken_back_keeps_nothing_else_from_it():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).eval())
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    model(torch.ones(1, 2)).sum().backward()
    first, second = model[0].weight, model[1].weight
    values, grad = second.clone(), second.grad

    def change():
        with untouched(model, optimizer):
            model.train()
            torch.nn.init.zeros_(second)
            optimizer.param_groups[0]["lr"] = 1.0
            first.data = torch.ones(3)

    with pytest.raises(RuntimeError, match="size"):
        change()
    assert torch.equal(second, values)
    assert second.grad is grad
    assert [m.training for m in model.modules()] == [True, True, False]
    assert optimizer.param_groups[0]["lr"] == 0.05


class ByLength(torch.utils.data.Sampler):
    """Batches in an order of its own."""

    def __init__(self, inner):
        self.inner, self.random = inner, torch.Generator().manual_seed(2)

    def __iter__(self):
        for batch in self.inner:
            yield [batch[i] for i in torch.randperm(len(batch), generator=self.random)]

    def __len__(self):
        return len(self.inner)


def loaders():
    data = TensorDataset(torch.arange(64.0).reshape(8, 8), torch.ones(8, 1))

    def shuffled():
        return RandomSampler(data, generator=torch.Generator().manual_seed(3))

    yield "generator", DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(3))
    yield "sampler", DataLoader(data, 2, sampler=shuffled())
    yield "batch_sampler", DataLoader(data, batch_sampler=BatchSampler(shuffled(), 2, False))
    yield "sampler of batches", DataLoader(data, batch_size=None, sampler=BatchSampler(shuffled(), 2, False))
    yield "nested", DataLoader(data, batch_sampler=ByLength(BatchSampler(shuffled(), 2, False)))


@pytest.mark.parametrize("which", range(5), ids=[name for name, _ in loaders()])
def test_a_loader_goes_on_as_before(which):
    (_, loader), (_, twin) = ([*loaders()][which] for _ in range(2))
    model, optimizer, _ = problem()
    lr_find(model, nn.MSELoss(), optimizer, loader, steps=6)
    for _ in range(2):
        torch.testing.assert_close([x for x, _ in loader], [x for x, _ in twin], rtol=0, atol=0)


def test_groups_keep_their_ratio_and_a_tensor_rate_its_identity():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([{"params": [a], "lr": rate}, {"params": [b], "lr": 0.4}], lr=0.1)
    model = torch.nn.Module()
    model.forward = lambda input: a.sum() + b.sum()
    seen = []

    def loss(output, target):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        assert optimizer.param_groups[0]["lr"] is rate
        return output

    lr_find(model, loss, optimizer, [(None, None)], min_lr=1e-3, max_lr=1e-1, steps=5)
    assert [second / first for first, second in seen] == pytest.approx([4.0] * 5)
    assert [first for first, _ in seen] == pytest.approx([10**e for e in (-3, -2.5, -2, -1.5, -1)])
    assert rate.item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 1.0, "max_lr": 1.0}, r"max_lr must be larger than min_lr, 1.0, and finite, got 1.0"),
        ({"min_lr": 1.0, "max_lr": math.nan}, "max_lr must be"),
        ({"max_lr": math.inf}, "max_lr must be"),
        ({"min_lr": 0.0}, r"min_lr must be positive, got 0.0"),
        ({"steps": 1}, "steps must be an integer >= 2, got 1"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        ({"diverge": 1.0}, "diverge must be larger than 1, got 1.0"),
    ],
)
def test_refuses_arguments(options, message):
    model, optimizer, batches = problem()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        lr_find(model, nn.MSELoss(), optimizer, batches, **options)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches must hold at least one batch, got none"),
        (iter(()), ValueError, "got none"),
        ([torch.ones(3)], TypeError, r"a batch must be a pair \(input, target\), got Tensor"),
        ([(torch.full((4, 8), math.nan), torch.ones(4, 1))], RuntimeError, "finite at the first step.*got nan"),
    ],
)
def test_refuses_batches(batches, error, message):
    model, optimizer, _ = problem()
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        lr_find(model, nn.MSELoss(), optimizer, batches)
    assert_same(snapshot(model, optimizer), before)


def test_a_generator_ends_the_test_early():
    model, optimizer, batches = problem()
    test = lr_find(model, nn.MSELoss(), optimizer, (batches[0] for _ in range(4)))
    assert len(test.lr) == 4
    assert not test.diverged
    assert test.cut_short
    lines = str(test).splitlines()
    assert lines[0] == "4 of 100 rates tried, 1e-07 to 1.75e-07: the batches ended before max_lr, 10."
    assert lines[-1].endswith("Give more batches or epochs, or take fewer steps.")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("model optimizer loss batches", TypeError, r"loss_fn must be a function of \(output, target\), got SGD"),
        ("model loss batches optimizer", TypeError, "optimizer must be an optimizer, got list"),
        ("optimizer loss model batches", TypeError, r"model must be a torch.nn.Module, got SGD\. The order is lr_find"),
        ("model class optimizer batches", TypeError, "loss_fn must be a function of .* got type"),
        ("model loss optimizer number", TypeError, "batches must be batches to go through, got int"),
        (
            "model many optimizer batches",
            ValueError,
            r"loss_fn must give a tensor of one number, got shape \(256, 1\)\. Take the mean",
        ),
        ("model float optimizer batches", ValueError, "loss_fn must give a tensor of one number, got float"),
    ],
)
def test_refuses_arguments_of_another_kind(given, error, message):
    model, optimizer, batches = problem()
    before = snapshot(model, optimizer)
    values = {
        "model": model,
        "optimizer": optimizer,
        "loss": nn.MSELoss(),
        "batches": batches,
        "class": nn.MSELoss,
        "number": 3,
        "many": nn.MSELoss(reduction="none"),
        "float": lambda output, target: 1.0,
    }
    with pytest.raises(error, match=f"^lr_find: {message}"):
        lr_find(*(values[name] for name in given.split()))
    assert_same(snapshot(model, optimizer), before)


def recorded(losses, **options):
    test = RangeTest(1e-4, 1e3, len(losses), **{"smoothing": 0.0, "diverge": 1e9} | options)
    for loss in losses:
        test.record(loss)
    return test


def test_the_smoothed_loss_is_the_weighted_mean():
    losses, beta = [3.0, 1.0, 4.0, 1.0, 5.0], 0.9
    smoothed = recorded(losses, smoothing=beta).smoothed
    for t in range(5):
        weights = [beta ** (t - i) for i in range(t + 1)]
        assert smoothed[t] == pytest.approx(sum(w * x for w, x in zip(weights, losses)) / sum(weights))


def test_rules_on_a_curve_drawn_by_hand():
    test = recorded([5.0, 5.0, 4.5, 2.0, 1.5, 1.4, 3.0, 9.0])
    assert test.suggestion("steepest") == test.suggestion() == pytest.approx(1e-2)  # from 5.0 to 4.5 to 2.0
    assert test.suggestion("minimum") == pytest.approx(test.lr[5] / 10)
    assert test.suggestion("valley") == pytest.approx(test.lr[4])
    assert str(test).splitlines() == [
        "8 of 8 rates tried, 0.0001 to 1e+03; the loss did not diverge.",
        "Take more steps: the rates are apart by a factor of 10.",
        'Begin with lr = 0.01, "steepest"; the rules in turn:',
        "  steepest  0.01      where the loss falls fastest",
        "   minimum  1         a tenth of the rate of the lowest loss",
        "    valley  1         two thirds along the longest fall of the loss",
    ]
    assert (
        repr(test)
        == "RangeTest(min_lr=0.0001, max_lr=1000.0, steps=8, smoothing=0.0, diverge=1000000000.0, diverged=False)"
    )
    with pytest.raises(ValueError, match="rule must be one of steepest, minimum, valley, got 'best'"):
        test.suggestion("best")


@pytest.mark.parametrize(
    ("losses", "steps", "remedy"),
    [
        ([1.0, 2.0, 3.0, 4.0], 4, "Take more steps: the rates are apart by a factor of 215."),
        ([2.0, 1.0], 2, "Take more steps: the rates are apart by a factor of 1e+07."),
        ([1.0, 2.0, 3.0], 30, "as the batches ended after 3 of 30 rates. Give more batches or epochs"),
        ([1.0, 2.0, math.inf], 30, "Take a smaller min_lr"),
        ([1.0] * 30, 30, "Take a larger max_lr"),
        ([], 30, "got no losses, as the batches ended"),
    ],
)
def test_no_suggestion_without_a_fall(losses, steps, remedy):
    test = RangeTest(1e-4, 1e3, steps, smoothing=0.0, diverge=1e9)
    for loss in losses:
        test.record(loss)
    with pytest.raises(RuntimeError, match="the loss must fall somewhere to suggest a rate") as caught:
        test.suggestion()
    assert remedy in str(caught.value)
    assert str(test).splitlines()[1:] == [str(caught.value)]


def test_diverges_with_negative_losses_too():
    assert recorded([-1.0, -2.0, -3.0, -2.5, 10.0], diverge=4.0).diverged
    assert not recorded([-1.0, -2.0, -3.0, -2.5, -1.0], diverge=4.0).diverged
    assert recorded([1.0, 0.5, math.inf]).diverged


def test_plot(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    figure = recorded([5.0, 5.0, 4.5, 2.0, 1.5, 1.4, 3.0, 9.0]).plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert len(figure.axes[0].lines) == 5
    figure.savefig(tmp_path / "plot.png")
    assert len(recorded([1.0, 2.0, 3.0]).plot().axes[0].lines) == 2


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"torch_bp\[recipes\]\""):
        recorded([2.0, 1.0, 3.0]).plot()
