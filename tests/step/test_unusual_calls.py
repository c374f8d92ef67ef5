"""Batches, tensors from elsewhere and modes that a captured step cannot take as they come."""

import copy

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import torch_bp
from torch_bp import nn, optim
from torch_bp.step.outcomes import NOT_FINITE, TAKEN, Outcomes
from torch_bp.step.snapshot import Snapshot

TARGETS = torch.tensor([0, 1, 2, 0, 0])


def inputs(*shape):
    return torch.randn(shape or (5, 4), generator=torch.Generator().manual_seed(1))


def step_of(model, loss_fn=None, **options):
    torch.manual_seed(0)
    return torch_bp.TrainStep(model, loss_fn or nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1), **options)


def assert_trains_as_autograd(make, data, loss_fn=None):
    """Steps on `data`, as many as it yields: inputs, targets; `data` is called with the model, for each way of it."""
    torch.manual_seed(0)
    model, loss_fn = make(), loss_fn or nn.CrossEntropyLoss()
    reference = copy.deepcopy(model)
    step, optimizer = step_of(model, loss_fn), optim.SGD(reference.parameters(), lr=0.1)
    for (x, y), (x2, y2) in zip(data(model), data(reference)):
        loss = step(x, y)
        wanted = loss_fn(reference(*(x2 if isinstance(x2, tuple) else (x2,))), y2)
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
        torch.testing.assert_close(loss, wanted.detach())
        torch.testing.assert_close([*model.parameters()], [*reference.parameters()])


class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, a, b):
        return self.linear(a + b)


class Onto(Sum):
    def forward(self, a, b):
        a.copy_(b)
        return self.linear(a + b)


@pytest.mark.parametrize("spread", ["expanded", "overlapping"])
def test_one_tensor_twice_whose_elements_share_memory(spread):
    def data(_):
        for _ in range(3):
            x = inputs(1, 4).expand(5, 4) if spread == "expanded" else inputs(8).unfold(0, 4, 1)
            yield (x, x), TARGETS

    assert_trains_as_autograd(Sum, data)


def test_inputs_that_are_written_to_and_share_their_memory():
    def data(_):
        yield (inputs(), inputs() + 1), TARGETS
        yield (inputs(), inputs() + 1), TARGETS
        x = inputs()
        yield (x, x), TARGETS
        whole = inputs(10, 4)
        yield (whole[:5], whole[5:]), TARGETS

    assert_trains_as_autograd(Onto, data)
    step, whole = step_of(Onto()), inputs(8, 4)
    step((inputs(), inputs()), TARGETS)
    with pytest.raises(RuntimeError, match="refer to a single memory location"):  # as torch says
        step((whole[:5], whole[3:]), TARGETS)


def test_a_gradient_that_a_step_handed_out_as_the_next_target():
    def data(model):
        yield inputs(8, 4), inputs(8, 4)
        for _ in range(3):
            yield inputs(8, 4), model[0].weight.grad

    def make():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    assert_trains_as_autograd(make, data, nn.MSELoss())


def test_an_expanded_buffer():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("factor", torch.full((1, 1), 2.0).expand(5, 4))

        def forward(self, x):
            return self.linear(x * self.factor)

    assert_trains_as_autograd(Model, lambda _: [(inputs(), TARGETS)] * 3)
    model = Model()
    before = Snapshot([model])
    model.factor[0, 0] = 5.0
    before.restore()
    assert torch.equal(model.factor, torch.full((5, 4), 2.0))


def test_batches_without_memory_or_without_strides():
    def sparse(_):
        for _ in range(3):
            yield inputs().to_sparse(), TARGETS

    class Dense(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x.to_dense() if x.is_sparse else x)

    assert_trains_as_autograd(Dense, sparse)

    def zeros(_):
        yield inputs(), inputs(5, 3)
        yield inputs(), inputs(5, 3)
        yield inputs(), torch._efficientzerotensor((5, 3))

    assert_trains_as_autograd(lambda: nn.MLP([4, 8, 3]), zeros, nn.MSELoss())


def test_a_tensor_around_others_is_no_batch_of_the_kind_of_what_is_in_it():
    step = step_of(nn.MLP([4, 8, 3]))
    step(inputs(), TARGETS)
    loss = step(TwoTensor(inputs(), inputs()), TARGETS)
    assert isinstance(loss, TwoTensor)
    step.capture = True
    with pytest.raises(RuntimeError, match="one around others"):
        step(TwoTensor(inputs(), inputs()), TARGETS)


@pytest.mark.parametrize("change", ["resized", "replaced", "replaced alike"])
def test_tensors_from_elsewhere_that_change_their_form_or_place(change):
    weight = torch.tensor([0.5, 1.0, 2.0])

    def loss_fn(o, t):
        return ((o * weight).sigmoid() * weight).sum()

    model = nn.MLP([4, 8, 3])
    step, x = step_of(model, loss_fn, capture=True), inputs()
    step(x, TARGETS)
    if change == "resized":
        weight.resize_(2)
    else:
        weight.data = torch.full((2 if change == "replaced" else 3,), 3.0)
    if change == "replaced alike":
        wanted = loss_fn(model(x), TARGETS)
        torch.testing.assert_close(step(x, TARGETS), wanted.detach())
    else:
        with pytest.raises(RuntimeError, match="must match the size"):
            step(x, TARGETS)


def test_a_parameter_that_is_cut_where_it_is():
    model = nn.MLP([4, 8, 3])
    step, x = step_of(model), inputs()
    step(x, TARGETS)
    model[0].bias.data = model[0].bias.data[:5]
    with pytest.raises(RuntimeError, match="must match the existing size"):
        step(x, TARGETS)


