"""TrainStep against the same model trained through autograd."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torch_bp
from torch_bp import nn, optim
from torch_bp.nn import functional as F
from torch_bp.step import TrainStep
from torch_bp.step.explicit import UnknownBackwardError
from torch_bp.step.recorder import NotCapturableError

BEFORE = torch.autograd.Function.__dict__["apply"]


class Own(torch.nn.Module):
    """A forward with arithmetic, functions, shapes, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(16, 5)

    def forward(self, x):
        x = x.view(x.shape[0], -1)
        h = torch.relu(self.first(x))
        h = h + 0.5 * F.gelu(self.shared(h))
        h = self.shared(h) - h / 2
        return self.last(torch.cat([h, torch.tanh(h)], 1))


class Inplace(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(12, 8), torch.nn.Linear(8, 5)

    def forward(self, x):
        h = torch.nn.functional.silu(self.first(x), inplace=True)
        h += 1
        return self.last(torch.nn.functional.relu(h, inplace=True))


def tied():
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5))
    model[2].weight = model[0].weight
    return model


def frozen():
    model = nn.Sequential(nn.Linear(12, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 5))
    model[2].requires_grad_(False)
    return model


def torchs():
    t = torch.nn
    return t.Sequential(t.Linear(12, 8), t.BatchNorm1d(8), t.LeakyReLU(), t.Dropout(0.2), t.Linear(8, 5))


MODELS = {
    "linear": lambda: nn.Linear(12, 5),
    "without bias": lambda: nn.Sequential(nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False)),
    "activations": lambda: nn.Sequential(
        *(m for a in (nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Hardtanh, nn.ELU, nn.Softplus, nn.SiLU, nn.GELU)
          for m in (nn.Linear(12, 12), a())), nn.Linear(12, 5)
    ),
    "softmax inside": lambda: nn.Sequential(nn.Linear(12, 8), nn.Softmax(1), nn.Linear(8, 5), nn.LogSoftmax(1)),
    "fused": lambda: nn.MLP([12, 8, 8, 5], "tanh"),
    "normalised": lambda: nn.MLP([12, 8, 8, 5], norm="batch", dropout=0.3),
    "layer norm": lambda: nn.MLP([12, 8, 8, 5], "gelu", norm="layer"),
    "residual": lambda: nn.MLP([12, 8, 8, 8, 5], residual=True),
    "residual, separate": lambda: nn.MLP([12, 8, 8, 8, 5], residual=True, norm="batch", fused=False),
    "own forward": Own,
    "in place": Inplace,
    "tied": tied,
    "frozen": frozen,
    "torch's": torchs,
}  # fmt: skip
LOSSES = {
    "cross-entropy": lambda: nn.CrossEntropyLoss(),
    "smoothed, weighted": lambda: nn.CrossEntropyLoss(torch.arange(1.0, 6), label_smoothing=0.1, ignore_index=3),
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum", ignore_index=1),
    "squared": lambda: nn.MSELoss(),
    "half": lambda: nn.HalfMSELoss(),
    "probabilities": lambda: lambda out, y: F.binary_cross_entropy(torch.sigmoid(out), y),
    "torch's probabilities": lambda: lambda out, y: torch.nn.BCELoss()(torch.sigmoid(out), y),
    "none, then a mean": lambda: lambda out, y: F.mse_loss(out, y, reduction="none").mean(),
    "logits": lambda: nn.BCEWithLogitsLoss(pos_weight=torch.arange(1.0, 6)),
    "torch's": lambda: torch.nn.CrossEntropyLoss(),
    "a function": lambda: lambda out, y: F.mse_loss(out, y) + 0.01 * (out * out).sum(),
}
_CLASSES = ("cross-entropy", "smoothed, weighted", "sum", "torch's")


def batches(loss, count=6, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(size, 12, generator=generator).to(dtype)
        if loss in _CLASSES:
            yield x, torch.randint(0, 5, (size,), generator=generator)
        else:
            yield x, torch.rand(size, 5, generator=generator).to(dtype)


def by_autograd(model, loss_fn, optimizer, data, clip=None, accumulate=1):
    losses = []
    for number, (x, y) in enumerate(data, 1):
        loss = loss_fn(model(x), y)
        (loss / accumulate).backward() if accumulate > 1 else loss.backward()
        if number % accumulate == 0:
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def pair(model, dtype=torch.float32):
    torch.manual_seed(1)
    first = MODELS[model]().to(dtype)
    return first, copy.deepcopy(first)


def assert_same_state(a, b, rounding=0.0):
    for (name, mine), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding, msg=name)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_models_train_bit_for_bit_as_through_autograd(model, capture):
    mine, theirs = pair(model)
    loss_fn = nn.CrossEntropyLoss() if "inside" not in model else nn.NLLLoss()
    step = TrainStep(mine, loss_fn, optim.Adam(mine.parameters(), lr=0.01), capture=capture)
    torch.manual_seed(2)
    got = torch.stack([step(x, y) for x, y in batches("cross-entropy")])
    torch.manual_seed(2)
    theirs = torch_bp.convert(theirs)
    expected = by_autograd(theirs, loss_fn, optim.Adam(theirs.parameters(), lr=0.01), batches("cross-entropy"))
    # Through autograd, a forward that calls torch's functions has torch's backward of them.
    rounding = 1e-6 if model in ("own forward", "in place") else 0
    torch.testing.assert_close(got, expected, rtol=rounding, atol=0)
    assert_same_state(mine, theirs, rounding)


@pytest.mark.filterwarnings("error:An output")
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    mine, theirs = pair("linear")
    loss_fn = LOSSES[loss]()
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.01), capture=True)
    got = torch.stack([step(x, y) for x, y in batches(loss)])
    expected = by_autograd(theirs, loss_fn, optim.SGD(theirs.parameters(), lr=0.01), batches(loss))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for a, b in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("model", ["normalised", "own forward", "activations"])
