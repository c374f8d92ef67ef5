"""TrainStep.trace: its values and error signals are autograd's, and it leaves nothing behind."""

import copy

import pytest
import torch

from tests.step.test_train_step import MODELS, Convolution, Deciding, batches, tied
from torch_bp import nn, optim
from torch_bp.step import TrainStep
from torch_bp.step.explicit import UnknownBackwardError
from torch_bp.step.figure import columns

DEEP = {
    "eight": lambda: nn.Sequential(*(m for _ in range(7) for m in (nn.Linear(12, 12), nn.Tanh())), nn.Linear(12, 5)),
    "fifty": lambda: nn.MLP([12, *[12] * 50, 5], residual=True),
}


def make(model, loss_fn=None, **options):
    torch.manual_seed(1)
    model = (MODELS | DEEP)[model]() if isinstance(model, str) else model() if isinstance(model, type) else model
    return TrainStep(model, loss_fn or nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1), **options)


def batch():
    return next(batches("cross-entropy"))


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_autograds_and_pass_the_check(model):
    step = make(model, nn.NLLLoss() if "inside" in model else None)
    x, y = batch()
    theirs = copy.deepcopy(step.model)
    torch.manual_seed(2)
    loss = step.loss_fn(theirs(x), y)
    loss.backward()
    torch.manual_seed(2)
    trace = step.trace(x, y, check=True)
    torch.testing.assert_close(trace.loss, loss.detach(), rtol=1e-6, atol=0)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert trace.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(trace.gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert trace.passed, str(trace)
    assert set(trace.against_differences) == set(trace.trained)
    assert max(trace.against_differences.values()) < 1e-5


def test_values_and_error_signals_are_those_of_torchs_own_modules():
    torch.manual_seed(1)
    t = torch.nn
    model = t.Sequential(t.Linear(12, 8), t.BatchNorm1d(8), t.Tanh(), t.Linear(8, 8), t.GELU(), t.Linear(8, 5)).double()
    x, y = batch()
    x = x.double()
    found = []
    h = x
    for module in copy.deepcopy(model):
        h = module(h)
        h.retain_grad()
        found.append(h)
    torch.nn.functional.cross_entropy(h, y).backward()
    trace = make(model).trace(x, y)
    assert [line.path for line in trace] == ["0", "1", "2", "3", "4", "5", "loss"]
    for line, expected in zip(trace, found):
        torch.testing.assert_close(line.output, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(line.error, expected.grad, rtol=1e-12, atol=1e-12)
    assert trace["0"].z is trace[1].output
    assert trace["3"].dz is trace["4"].dz  # sent back by one, the error signal of the other
    assert trace[4].da is trace[3].dy
    torch.testing.assert_close(trace["0"].dW, trace["0"].dz.T @ x)
    torch.testing.assert_close(trace["0"].db, trace["0"].dz.sum(0))
    assert trace[7].dL == 1
    torch.testing.assert_close(trace.output, found[-1].detach())


def test_signals_of_several_takers_are_added():
    trace = make("own forward").trace(*batch())
    line = next(line for line in trace if line.name == "Relu")
    takers = [(other, s) for other in trace for s, n in other.sources.items() if n == line.number]
    assert len(takers) == 2
    assert torch.equal(line.dy, sum(other.gradients[s] for other, s in reversed(takers)))
    assert f"dy = dx1 of {takers[1][0].number} + da of {takers[0][0].number}" in str(trace)
    assert [other.path for other in trace.of("shared")] == ["shared"] * 2


def test_what_is_written_to_later_is_kept_as_it_was():
    step = make("in place")
    x, y = batch()
    trace = step.trace(x, y)
    with torch.no_grad():
        torch.testing.assert_close(trace["first"].z, step.model.first(x))


class Counting(torch.nn.Module):
    """Writes to a buffer, replaces one, counts, and remembers."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.norm = nn.Linear(12, 5), nn.Dropout(0.5), nn.BatchNorm1d(5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(5))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        h = self.drop(self.norm(self.first(x)))
        self.mean = h.mean(0)
        self.last = h
        return h


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_leaves_nothing_behind(check, at):
    step, other = make(Counting, accumulate=2), make(Counting, accumulate=2)
    x, y = batch()
    for each in (step, other):
        torch.manual_seed(3)
        for _ in range(at):
            each(x, y)
    objects = dict(step.model.named_buffers()) | dict(step.model.named_parameters())
    versions = {name: t._version for name, t in objects.items()}
    grads = [p.grad for p in step.model.parameters()]
    ran, lines = step._window.ran, step._runner.lines
    attributes = dict(step.model.__dict__)
    random = torch.get_rng_state()
    given = x.clone()
    trace = step.trace(x, y, check=check)
    assert trace.passed is (True if check else None)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)
    assert step.model.__dict__ == attributes
    after = dict(step.model.named_buffers()) | dict(step.model.named_parameters())
    for name, t in objects.items():
        assert after[name] is t, name
        assert t._version == versions[name], name
    assert all(p.grad is g for p, g in zip(step.model.parameters(), grads))
    assert step._window.ran is ran
    assert step._runner.lines == lines
    for each in (step, other):
        torch.manual_seed(4)
        each(x, y), each(x, y)
    for a, b in zip(step.model.state_dict().values(), other.model.state_dict().values()):
        assert torch.equal(a, b)


def test_nothing_is_left_behind_after_an_error():
    step = make(Counting)
    x, y = batch()
    before = copy.deepcopy(step.model.state_dict())
    for bad in ((x[:, :3], y), (x, y[:3]), (x, y + 99)):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            step.trace(*bad)
    assert step.model.calls == 0
    assert all(torch.equal(v, before[k]) for k, v in step.model.state_dict().items())
    step(x, y)


def test_frozen_layers_are_shown_without_error_signals():
    step = make(nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)))
    step.model[0].requires_grad_(False)
    trace = step.trace(*batch(), check=True)
    assert trace.passed
    assert not trace["0"].errors
    assert not trace["1"].errors
    assert set(trace["2"].gradients) == {"dW", "db"}
    assert str(trace).count("nothing to train up to here") == 2
    assert str(trace).count("frozen") == 2
    assert columns(trace)[1].frozen


class Two(torch.nn.Module):
    """Two arguments, two results, one operation with several."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 4), nn.Linear(5, 4)

    def forward(self, x, z):
        left, right = (self.a(x) + self.b(z)).chunk(2, 1)
        return left * right, right.tanh()


def test_several_arguments_results_and_a_loss_with_parameters():
    torch.manual_seed(1)
    model = Two()

    def loss_fn(out, y):
        return (out[0] - y).square().mean() + out[1].mean() + 0.1 * sum((p * p).sum() for p in model.parameters())

    step = make(model, loss_fn)
    trace = step.trace((batch()[0], torch.randn(16, 5)), torch.zeros(16, 2), check=True)
    assert trace.passed, str(trace)
    assert [tuple(t.shape) for t in trace.batch] == [(16, 12), (16, 5)]
    assert [tuple(t.shape) for t in trace.output] == [(16, 2), (16, 2)]
    chunk = next(line for line in trace if line.name == "chunk")
    assert set(chunk.outputs) == {"y1", "y2"}
    assert set(chunk.errors) == {"dy1", "dy2"}
    assert torch.equal(chunk.dx, torch.cat([chunk.dy1, chunk.dy2], 1))
    assert {line.path for line in trace} == {"a", "b", "", "loss"}
    assert len(trace.of("a")) == 1
    assert len(columns(trace)) <= len(trace) + 1
    trace.figure()


def test_what_is_written_in_place_at_either_end():
    def loss_fn(out, y):
        loss = out.square().mean()
        loss *= 3
        return loss

    torch.manual_seed(1)
    step = make(torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Linear(12, 5)), loss_fn)
    x, y = batch()
    given = x.clone()
    trace = step.trace(x, y, check=True)
    assert torch.equal(x, given)
    assert torch.equal(trace.batch[0], given)
    assert trace.passed, str(trace)
    assert next(line for line in trace if line.name == "mean").dy == 3
    assert trace["1"].dz.norm() == pytest.approx((6 * trace.output / trace.output.numel()).norm().item(), rel=1e-5)


def test_numbers_that_are_not_finite():
    step = make("without bias")
    with torch.no_grad():
        step.model[0].weight.fill_(1e30)
    x, y = batch()
    trace = step.trace(x.abs() * 1e20, y, check=True)
    assert trace.passed is False
    assert "inf" in str(trace)
    assert "nan" in trace.markdown()
    pytest.importorskip("matplotlib")
    trace.figure()


def test_tied_parameters_get_the_sum():
    torch.manual_seed(1)
    trace = make(tied()).trace(*batch())
    torch.testing.assert_close(trace.gradients["0.weight"], trace["0"].dW + trace["2"].dW)


class Unused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.never = nn.Linear(12, 5), nn.Linear(12, 5), nn.Linear(2, 2)

    def forward(self, x):
        self.unused(x)
        return self.used(x)


def test_what_the_loss_does_not_depend_on_gets_no_signal():
    trace = make(Unused).trace(*batch(), check=True)
    assert trace.passed
    assert trace["unused"].error is None
    assert not trace["unused"].gradients
    assert "no error signal arrives" in str(trace)
    assert set(trace.gradients) == {"used.weight", "used.bias"}


@pytest.mark.parametrize("model", [Convolution, Deciding])
def test_what_is_left_to_autograd(model):
    step = make(model, fallback="autograd")
    trace = step.trace(*batch(), check=True)
    assert trace.passed, str(trace)
    assert all(name in trace.values for line in trace for name in line.parameters.values())


def test_refuses_what_the_step_refuses():
    with pytest.raises(UnknownBackwardError, match=r"module 'body\.0' calls"):
        make(Convolution).trace(*batch())
    step = make(Convolution)
    step.model.body.requires_grad_(False)  # no backward is wanted of it
    assert step.trace(*batch(), check=True).passed
    step.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="depends on no parameter"):
        step.trace(*batch())
    with pytest.raises(ValueError, match="one number"):
        make("linear", nn.CrossEntropyLoss(reduction="none")).trace(*batch())