def test_transforms_and_tracers_see_every_operation():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    step, x = step_of(model), inputs()
    for _ in range(2):
        step(x, TARGETS)
    before = copy.deepcopy(model.state_dict())
    for transform in (torch.func.grad, lambda f: torch.vmap(lambda w: f(w.squeeze(0)))):
        with pytest.raises(RuntimeError, match=r"transform of torch\.func"):
            transform(lambda w: (step(x, TARGETS), w.sum())[1])(torch.ones(1, 3))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.autograd.forward_ad.dual_level(), torch.autograd.set_detect_anomaly(True):
        assert step(x, TARGETS).isfinite()


def test_a_default_device_is_not_that_of_the_buffers():
    step, x = step_of(nn.MLP([4, 8, 3])), inputs()
    with torch.device("meta"):
        assert step(x, TARGETS).is_cpu
        assert step(x[:3], TARGETS[:3]).isfinite()


class Averaging(torch.nn.Module):
    """Writes to a frozen parameter, to an attribute and to a trained parameter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.mean = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
        self.calls = torch.zeros(2)

    def forward(self, x):
        self.mean.data.mul_(0.9).add_(x.mean(0))
        self.calls += 1
        with torch.no_grad():
            torch._foreach_mul_([self.linear.bias], 0.5)
            torch.mul(self.linear.weight, 0.9, out=self.linear.weight.data)
        return self.linear(x)


@pytest.mark.parametrize("capture", ["auto", False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("failing", [False, True])
def test_what_a_refused_or_failed_step_has_written_is_taken_back(capture, first, failing):
    model = Averaging()
    step, x = step_of(model, capture=capture), inputs()
    if not first:
        step(x, TARGETS)
    before = copy.deepcopy((model.state_dict(), model.calls))
    with pytest.raises(IndexError if failing else FloatingPointError):
        step(x if failing else x * float("nan"), TARGETS + 5 if failing else TARGETS)
    torch.testing.assert_close((model.state_dict(), model.calls), before, rtol=0, atol=0)


class OntoView(torch.nn.Module):
    """Writes to a view, of which the whole is there, or not."""

    def __init__(self, whole_is_kept):
        super().__init__()
        self.linear, self.whole_is_kept = nn.Linear(4, 3), whole_is_kept

    def forward(self, x):
        whole = torch.zeros(5, 6)
        view = whole[:, :3]
        if not self.whole_is_kept:
            del whole
        view.copy_(self.linear(x))
        return view * 2


def test_a_view_that_is_all_that_is_left_of_a_tensor_is_written_to():
    assert_trains_as_autograd(lambda: OntoView(False), lambda _: [(inputs(), TARGETS)] * 3)
    with pytest.raises(RuntimeError, match="a view must not be written to"):
        step_of(OntoView(True))(inputs(), TARGETS)


class Pending:
    """An event that has not come to pass until somebody waits."""

    waited = 0

    def query(self):
        return False

    def synchronize(self):
        Pending.waited += 1


def test_batches_are_held_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(Pending, "waited", 0)
    outcomes = Outcomes(torch.device("cpu"), room=4, held=100)

    def note(about, size, code=TAKEN):
        outcomes.note(torch.tensor(code, dtype=torch.int32), about, size)
        _, slot, *rest = outcomes._waiting.pop()
        outcomes._waiting.append((Pending(), slot, *rest))

    for number in range(10):  # of room
        outcomes.found()
        note(number, 1)
    assert len(outcomes._waiting) == 4
    outcomes.found(wait=True)
    assert not outcomes._waiting
    for number in range(5):  # of bytes
        assert outcomes.found() == ([(NOT_FINITE, 0)] if number == 2 else [])
        note(number, 90, NOT_FINITE if number == 0 else TAKEN)
        assert len(outcomes._waiting) <= 2
    outcomes.found(wait=True)
    assert Pending.waited == 15


@pytest.mark.parametrize("change", ["another dtype", "another shape"])
def test_gradients_that_were_given_another_memory(change):
    model = nn.MLP([4, 8, 3])
    reference = copy.deepcopy(model)
    step, x, loss_fn = step_of(model), inputs(), nn.CrossEntropyLoss()
    step(x, TARGETS)
    for p in model.parameters():
        p.grad.data = p.grad.double() if change == "another dtype" else torch.zeros(2, 2)
    loss_fn(reference(x), TARGETS).backward()
    optim.SGD(reference.parameters(), lr=0.1).step()
    wanted = loss_fn(reference(x), TARGETS)
    torch.testing.assert_close(step(x, TARGETS), wanted.detach())
    reference.zero_grad()
    wanted.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()])


@pytest.mark.parametrize(
    ("name", "wrong", "right", "says"),
    [
        ("clip_grad_norm", 0, 0.5, "must be > 0, or None"),
        ("clip_grad_value", -1, 0.25, "must be > 0, or None"),
        ("accumulate", 0, 3, "at least 1"),
        ("capture", "always", False, "must be 'auto', True or False"),
    ],
)
def test_what_is_set_later_is_checked_and_belongs_to_copies(name, wrong, right, says):
    step = step_of(nn.MLP([4, 8, 3]))
    with pytest.raises(ValueError, match=f"{name} {says}" if "must" in says else says):
        setattr(step, name, wrong)
    setattr(step, name, right)
    assert getattr(copy.deepcopy(step), name) == right


def test_capture_that_is_asked_for_later_is_not_answered_by_what_could_not_be_before():
    def deciding(o, t):
        return (o * 2 if o.sum() > 0 else o).square().mean()

    step = step_of(nn.MLP([4, 8, 3]), deciding)
    step(inputs(), TARGETS)
    step.capture = True
    with pytest.raises(RuntimeError, match="reads the values"):
        step(inputs(), TARGETS)