def test_float64_follows_torchs_own_modules(model):
    mine, theirs = pair(model, torch.float64)
    theirs = torch_bp.to_torch(theirs)
    data = list(batches("cross-entropy", 50, dtype=torch.float64))
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.Adam(mine.parameters(), lr=0.01))
    torch.manual_seed(2)
    got = torch.stack([step(x, y) for x, y in data])
    torch.manual_seed(2)
    reference = torch.nn.CrossEntropyLoss()
    expected = by_autograd(theirs, reference, torch.optim.Adam(theirs.parameters(), lr=0.01), data)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_a_smaller_last_batch_has_buffers_of_its_own():
    mine, theirs = pair("normalised")
    data = [*batches("cross-entropy", 3), *batches("cross-entropy", 1, 7), *batches("cross-entropy", 2)]
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.Adam(mine.parameters()))
    torch.manual_seed(2)
    got = torch.stack([step(x, y) for x, y in data])
    torch.manual_seed(2)
    expected = by_autograd(theirs, nn.CrossEntropyLoss(), optim.Adam(theirs.parameters()), data)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("capture", [True, False])
def test_accumulation_with_a_window_that_is_not_full(capture):
    mine, theirs = pair("fused")
    data = list(batches("cross-entropy", 7))
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters(), lr=0.1), accumulate=3, capture=capture)
    for x, y in data:
        step(x, y)
    step.update()
    optimizer = optim.SGD(theirs.parameters(), lr=0.1)
    by_autograd(theirs, nn.CrossEntropyLoss(), optimizer, data, accumulate=3)
    optimizer.step()  # of the seventh alone
    for a, b in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_clipping():
    mine, theirs = pair("fused")
    data = list(batches("cross-entropy"))
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters(), lr=0.1), clip_grad_norm=0.05)
    for x, y in data:
        step(x, y)
    by_autograd(theirs, nn.CrossEntropyLoss(), optim.SGD(theirs.parameters(), lr=0.1), data, clip=0.05)
    for a, b in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_clipping_by_value():
    model, _ = pair("fused")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.0), clip_grad_value=1e-3)
    step(*next(batches("cross-entropy")))
    largest = max(p.grad.abs().max() for p in model.parameters())
    assert largest.item() == pytest.approx(1e-3)


def test_goes_over_to_ordinary_training_and_back():
    mine, theirs = pair("normalised")
    data = list(batches("cross-entropy", 9))
    loss_fn, ours = nn.CrossEntropyLoss(), optim.Adam(mine.parameters())
    step = TrainStep(mine, loss_fn, ours)
    torch.manual_seed(2)
    for x, y in data[:3]:
        step(x, y)
    ours.zero_grad()
    by_autograd(mine, loss_fn, ours, data[3:6])
    for x, y in data[6:]:
        step(x, y)
    torch.manual_seed(2)
    by_autograd(theirs, loss_fn, optim.Adam(theirs.parameters()), data)
    assert_same_state(mine, theirs)


def test_what_changes_in_the_model_is_seen():
    model, reference = pair("normalised")
    loss_fn = nn.CrossEntropyLoss()
    step = TrainStep(model, loss_fn, optim.SGD(model.parameters(), lr=0.0))
    x, y = next(batches("cross-entropy"))

    def agree():
        torch.manual_seed(3)
        got = step(x, y)
        torch.manual_seed(3)
        torch.testing.assert_close(got, loss_fn(reference(x), y), rtol=0, atol=0)

    def both(change):
        change(model), change(reference)
        agree()

    agree()
    both(lambda m: m.eval())
    both(lambda m: m.train())
    both(lambda m: setattr(next(d for d in m if isinstance(d, nn.Dropout)), "p", 0.7))
    both(lambda m: m[0].weight.data.mul_(2))
    both(lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone() * 2))
    both(lambda m: m[1].eval())
    both(lambda m: m[0].requires_grad_(False))
    assert model[0].weight.grad is None
    replacement = nn.Linear(8, 5)
    both(lambda m: setattr(m, str(len(m) - 1), replacement))
    transposed = torch.randn(12, 8)
    both(lambda m: setattr(m[0].weight, "data", transposed.t()))
    loss_fn.label_smoothing = 0.2
    agree()


def test_many_and_epoch():
    mine, theirs = pair("fused")
    data = list(batches("cross-entropy", 5))
    xs, ys = (torch.stack(t) for t in zip(*data))
    loss_fn = nn.CrossEntropyLoss()
    step = TrainStep(mine, loss_fn, optim.Adam(mine.parameters()))
    optimizer = optim.Adam(theirs.parameters())
    expected = by_autograd(theirs, loss_fn, optimizer, data)
    torch.testing.assert_close(step.many(xs, ys), expected, rtol=0, atol=0)
    x, y = xs.flatten(0, 1), ys.flatten()
    got = step.epoch([x, y], 24, torch.Generator().manual_seed(4))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(4))
    expected = by_autograd(theirs, loss_fn, optimizer, [(x[i], y[i]) for i in order.split(24)])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert len(step.epoch([x, y], 24, shuffle=False, drop_last=True)) == len(x) // 24
    with pytest.raises(ValueError, match="one length"):
        step.epoch([x, y[:-1]], 8)
    with pytest.raises(ValueError, match="first dimension"):
        step.many(xs, ys[:2])


def test_backward_adds_as_autograd_does():
    mine, theirs = pair("residual")
    loss_fn = nn.CrossEntropyLoss()
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters()))
    for x, y in batches("cross-entropy", 3):
        step.backward(x, y)
        loss_fn(theirs(x), y).backward()
    for a, b in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
    mine.zero_grad()
    assert all(p.grad is None for p in mine.parameters())
    theirs.zero_grad()
    x, y = next(batches("cross-entropy"))
    step.backward(x, y, scale=3.0)
    (3.0 * loss_fn(theirs(x), y)).backward()
    for a, b in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)


def test_losses_have_memory_of_their_own():
    model, _ = pair("linear")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.5))
    x, y = next(batches("cross-entropy"))
    losses = [step(x, y) for _ in range(4)]
    assert len({loss.item() for loss in losses}) == 4


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("at", [0, 2])
def test_what_is_not_finite_changes_nothing(capture, at):
    model, _ = pair("normalised")
    optimizer = optim.Adam(model.parameters())
    step = TrainStep(model, nn.CrossEntropyLoss(), optimizer, capture=capture)
    x, y = next(batches("cross-entropy"))
    for _ in range(at):
        step(x, y)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    bad = x.clone()
    bad[3, 1] = torch.inf
    with pytest.raises(FloatingPointError, match=f"at step {at + 1} the loss is nan.*it is in the input"):
        step(bad, y)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert torch.isfinite(step(x, y))