def test_other_precisions():
    model = MODELS["fused"]().bfloat16()
    x, y = batch()
    trace = make(model).trace(x.bfloat16(), y, check=True)
    assert trace.passed, str(trace)
    assert trace[1].dW.dtype is torch.bfloat16


def test_a_wrong_backward_fails_the_check(monkeypatch):
    from torch_bp.ops.linear import Linear

    right = Linear.backward

    def wrong(ctx, dz):
        da, dw, db = right(ctx, dz)
        return da, None if dw is None else dw * 1.01, db

    monkeypatch.setattr(Linear, "backward", staticmethod(wrong))
    trace = make("activations").trace(*batch(), check=True)
    assert trace.passed is False
    assert "check FAILED for 0.weight, 2.weight" in str(trace)
    assert "0.bias" not in trace.verdict()
    assert "WRONG" in trace.markdown()
    assert max(trace.against_differences.values()) == pytest.approx(0.01, rel=0.1)


class Rounding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 5)

    def forward(self, x):
        return self.first(x).to(torch.float32)


def test_says_why_there_are_no_central_differences():
    trace = make(Rounding).trace(*batch(), check=True)
    assert trace.passed
    assert not trace.against_differences
    assert "no central differences: in float64, TypeError: the loss of float64" in str(trace)