def test_names_the_module_where_numbers_stop_being_finite():
    model = nn.Sequential(nn.Linear(12, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 5))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1][0].weight.fill_(1e30)
        model[2].weight.fill_(1e30)
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
    with pytest.raises(FloatingPointError, match="forward of Linear in module '2'"):
        step(torch.ones(4, 12), torch.zeros(4, dtype=torch.int64))


def test_an_overflow_in_the_gradient_alone_is_found():
    model = nn.Linear(12, 5, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e-32)
    step = TrainStep(model, lambda out, _: 1e10 * out.mean(), optim.SGD(model.parameters()))
    with pytest.raises(FloatingPointError, match=r"the loss is 1.2e.*gradients inf.*backward of Linear"):
        step(torch.full((4, 12), 1e30), torch.zeros(4))


class Convolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3, padding=1), torch.nn.PReLU())
        self.last = nn.Linear(48, 5)

    def forward(self, x):
        return self.last(self.body(x.unsqueeze(1)).flatten(1))


def test_unknown_operations_are_named_or_left_to_autograd():
    torch.manual_seed(1)
    mine = Convolution()
    theirs = copy.deepcopy(mine)
    loss_fn = nn.CrossEntropyLoss()
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.1))
    with pytest.raises(UnknownBackwardError, match=r"module 'body.0' calls .*conv1d.*fallback=\"autograd\""):
        step(*next(batches("cross-entropy")))
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.1), fallback="autograd", capture=True)
    got = torch.stack([step(x, y) for x, y in batches("cross-entropy")])
    expected = by_autograd(theirs, loss_fn, optim.SGD(theirs.parameters(), lr=0.1), batches("cross-entropy"))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


class Deciding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 5)

    def forward(self, x):
        h = self.first(x)
        return h if h.sum() > 0 else -h


def test_a_forward_that_reads_values_runs_at_every_step():
    torch.manual_seed(1)
    mine = Deciding()
    theirs = copy.deepcopy(mine)
    data = [(x + shift, y) for x, y in batches("cross-entropy", 3) for shift in (-2, 2)]
    assert len({(theirs.first(x).sum() > 0).item() for x, _ in data}) == 2
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters(), lr=0.1))
    got = torch.stack([step(x, y) for x, y in data])
    expected = by_autograd(theirs, nn.CrossEntropyLoss(), optim.SGD(theirs.parameters(), lr=0.1), data)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters()), capture=True)
    with pytest.raises(NotCapturableError, match="reads"):
        step(*data[0])


def test_batch_norm_with_a_cumulative_average_runs_uncaptured():
    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 5))

    mine, theirs = make(), make()
    loss_fn = nn.CrossEntropyLoss()
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.1))
    for x, y in batches("cross-entropy"):
        step(x, y)
    by_autograd(theirs, loss_fn, optim.SGD(theirs.parameters(), lr=0.1), batches("cross-entropy"))
    assert_same_state(mine, theirs)


def test_hooks_on_modules_are_called_at_every_step():
    model, _ = pair("linear")
    calls = []
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1))
    x, y = next(batches("cross-entropy"))
    step(x, y)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    step(x, y), step(x, y)
    assert len(calls) == 2
    handle.remove()
    step(x, y)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": 1}, TypeError, "model must be"),
        ({"loss_fn": 1}, TypeError, "loss_fn must be"),
        ({"optimizer": nn.CrossEntropyLoss()}, TypeError, "model, loss_fn, optimizer"),
        ({"optimizer": optim.SGD([torch.nn.Parameter(torch.ones(1))])}, ValueError, "parameters of the model"),
        ({"clip_grad_norm": 0}, ValueError, "clip_grad_norm must be > 0"),
        ({"clip_grad_value": -1}, ValueError, "clip_grad_value must be > 0"),
        ({"accumulate": 0}, ValueError, "accumulate"),
        ({"capture": "always"}, ValueError, "capture"),
        ({"fallback": "torch"}, ValueError, "fallback"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_arguments_are_checked(change, error, says):
    model = nn.Linear(12, 5)
    arguments = {"model": model, "loss_fn": nn.MSELoss(), "optimizer": optim.SGD(model.parameters())} | change
    with pytest.raises(error, match=says):
        TrainStep(**arguments)


def test_a_loss_must_be_one_number_of_the_parameters():
    model = nn.Linear(12, 5)
    x, y = next(batches("cross-entropy"))
    for loss_fn, error, says in (
        (nn.CrossEntropyLoss(reduction="none"), ValueError, "one number"),
        (lambda out, y: 1.0, TypeError, "must return a tensor"),
        (lambda out, y: out.detach().sum(), RuntimeError, "depends on no parameter"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=says):
            TrainStep(model, loss_fn, optim.SGD(model.parameters()))(x, y)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_plan_and_memory():
    model, _ = pair("fused")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    with pytest.raises(RuntimeError, match="do a step first"):
        step.plan  # noqa: B018
    step(*next(batches("cross-entropy")))
    text = str(step.plan)
    assert "y = tanh(a W^T + b), eq. 1 and 2" in text
    assert "da = dz W" not in text.splitlines()[-3]  # the input needs no error signal
    assert step.plan.parameters == [name for name, _ in model.named_parameters()]
    assert 0 < step.plan.bytes < step.plan.apart
    assert step.memory()["gradients"] == sum(4 * p.numel() for p in model.parameters())


class Widening(torch.nn.Module):
    """Goes to another precision and back, by methods whose names are those of Python's own conversions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x):
        h = self.first(x)
        return self.last(h) + self.last(h.double().float())


class Counting(torch.nn.Module):
    """Has a buffer and a counter that every call replaces."""

    def __init__(self):
        super().__init__()
        self.first, self.calls = nn.Linear(12, 5), 0
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        self.calls += 1
        h = self.first(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean


@pytest.mark.parametrize("kind", [Widening, Counting])
def test_models_with_ways_of_their_own(kind):
    torch.manual_seed(1)
    mine = kind()
    theirs = copy.deepcopy(mine)
    loss_fn = nn.CrossEntropyLoss()
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.1))
    got = torch.stack([step(x, y) for x, y in batches("cross-entropy")])
    expected = by_autograd(theirs, loss_fn, optim.SGD(theirs.parameters(), lr=0.1), batches("cross-entropy"))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert_same_state(mine, theirs, 1e-6)
    if kind is Counting:
        assert mine.calls == theirs.calls == 6
        before = mine.mean.clone()
        with pytest.raises(FloatingPointError):
            step(torch.full((16, 12), torch.inf), torch.zeros(16, dtype=torch.int64))
        assert torch.equal(mine.mean, before)


def test_hooks_on_parameters_are_called_and_those_on_backwards_refused():
    mine, theirs = pair("linear")
    seen = []
    for model in (mine, theirs):
        model.weight.register_hook(lambda g: g * 3)
        model.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters(), lr=0.1))
    data = list(batches("cross-entropy", 3))
    for x, y in data:
        step(x, y)
    by_autograd(theirs, nn.CrossEntropyLoss(), optim.SGD(theirs.parameters(), lr=0.1), data)
    assert_same_state(mine, theirs)
    assert len(seen) == 6
    mine.register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="no backward hooks, got one on the model"):
        step(*data[0])


@pytest.mark.parametrize("capture", [True, False])
def test_output_is_what_the_model_returned(capture):
    model, reference = pair("fused")
    arguments = model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(RuntimeError, match="keep_output=True"):
        TrainStep(*arguments).output  # noqa: B018
    step = TrainStep(*arguments, capture=capture, keep_output=True)
    assert step.output is None
    outputs = []
    for x, y in batches("cross-entropy", 3):
        step(x, y)
        outputs.append(step.output)
        assert torch.equal(outputs[-1], reference(x))
    assert not torch.equal(outputs[0], outputs[1])


def test_parameters_of_the_loss_are_trained():
    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, out, y):
            return F.cross_entropy(out * self.scale, y) + self.scale**2

    mine, theirs = pair("linear")
    losses = [Weighted(), Weighted()]
    optimizers = [optim.SGD([*m.parameters(), *loss.parameters()], lr=0.1) for m, loss in zip((mine, theirs), losses)]
    step = TrainStep(mine, losses[0], optimizers[0])
    for x, y in batches("cross-entropy"):
        step(x, y)
    by_autograd(theirs, losses[1], optimizers[1], batches("cross-entropy"))
    assert_same_state(mine, theirs, 1e-6)
    assert_same_state(*losses, 1e-6)
    assert losses[0].scale.item() != 2


def test_another_precision_of_autocast_is_another_step():
    model, reference = pair("fused")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.0))
    x, y = next(batches("cross-entropy"))
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(step(x, y), nn.CrossEntropyLoss()(reference(x), y))
    assert torch.equal(step(x, y), nn.CrossEntropyLoss()(reference(x), y))


def test_random_numbers_of_torchs_own_functions():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)

        def forward(self, x):
            h = torch.nn.functional.alpha_dropout(self.first(x), 0.3, training=True)
            return self.last(h + 0.1 * torch.randn_like(h) + 0.1 * torch.rand(8))

    torch.manual_seed(1)
    mine = Noisy()
    theirs = copy.deepcopy(mine)
    loss_fn = nn.CrossEntropyLoss()
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.1), fallback="autograd", capture=True)
    torch.manual_seed(2)
    got = torch.stack([step(x, y) for x, y in batches("cross-entropy")])
    torch.manual_seed(2)
    expected = by_autograd(theirs, loss_fn, optim.SGD(theirs.parameters(), lr=0.1), batches("cross-entropy"))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("model", ["fused", "normalised", "layer norm", "tied", "torch's"])
def test_half_precision_is_that_of_autocast(model, capture):
    mine, theirs = pair(model)
    loss_fn = nn.CrossEntropyLoss()
    step = TrainStep(mine, loss_fn, optim.Adam(mine.parameters(), lr=0.01), precision="bf16", capture=capture)
    theirs = torch_bp.convert(theirs)
    optimizer = optim.Adam(theirs.parameters(), lr=0.01)
    torch.manual_seed(2)
    got = torch.stack([step(x, y) for x, y in batches("cross-entropy")])
    torch.manual_seed(2)
    expected = []
    for x, y in batches("cross-entropy"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(theirs(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.detach())
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=0)
    assert_same_state(mine, theirs)
    assert {p.dtype for p in mine.parameters()} == {p.grad.dtype for p in mine.parameters()} == {torch.float32}


def by_scaler(model, loss_fn, optimizer, made, accumulate=1, clip=None, scale=2.0**16):
    """Losses of training under autocast in float16 with torch's GradScaler."""
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=scale), []
    for number, (x, y) in enumerate(made):
        with torch.autocast("cpu", torch.float16):
            loss = loss_fn(model(x), y)
        scaler.scale(loss / accumulate).backward()
        losses.append(loss.detach())
        if (number + 1) % accumulate == 0:
            if clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return torch.stack(losses)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.1)])
@pytest.mark.parametrize("model", ["fused", "layer norm", "torch's"])
def test_float16_is_that_of_autocast_with_a_scaler(model, accumulate, clip, capture):
    mine, theirs = pair(model)
    theirs, loss_fn = torch_bp.convert(theirs), nn.CrossEntropyLoss()
    options = {"accumulate": accumulate, "clip_grad_norm": clip, "capture": capture, "precision": "fp16"}
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.1), **options)
    made = list(batches("cross-entropy"))
    made = made[: len(made) // 2 * 2]
    torch.manual_seed(2)
    got = torch.stack([step(x, y) for x, y in made])
    torch.manual_seed(2)
    expected = by_scaler(theirs, loss_fn, optim.SGD(theirs.parameters(), lr=0.1), made, accumulate, clip)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert_same_state(mine, theirs, 1e-5)
    assert step.steps == len(made) // accumulate


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_overflow_for_their_scale_are_left_out(accumulate, capture):
    mine, theirs = pair("linear")
    loss_fn = nn.CrossEntropyLoss()
    options = {"precision": "fp16", "capture": capture, "accumulate": accumulate}
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.1), **options)
    state = {"steps": 0, "loss_scale": {"scale": 2.0**24, "healthy": 0}}
    step.load_state_dict(state)
    assert step.state_dict() == state
    made = list(batches("cross-entropy")) * 4
    got = torch.stack([step(x, y) for x, y in made])
    kept = step.state_dict()["loss_scale"]["scale"]
    assert kept < 2.0**24
    assert step.steps == len(made) // accumulate - round(math.log2(2.0**24 / kept))
    theirs = torch_bp.convert(theirs)
    scaled = by_scaler(theirs, loss_fn, optim.SGD(theirs.parameters(), lr=0.1), made, accumulate, scale=2.0**24)
    torch.testing.assert_close(got, scaled, rtol=1e-6, atol=1e-6)
    assert_same_state(mine, theirs, 1e-5)