def test_lines_are_found_by_number_and_by_module():
    trace = make("own forward").trace(*batch())
    assert trace.lines[0] is trace[1]
    assert len(trace) == len(list(trace))
    for key, error, says in (
        (0, IndexError, "number 1 to"),
        (99, IndexError, "got 99"),
        ("nowhere", KeyError, "no operation ran in module 'nowhere'; there are"),
        ("shared", KeyError, "several lines, 4, 8"),
    ):
        with pytest.raises(error, match=says):
            trace[key]
    with pytest.raises(AttributeError, match="has no 'dV'; it has z, dW, db, dz"):
        trace["first"].dV  # noqa: B018
    assert "dW" in dir(trace["first"])
    assert "dW 8x12" in repr(trace["first"])
    copy.copy(trace["first"])
    assert trace["first"].summary("dW").norm == pytest.approx(trace["first"].dW.norm().item(), rel=1e-6)


def test_text():
    step = make("without bias")
    trace = step.trace(*batch())
    lines = str(trace).splitlines()
    assert lines[0] == f"Algorithm 1 of Sequential, in training, for a batch of 16x12: loss {trace.loss.item():.6g}"
    titles = ("Forward pass", "Backward pass", "Parameters")
    forward, backward, parameters = (lines.index(title) for title in titles)
    z, y = trace["0"].z, trace["1"].y
    assert " ".join(lines[forward + 4].split()).startswith("1 0 z = a W^T + b, eq. 1 z 16x8")
    assert f"{z.norm().item():.2f}" in lines[forward + 4]
    assert lines[forward + 5].endswith(f"{100 * (y == 0).float().mean().item():.0f} %")
    assert [line.split()[0] for line in lines[backward + 3 : parameters - 1]] == ["4", "3", "dW", "2", "1"]
    ratio = trace["2"].dW.norm() / step.model[2].weight.norm()
    assert lines[parameters + 4].split()[0] == "2.weight"
    assert float(lines[parameters + 4].split()[-1]) == pytest.approx(ratio.item(), rel=0.01)
    assert "not checked" in lines[-1]
    assert all(len(line) < 130 for line in lines)