def test_float16_in_an_open_window():
    model, _ = pair("linear")
    step = TrainStep(
        model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1), precision="fp16", accumulate=2
    )
    x, y = next(iter(batches("cross-entropy")))
    step(x, y)
    with pytest.raises(RuntimeError, match="a window must not be open with precision='fp16'"):
        step.backward(x, y)
    step.drop()
    step.backward(x, y)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 1}], ids=str)
def test_float16_with_losses_that_leave_out_defaults(options):
    mine, theirs = pair("linear")
    theirs, loss_fn = torch_bp.convert(theirs), nn.CrossEntropyLoss(**options)
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.01), precision="fp16")
    made = list(batches("cross-entropy"))
    got = torch.stack([step(x, y) for x, y in made])
    expected = by_scaler(theirs, loss_fn, optim.SGD(theirs.parameters(), lr=0.01), made)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_gradients_that_overflow_at_any_scale_are_an_error():
    model, _ = pair("linear")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1), precision="fp16")
    x, y = next(iter(batches("cross-entropy")))
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="it is in a parameter"):
        step(x, y)
    assert step.state_dict()["loss_scale"]["scale"] == 2.0**16


def test_precision_is_checked():
    model, _ = pair("linear")
    with pytest.raises(ValueError, match="precision must be None, 'bf16' or 'fp16', got 'fp8'"):
        TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()), precision="fp8")


class Encoder(torch.nn.Module):
    """An encoder that is not to be trained, a Function of somebody else, and an activation that is an attribute."""

    def __init__(self):
        super().__init__()
        self.encoder, self.first, self.last = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 5)
        self.activation = torch.tanh

    def forward(self, x, scale=1.0):
        with torch.no_grad():
            target = self.encoder(x)
        h = self.activation(self.first(x)) + target
        return self.last(Straight.apply(h)) * scale


class Straight(torch.autograd.Function):
    """Rounds, and lets the gradient through as if it did not."""

    @staticmethod
    def forward(ctx, x):
        return x.mul(4).round().div(4)

    @staticmethod
    def backward(ctx, dy):
        return dy


@pytest.mark.parametrize("capture", ["auto", False])
def test_no_grad_and_functions_of_others(capture):
    torch.manual_seed(1)
    mine = Encoder()
    theirs = copy.deepcopy(mine)
    loss_fn = nn.CrossEntropyLoss()
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.1), capture=capture)
    data = list(batches("cross-entropy"))
    got = torch.stack([step(x, y) for x, y in data])
    expected = by_autograd(theirs, loss_fn, optim.SGD(theirs.parameters(), lr=0.1), data)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert_same_state(mine, theirs, 1e-6)
    assert mine.encoder.weight.grad is None
    x, y = data[0]
    for scale in (1.0, 3.0):
        expected = loss_fn(mine(x, scale), y).detach()
        torch.testing.assert_close(step((x, scale), y), expected, rtol=1e-6, atol=0)
    mine.activation = torch.relu
    expected = loss_fn(mine(x), y).detach()
    torch.testing.assert_close(step(x, y), expected, rtol=1e-6, atol=0)
    assert torch.autograd.Function.__dict__["apply"] is BEFORE


def test_what_is_frozen_or_unused_does_not_move():
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.use_a = nn.Linear(12, 5), nn.Linear(12, 5), True

        def forward(self, x):
            return (self.a if self.use_a else self.b)(x)

    for capture in (True, False):
        model = Branches()
        step = TrainStep(
            model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1, momentum=0.0), capture=capture
        )
        data = list(batches("cross-entropy"))
        for x, y in data[:2]:
            step(x, y)
        model.use_a = False
        before = copy.deepcopy(model.a.state_dict())
        for x, y in data[2:4]:
            step(x, y)
        torch.testing.assert_close(model.a.state_dict(), before, rtol=0, atol=0)
        model.use_a = True
        model.a.weight.requires_grad_(False)
        for x, y in data[4:]:
            step(x, y)
        torch.testing.assert_close(model.a.weight, before["weight"], rtol=0, atol=0)
        assert not torch.equal(model.a.bias, before["bias"])


def test_gradients_of_backward_are_the_callers():
    model, _ = pair("linear")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    first, second = list(batches("cross-entropy", 2))
    step.backward(*first)
    kept = model.weight.grad
    before = kept.clone()
    model.zero_grad()
    step.backward(*second)
    assert torch.equal(kept, before)
    assert kept.untyped_storage().nbytes() == kept.numel() * 4


def test_writes_to_views_are_refused():
    class Filling(torch.nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.first, self.whole = nn.Linear(12, 5), whole

        def forward(self, x):
            h = self.first(x)
            out = torch.zeros(len(x), 5)
            if self.whole:
                out[:, :2] = h[:, :2]
            else:
                out[:, :2].copy_(h[:, :2])
            return out + h

    x, y = next(batches("cross-entropy"))
    mine = Filling(whole=True)
    theirs = copy.deepcopy(mine)
    TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters())).backward(x, y)
    nn.CrossEntropyLoss()(theirs(x), y).backward()
    torch.testing.assert_close(mine.first.weight.grad, theirs.first.weight.grad)
    mine.whole = False
    with pytest.raises(RuntimeError, match="a view must not be written to"):
        TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters()))(x, y)


def test_steps_in_threads():
    def run(seed):
        torch.manual_seed(seed)
        model = nn.MLP([12, 8, 5])
        step = TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
        return [step(x[: 3 + n], y[: 3 + n]).item() for n in range(8) for x, y in batches("cross-entropy", 3)]

    expected = [run(0), run(0)]
    torch.manual_seed(0)
    models = [nn.MLP([12, 8, 5]) for _ in range(4)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())

    def again(model):
        step = TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
        return [step(x[: 3 + n], y[: 3 + n]).item() for n in range(8) for x, y in batches("cross-entropy", 3)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(again, models))
    assert all(result == expected[0] for result in results)


def test_many_kinds_of_batches_do_not_fill_the_memory():
    model, _ = pair("linear")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    x, y = next(batches("cross-entropy", size=60))
    for n in range(1, 60):
        step(x[:n], y[:n])
    assert len(step._runner.lines) <= 16


def test_copies_and_pickles_begin_anew():
    model, _ = pair("fused")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1), clip_grad_norm=0.5)
    data = list(batches("cross-entropy"))
    step(*data[0])
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert other.model is not model
        assert other.optimizer.param_groups[0]["params"][0] is next(other.model.parameters())
        model.load_state_dict(other.model.state_dict())
        assert torch.equal(other(*data[1]), step(*data[1]))
        assert_same_state(other.model, model)


def test_inputs_that_require_gradients_and_captures_that_cannot_be_are_refused():
    model, _ = pair("linear")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()), capture=True)
    x, y = next(batches("cross-entropy"))
    with pytest.raises(ValueError, match="inputs must not require gradients"):
        step(x.clone().requires_grad_(), y)
    negative = torch.view_as_complex(torch.stack([x, -x], 2)).conj().imag
    assert negative.is_neg()
    handle = model.register_forward_hook(lambda *_: None)
    with pytest.raises(NotCapturableError, match="hooks"):
        step(x, y)
    handle.remove()
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.0))
    assert step(x, y) == step(negative, y) == step(x, y)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            (torch.zeros(6, 12), torch.zeros(6).long(), 2),
            r"tensors must be .*, got a tensor; put .* step.epoch\(\[x, y\]",
        ),
        (([torch.zeros(6, 12), [0] * 6], 2), "tensors must be a list .* got one of Tensor, list"),
        (
            (DataLoader(TensorDataset(torch.zeros(6, 12), torch.zeros(6).long())), 2),
            r"tensors must be .* got DataLoader; .* of a loader: step\(x, y\)",
        ),
        (([torch.zeros(6, 12), torch.zeros(6).long()], torch.zeros(6).long()), "batch_size must be an int, got Tensor"),
    ],
)
def test_an_epoch_is_of_tensors_in_a_list(arguments, words):
    model, _ = pair("linear")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match=f"TrainStep.epoch: {words}"):
        step.epoch(*arguments)


def test_a_class_is_no_loss_function():
    model, _ = pair("linear")
    with pytest.raises(
        TypeError, match=r"loss_fn must be a function or a module, got the class .*CrossEntropyLoss\(\)"
    ):
        TrainStep(model, nn.CrossEntropyLoss, optim.SGD(model.parameters()))


def test_a_step_says_what_it_is_of():
    model, loss_fn = nn.MLP([4, 3]), nn.MSELoss()
    step = TrainStep(model, loss_fn, optim.SGD(model.parameters(), lr=0.1), accumulate=2, precision="bf16")
    assert repr(step) == "TrainStep(MLP, MSELoss, SGD, accumulate=2, precision='bf16', steps=0)"
    step.accumulate, step.clip_grad_norm = 1, 2.0
    step(torch.zeros(2, 4), torch.zeros(2, 3))
    assert repr(step) == "TrainStep(MLP, MSELoss, SGD, clip_grad_norm=2.0, precision='bf16', steps=1)"


def test_a_failure_takes_back_what_the_pass_has_done():
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), torch.nn.PReLU(), nn.Linear(8, 5))
    before = copy.deepcopy(model.state_dict())
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    with pytest.raises(UnknownBackwardError):
        step(*next(batches("cross-entropy")))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_norm_that_overflows_where_no_number_does():
    model = nn.Linear(12, 5, dtype=torch.float64)
    step = TrainStep(model, lambda out, _: 1e200 * out.sum(), optim.SGD(model.parameters(), lr=0.0))
    assert torch.isfinite(step(torch.ones(4, 12, dtype=torch.float64), torch.zeros(4)))


def rows(o, y, m):
    return ((o[m] - 1) ** 2).mean()


def masked_targets(o, y, m):
    return F.cross_entropy(o, y) * y[m].float().mean()


def selected(o, y, m):
    return torch.masked_select(o, m[:, None]).pow(2).mean()


def counted(o, y, m):
    return o.pow(2).mean() * len(torch.unique(y))


def repeated(o, y, m):
    return o[torch.repeat_interleave(torch.arange(len(y)), y)].pow(2).mean()


def picked(o, y, m):
    return o[torch.arange(len(y)), y].sum()


def from_a_list(o, y, m):
    return (o.mean(0) * torch.tensor([y[0], y[1], y[2], y[3], y[4]])).sum()


def split_by_indices(o, y, m):
    return o.tensor_split(y.sort().values[:2].clamp(1, 3))[1].sum() + o.mean()


def in_place_of_a_list(o, y, m):
    t = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    t *= y[:5]
    return (o * t).mean()


@pytest.mark.parametrize(
    "loss",
    [rows, masked_targets, selected, counted, repeated, picked, from_a_list, split_by_indices, in_place_of_a_list],
)
def test_losses_that_depend_on_values_otherwise_than_by_arithmetic(loss):
    mine, theirs = pair("linear")
    step = TrainStep(mine, loss, optim.SGD(mine.parameters(), lr=0.01), fallback="autograd")
    optimizer = optim.SGD(theirs.parameters(), lr=0.01)
    for k, (x, y) in enumerate(batches("cross-entropy")):
        m = torch.arange(len(y)) % (k + 2) == 0
        got = step(x, (y, m))
        expected = loss(theirs(x), y, m)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same_state(mine, theirs, 1e-5)


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.last = torch.nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x):
        return self.last(self.body(x.view(len(x), 3, 4))[0][:, -1])


FALLEN_BACK = {
    "random slopes": lambda: torch.nn.Sequential(nn.Linear(12, 8), torch.nn.RReLU(), nn.Linear(8, 5)),
    "recurrent": Recurrent,
}