def test_markdown_and_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    trace = make("layer norm").trace(*batch(), check=True)
    text = trace.markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows[:5]} == {11}
    assert "`dx = r (g - <g> - x^ <x^ g>), g = w dy`" in text  # as code: its brackets are no HTML
    assert "check passed" in text
    with SummaryWriter(str(tmp_path)) as writer:
        trace.write(writer, "trace", 7)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("trace/text_summary")
    assert event.step == 7
    assert event.tensor_proto.string_val[0].decode() == text
    trace["loss"].forward = "L = |x - t|"
    assert "`L = \\|x - t\\|`" in trace.markdown()  # a bare one would end the cell
    with pytest.raises(TypeError, match="SummaryWriter with add_text, got str"):
        trace.write("run")


@pytest.mark.parametrize("model", ["linear", "residual, separate", "own forward", "frozen", "torch's", *DEEP])
def test_figure(model, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    trace = make(model).trace(*batch())
    parts = columns(trace)
    figure = trace.figure()
    FigureCanvasAgg(figure).draw()
    network, names, norms = figure.axes
    shown = [text.get_text() for text in names.texts]
    for part in parts:
        assert any(part.path in text for text in shown)
    (values, errors, *_) = norms.lines
    assert list(values.get_ydata()) == pytest.approx([part.norm for part in parts])
    assert list(errors.get_ydata())[-1] == 1
    assert figure.get_size_inches()[0] <= 20
    far = [signal for k, part in enumerate(parts) for n, signal in part.sources.items() if n != k - 1]
    assert len(network.lines) == len(far) + sum(signal is not None for signal in far)
    numbers = [text.get_text() for text in network.texts]
    if len(parts) <= 18:
        assert f"{trace['loss'].dz.norm().item():.2g}" in numbers
        assert sum(map(len, (part.gradients for part in parts))) == sum("d" in t and "  " in t for t in shown)
    if model == "eight":  # with their activations
        assert len(parts) == 1 + 8 + 1
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_kink_is_no_wrong_gradient():
    """A unit whose bias is 0, and whose inputs are: ReLU is asked for its slope at 0."""
    torch.manual_seed(0)
    model = nn.MLP([4, 3, 3, 2])
    with torch.no_grad():
        model[0].weight.fill_(-1.0)
        model[0].bias.fill_(0.0)
        model[2].bias.fill_(0.0)
    step = TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters()))
    trace = step.trace(torch.rand(5, 4), torch.randint(2, (5,)), check=True)
    assert trace.passed
    assert max(trace.against_differences.values()) < 1e-6
    assert "check passed" in str(trace)