@pytest.mark.parametrize("model", FALLEN_BACK)
def test_what_writes_and_returns_and_what_has_no_working_form_for_given_memory(model):
    torch.manual_seed(1)
    mine = FALLEN_BACK[model]()
    theirs = copy.deepcopy(mine)
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters(), lr=0.1), fallback="autograd")
    torch.manual_seed(2)
    got = torch.stack([step(x, y) for x, y in batches("cross-entropy")])
    torch.manual_seed(2)
    expected = by_autograd(
        theirs, nn.CrossEntropyLoss(), optim.SGD(theirs.parameters(), lr=0.1), batches("cross-entropy")
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_sparse_gradients_run_uncaptured():
    def make():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Embedding(12, 5, sparse=True))

    mine, theirs = make(), make()
    loss = lambda o, y: o.pow(2).sum() + o.mean()  # noqa: E731
    step = TrainStep(mine, loss, optim.SGD(mine.parameters(), lr=0.1), fallback="autograd")
    optimizer = optim.SGD(theirs.parameters(), lr=0.1)
    for k in range(4):
        x = torch.arange(6) + k
        step(x, x)
        optimizer.zero_grad()
        loss(theirs(x), x).backward()
        optimizer.step()
    assert_same_state(mine, theirs, 1e-6)


@pytest.mark.parametrize("capture", [True, False])
def test_gradients_in_one_memory_are_clipped_once(capture):
    class Sums(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(12, 5)
            self.a, self.b = (torch.nn.Parameter(torch.zeros(16, 12)) for _ in range(2))
            self.c = torch.nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.last(x + self.a + self.b) + self.c.sum()

    torch.manual_seed(1)
    mine = Sums()
    theirs = copy.deepcopy(mine)
    data = list(batches("squared"))
    step = TrainStep(mine, nn.MSELoss(), optim.SGD(mine.parameters(), lr=1.0), clip_grad_norm=0.01, capture=capture)
    for x, y in data:
        step(x, y)
    by_autograd(theirs, nn.MSELoss(), optim.SGD(theirs.parameters(), lr=1.0), data, clip=0.01)
    assert_same_state(mine, theirs, 1e-6)


def test_gradients_that_are_shared_with_another_process_move_the_memory():
    mine, theirs = pair("fused")
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters(), lr=0.1))
    data = list(batches("cross-entropy"))
    for k, (x, y) in enumerate(data):
        step(x, y)
        if k == 2:
            for p in mine.parameters():
                p.grad.share_memory_()
    by_autograd(theirs, nn.CrossEntropyLoss(), optim.SGD(theirs.parameters(), lr=0.1), data)
    assert_same_state(mine, theirs)


def test_batches_seen_in_another_dtype_and_conjugated():
    model = nn.Linear(8, 5)

    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, z):
            return self.inner(torch.view_as_real(z.resolve_conj()).flatten(1))

    whole = torch.randn(40, 4, dtype=torch.complex64)
    module = Parts()
    step = TrainStep(module, nn.CrossEntropyLoss(), optim.SGD(module.parameters(), lr=0.0))
    y = torch.arange(8) % 5
    for k in range(5):
        for z in (whole[8 * k : 8 * k + 8], whole[8 * k : 8 * k + 8].conj()):
            torch.testing.assert_close(step(z, y), nn.CrossEntropyLoss()(module(z), y).detach(), rtol=0, atol=0)


def test_modules_in_a_function_around_the_loss():
    mine, theirs = pair("linear")
    heads = [nn.Linear(5, 5), nn.Linear(5, 5)]
    heads[1].load_state_dict(heads[0].state_dict())
    losses = [lambda o, y, head=head: F.cross_entropy(head(o), y) for head in heads]
    optimizers = [optim.SGD([*m.parameters(), *h.parameters()], lr=0.1) for m, h in zip((mine, theirs), heads)]
    step = TrainStep(mine, losses[0], optimizers[0])
    for x, y in batches("cross-entropy"):
        step(x, y)
    by_autograd(theirs, losses[1], optimizers[1], batches("cross-entropy"))
    assert_same_state(*heads)
    assert_same_state(mine, theirs)


def test_update_applies_the_gradients_of_backward():
    mine, theirs = pair("fused")
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters(), lr=0.1))
    step.update()
    data = list(batches("cross-entropy"))
    for x, y in data:
        step.backward(x, y)
        step.update()
        mine.zero_grad()
    by_autograd(theirs, nn.CrossEntropyLoss(), optim.SGD(theirs.parameters(), lr=0.1), data)
    assert_same_state(mine, theirs)
    assert step.steps == len(data)
    step.clip_grad_norm = 1e-9
    before = copy.deepcopy(mine.state_dict())
    step(*data[0])
    torch.testing.assert_close(mine.state_dict(), before, rtol=1e-6, atol=1e-7)


def test_transforms_and_scripted_modules_are_refused():
    class Mapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(12, 8), nn.Linear(12, 5)

        def forward(self, x):
            return self.last(x * torch.vmap(lambda v: (v * v).sum())(self.first(x))[:, None])

    x, y = next(batches("cross-entropy"))
    model = Mapped()
    for fallback in ("error", "autograd"):
        with pytest.raises(UnknownBackwardError, match="transform of torch"):
            TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()), fallback=fallback)(x, y)
    model = torch.nn.Sequential(torch.jit.script(torch.nn.Linear(12, 5)))
    with pytest.raises(TypeError, match="scripted"):
        TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))


def test_a_wrong_label_takes_back_running_statistics():
    model, _ = pair("normalised")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    x, y = next(batches("cross-entropy"))
    step(x, y)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IndexError, match="out of bounds"):
        step(x, y + 3)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.isfinite(step(x, y))


def test_zeros_that_are_filled_are_zeros_again_and_slices_are_where_they_are():
    class Adding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 5)

        def forward(self, x):
            out = torch.zeros(len(x), 5)
            out += self.first(x)
            count = torch.zeros(12)
            count += x.mean(0)
            return out + count.sum()

    torch.manual_seed(1)
    mine = Adding()
    theirs = copy.deepcopy(mine)
    whole = torch.cat([x for x, _ in batches("cross-entropy")])
    data = [(whole[16 * k : 16 * k + 16], y) for k, (_, y) in enumerate(batches("cross-entropy"))]
    data = data[3:] + data[:3]  # what is captured does not begin where its memory does
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters(), lr=0.1), capture=True)
    got = torch.stack([step(x, y) for x, y in data])
    expected = by_autograd(theirs, nn.CrossEntropyLoss(), optim.SGD(theirs.parameters(), lr=0.1), data)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert_same_state(mine, theirs, 1e-6)


class InPlace(torch.nn.Module):
    """Writes to its batch, to a frozen copy of a weight, to an attribute, and past the version counter."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.last = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 5)
        self.key.requires_grad_(False)
        self.seen = torch.zeros(())
        self.register_buffer("rows", torch.zeros(2, 8))

    def forward(self, x):
        x.mul_(0.5)
        with torch.no_grad():
            self.key.weight.mul_(0.9).add_(self.query.weight, alpha=0.1)
            self.key.bias.data.mul_(0.5)
            self.seen += 1
            h = self.key(x)
            self.rows[0].add_(h.mean(0))
            self.rows[1].add_(h.var(0))
        return self.last(torch.tanh(self.query(x)) + h) + 0.01 * self.rows.sum()


@pytest.mark.parametrize("capture", [True, False])
def test_what_a_forward_writes_it_writes_once(capture):
    torch.manual_seed(0)
    mine = InPlace()
    theirs = copy.deepcopy(mine)
    loss_fn = nn.CrossEntropyLoss()
    step = TrainStep(mine, loss_fn, optim.SGD(mine.parameters(), lr=0.1), capture=capture, fallback="autograd")
    given, also = (list(batches("cross-entropy")) for _ in range(2))
    got = torch.stack([step(x, y) for x, y in given])
    optimizer = optim.SGD(theirs.parameters(), lr=0.1)
    expected = by_autograd(theirs, loss_fn, optimizer, also)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert_same_state(mine, theirs, 1e-6)
    assert mine.seen == theirs.seen
    torch.testing.assert_close([x for x, _ in given], [x for x, _ in also])
    takes_back(step, mine)


@pytest.mark.parametrize("capture", [True, False])
def test_the_first_step_takes_back_what_it_wrote_when_it_is_not_finite(capture):
    mine = InPlace()
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters()), fallback="autograd", capture=capture)
    takes_back(step, mine)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("capture", [True, False])
def test_looking_for_where_it_comes_from_writes_nothing(capture, watched):
    mine = InPlace()
    step = TrainStep(mine, nn.CrossEntropyLoss(), optim.SGD(mine.parameters()), fallback="autograd", capture=capture)
    if watched:
        torch_bp.watch(step, every=100, budget=None, silent=True)
    x, y = next(iter(batches("cross-entropy")))
    step(x, y)
    with torch.no_grad():
        mine.last.weight.fill_(3e38)  # finite, as is the batch, and the result is not
        mine.last.bias.fill_(3e38)
    before, seen, given = copy.deepcopy(mine.state_dict()), mine.seen.clone(), x.clone()
    with pytest.raises(FloatingPointError, match="forward of"):
        step(x, y)
    torch.testing.assert_close(dict(mine.state_dict()), dict(before), rtol=0, atol=0)
    assert mine.seen == seen
    torch.testing.assert_close(x, 0.5 * given)  # once, by the step


def takes_back(step, model):
    """A batch with NaN changes nothing."""
    before = copy.deepcopy(model.state_dict())
    x, y = next(iter(batches("cross-entropy")))
    x[1, 2] = float("nan")
    with pytest.raises(FloatingPointError):
        step(x, y)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_copies_in_bfloat16_see_what_versions_do_not():
    mine, theirs = pair("linear")
    theirs, loss_fn = torch_bp.convert(theirs), nn.CrossEntropyLoss()
    step = TrainStep(mine, loss_fn, optim.Adam(mine.parameters(), lr=0.01), precision="bf16")
    optimizer = optim.Adam(theirs.parameters(), lr=0.01)
    for number, (x, y) in enumerate(batches("cross-entropy")):
        for model in (mine, theirs):
            first, *_, last = model.parameters()
            if number == 2:
                first.data.mul_(0.5)
            if number == 3:
                last.data = last.data + 1
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(theirs(x), y)
        loss.backward()
        torch.testing.assert_close(step(x, y), loss.detach(), rtol=0, atol=0)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_state(mine, theirs)


def test_products_in_bfloat16_read_the_copies():
    model, _ = pair("linear")
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters(), lr=0.0), precision="bf16")
    x, y = next(iter(batches("cross-entropy")))
    before = step(x, y)
    step._runner.trusting = True
    for p in model.parameters():
        step._passes.copies.of(p).zero_()
    assert step(x, y) != before


def test_many_steps_in_bfloat16_are_those_of_single_ones():
    mine, theirs = pair("linear")
    loss_fn = nn.CrossEntropyLoss()
    made = [b for b in batches("cross-entropy") if len(b[1]) == len(next(iter(batches("cross-entropy")))[1])]
    xs, ys = torch.stack([x for x, _ in made]), torch.stack([y for _, y in made])
    one = TrainStep(mine, loss_fn, optim.Adam(mine.parameters(), lr=0.01), precision="bf16")
    other = TrainStep(theirs, loss_fn, optim.Adam(theirs.parameters(), lr=0.01), precision="bf16")
    torch.testing.assert_close(one.many(xs, ys), torch.stack([other(x, y) for x, y in made]), rtol=0, atol=0)
    assert_same_state(mine, theirs)


def test_two_models_of_one_optimizer():
    first, second = pair("linear")
    plain = copy.deepcopy((first, second))
    optimizer = optim.SGD([*first.parameters(), *second.parameters()], lr=0.1, momentum=0.9)
    reference = torch.optim.SGD([p for model in plain for p in model.parameters()], lr=0.1, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    steps = [TrainStep(model, loss_fn, optimizer) for model in (first, second)]
    for number, (x, y) in enumerate(batches("cross-entropy")):
        steps[number % 2](x, y)
        reference.zero_grad()
        loss_fn(plain[number % 2](x), y).backward()
        reference.step()
    for mine, theirs in zip((first, second), plain):
        assert_same_state(mine, theirs, 1e-6)
    with pytest.raises(AttributeError):
        steps[0].optimizer = reference
