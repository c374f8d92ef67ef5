"""`gradcheck` passes right gradients, catches wrong ones by name, and leaves everything as it was."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

import torch_bp.nn as ours
from tests.tables import ROWS
from torch_bp.autograd import Function, gradcheck


def draw(*shape, dtype=torch.float64):
    return torch.randn(size=shape, dtype=dtype).requires_grad_()


def largest_error(report):
    return max(row.error for row in report.rows)


def function(forward, backward):
    """The `apply` of a Function that saves its inputs; `backward` takes the error signals, then the inputs."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, *signals):
            return backward(*signals, *ctx.saved_tensors)

    return Made.apply


# Right gradients


@pytest.mark.parametrize("row", [row for row in ROWS if not row.empty], ids=lambda row: row.id)
def test_operations(row):
    mine, _, tensors = row.pair(requires_grad=True)
    assert largest_error(gradcheck(mine, tensors)) < 1e-7


ACTIVATIONS = [
    ours.Sigmoid,
    ours.Tanh,
    ours.ReLU,
    ours.LeakyReLU,
    lambda: ours.Softmax(-1),
    lambda: ours.LogSoftmax(-1),
]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, nn.GELU, nn.SiLU, nn.Softplus])
def test_networks(activation):
    net = nn.Sequential(ours.Linear(3, 5), activation(), ours.Linear(5, 2)).double()
    report = gradcheck(net, draw(4, 3))
    assert largest_error(report) < 1e-7
    assert [row.name for row in report.rows] == [
        "input 0",
        "parameter 0.weight",
        "parameter 0.bias",
        "parameter 2.weight",
        "parameter 2.bias",
    ]


CLASSES, PROBABILITIES = torch.tensor([2, 0, 1, 0]), torch.linspace(0.1, 0.8, 12).double().view(4, 3)
LOSSES = {
    "MSELoss": PROBABILITIES,
    "HalfMSELoss": PROBABILITIES,
    "CrossEntropyLoss": CLASSES,
    "NLLLoss": CLASSES,
    "BCELoss": PROBABILITIES,
    "BCEWithLogitsLoss": PROBABILITIES,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    x = draw(4, 3)
    x = x.detach().sigmoid().requires_grad_() if name == "BCELoss" else x
    for source in (ours, nn):
        if hasattr(source, name):
            assert largest_error(gradcheck(getattr(source, name)(), (x, LOSSES[name]))) < 1e-7


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 2), (4, 3)),
        (nn.Conv1d(2, 3, 2), (2, 2, 4)),
        (nn.BatchNorm1d(3), (5, 3)),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()),
            (5, 3),
        ),  # a bias whose gradient is only rounding
        (nn.LayerNorm(3), (4, 3)),
        (nn.LSTM(2, 2), (3, 1, 2)),
        (nn.Bilinear(2, 2, 2), (3, 2)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (4, 3)),
        (nn.Dropout(0.5).eval(), (4, 3)),
        (nn.PReLU(), ()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_of_torch(module, shape):
    x = draw(*shape)
    report = gradcheck(module.double(), (x, draw(*shape)) if isinstance(module, nn.Bilinear) else x)
    assert largest_error(report) < 1e-7


@pytest.mark.parametrize("activation", [ours.Tanh, ours.Sigmoid])
def test_single_precision_does_not_cry_wolf(activation):
    for seed in range(50):
        torch.manual_seed(seed)
        net = nn.Sequential(ours.Linear(2, 3), activation(), ours.Linear(3, 2))
        assert largest_error(gradcheck(net, draw(2, 2, dtype=torch.float32), precise=False, full=True)) < 5e-3


def test_single_precision_steps_as_far_as_it_can():
    x = torch.tensor([3000.5], requires_grad=True)  # 1e-3 is four units in the last place, and some
    assert gradcheck(lambda x: x - 3000, x, precise=False).rows[0].error < 1e-6


def test_single_precision_in_normalisation():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    assert gradcheck(net, draw(8, 3, dtype=torch.float32), precise=False).rtol == 1e-2


LAYOUTS = {
    "slice": lambda: torch.randn(4, 6).double()[1:, ::2],
    "transposed": lambda: torch.randn(3, 4).double().t(),
    "expanded": lambda: torch.randn(4, 1).double().expand(4, 3),
    "expanded number": lambda: torch.randn(()).double().expand(4, 3),
    "windows": lambda: torch.randn(6).double().unfold(0, 3, 1),
    "no leaf": lambda: draw(4, 3) + draw(4, 3),
    "parameter": lambda: nn.Parameter(draw(4, 3)),
    "real part of a conjugate": lambda: torch.randn(4, 3, dtype=torch.complex128).conj().real,
    "imaginary part of a conjugate": lambda: torch.randn(4, 3, dtype=torch.complex128).conj().imag,
    "empty": lambda: draw(0, 3),
    "number": lambda: draw(),
    "large and small": lambda: torch.tensor([0.0, 1e6, -1e-8], dtype=torch.float64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x = LAYOUTS[layout]()
    x = x if x.requires_grad else x.requires_grad_()
    seen = []

    def spy(x):
        seen.append((x.stride(), x.storage_offset()))
        return x * 3.0

    assert gradcheck(spy, x).rows[0].shape == x.shape
    assert seen[0] == (x.stride(), x.storage_offset()) or x.is_neg()


def test_a_backward_that_ignores_strides_is_caught_on_a_slice_only():
    def backward(dy, x):
        return 2 * dy * torch.as_strided(x, x.shape, (x.shape[1], 1))

    square = function(lambda x: x * x, backward)
    assert gradcheck(square, draw(3, 4))
    assert not gradcheck(square, draw(3, 8).detach()[:, ::2].requires_grad_(), raise_exception=False)


def test_what_is_passed_on_and_what_is_returned():
    def f(x, scale, none, indices, *, extra=1):
        assert none is None
        return {"a": x * scale, "b": [x[indices].sum(), (x.detach(), "text", x.argmax())]}

    report = gradcheck(f, (draw(4), 2, None, torch.tensor([1, 2])))
    assert [row.name for row in report.rows] == ["input 0"]
    sparse = torch.eye(3, dtype=torch.float64).to_sparse()
    assert gradcheck(torch.sparse.mm, (sparse, draw(3, 2)))
    mask = torch.tensor([torch.nan, 0.0, torch.nan])
    assert gradcheck(lambda x, mask: x.where(mask.isnan(), 0), (draw(3), mask))
    assert gradcheck(lambda x: x, draw(3))
    assert gradcheck(lambda x: x.sum(), [draw(3)])
    with torch.no_grad():
        assert gradcheck(lambda x: x.sin(), draw(3))


def test_gradients_inside_the_function():
    def penalty(x):
        return torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0].square().sum()

    assert largest_error(gradcheck(penalty, draw(3))) < 1e-7


def test_parameters_that_are_frozen_tied_sparse_or_unused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).double()
    net[1].weight = net[0].weight
    net[2].requires_grad_(False)
    names = [row.name for row in gradcheck(net, torch.randn(3, 2, dtype=torch.float64)).rows]
    assert names == ["parameter 0.weight", "parameter 0.bias", "parameter 1.bias"]
    embedding = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    assert gradcheck(embedding, torch.tensor([1, 1, 2])).rows[0].error < 1e-7
    net.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    assert gradcheck(net, draw(3, 2)).rows[1].error == 0


def test_zero_and_tiny_gradients():
    x = draw(3, 4)
    assert gradcheck(nn.MSELoss(), (x, x.detach().clone()))
    assert gradcheck(lambda x: (x.softmax(-1).sum(-1), x[0] * 1e-9), x)
    assert gradcheck(lambda x: torch.relu(x.abs().neg()), x).rows[0].numeric == 0
    half = function(lambda x: 1e-12 * x * x, lambda dy, x: 1e-12 * x * dy)
    assert not gradcheck(half, x, raise_exception=False)


def test_an_entry_lost_in_the_rounding_of_others():
    def f(x):
        return (1e-9 * x[0] + 0.7 * x[1]) - 0.7 * x[2]

    assert gradcheck(f, torch.ones(3, dtype=torch.float64, requires_grad=True))


def test_double_mixed_with_single_takes_the_defaults_of_single():
    report = gradcheck(lambda x: x.sin().float(), draw(4))
    assert (report.eps, report.rtol) == (1e-3, 1e-2)
    mixed = draw(3, dtype=torch.float32), draw(3)
    assert gradcheck(lambda x, y: x.double() * y, mixed, precise=False).rtol == 1e-2
    assert gradcheck(lambda x, y: x.double() * y, mixed).rtol == 1e-7


# Wrong gradients: forward, right backward, wrong backward, shapes, the tensor to be named, words of the report


def one_wrong(dy, x):
    gradient = 2 * x * dy
    gradient[1, 2] *= 1 + 1e-5
    return gradient


def linear_backward(dz, a, w, b):
    return dz @ w, dz.t() @ a, dz.sum(0)


def softmax_backward(dy, x):
    y = x.softmax(-1)
    return y * (dy - (y * dy).sum(-1, keepdim=True))


def cross_entropy_backward(dy, x):
    return dy * (x.softmax(-1) - torch.eye(3).double()) / len(x)


def alter_and(result, tensor):
    tensor.add_(1)
    return result


SQUARE = lambda x: x * x, lambda dy, x: 2 * x * dy
PRODUCT = lambda a, b: a * b, lambda dy, a, b: (dy * b, dy * a)
LINEAR = nn.functional.linear, linear_backward
SOFTMAX = lambda x: x.softmax(-1), softmax_backward
ENTROPY = lambda x: nn.functional.cross_entropy(x, torch.arange(3)), cross_entropy_backward
MEAN = lambda x: x.mean(), lambda dy, x: dy.expand_as(x) / x.numel()
RELU = lambda x: x.relu(), lambda dy, x: dy * (x > 0)
PAIR = lambda x: (x.sin(), x * x), lambda da, db, x: da * x.cos() + 2 * x * db
M, V = (3, 3), (3,)

FAULTS = {
    "sign": (*SQUARE, lambda dy, x: -2 * x * dy, [M], "input 0", "it is -1 times the numeric gradient"),
    "factor": (*SQUARE, lambda dy, x: x * dy, [M], "input 0", "it is 0.5 times the numeric gradient"),
    "slightly too large": (*SQUARE, lambda dy, x: 2.000002 * x * dy, [M], "input 0", "correct the backward"),
    "one entry": (*SQUARE, one_wrong, [M], "input 0", r"at index \(1, 2\)"),
    "dy left out": (*SQUARE, lambda dy, x: 2 * x, [M], "input 0", "correct the backward"),
    "size of dy only": (*SQUARE, lambda dy, x: 2 * x * dy.abs(), [M], "input 0", "correct the backward"),
    "dy clipped": (*SQUARE, lambda dy, x: 2 * x * dy.clamp(-1, 1), [M], "input 0", "correct the backward"),
    "constant": (*SQUARE, lambda dy, x: torch.ones_like(x), [M], "input 0", "correct the backward"),
    "missing 1/n": (*MEAN, lambda dy, x: dy.expand_as(x), [M], "input 0", "it is 9 times"),
    "missing 1/n in a loss": (
        *ENTROPY,
        lambda dy, x: 3 * cross_entropy_backward(dy, x),
        [M],
        "input 0",
        "it is 3 times",
    ),
    "one-hot left out": (*ENTROPY, lambda dy, x: dy * x.softmax(-1) / 3, [M], "input 0", "correct the backward"),
    "dropped term": (*SOFTMAX, lambda dy, x: x.softmax(-1) * dy, [M], "input 0", "correct the backward"),
    "sum along the wrong axis": (
        *SOFTMAX,
        lambda dy, x: x.softmax(-1) * (dy - (x.softmax(-1) * dy).sum(0)),
        [M],
        "input 0",
        "correct the backward",
    ),
    "transposed": (*LINEAR, lambda dz, a, w, b: (dz @ w, a.t() @ dz, dz.sum(0)), [M, M, V], "input 1", "tolerance"),
    "not transposed": (
        *LINEAR,
        lambda dz, a, w, b: (dz @ w.t(), dz.t() @ a, dz.sum(0)),
        [M, M, V],
        "input 0",
        "tolerance",
    ),
    "mean for sum": (
        *LINEAR,
        lambda dz, a, w, b: (dz @ w, dz.t() @ a, dz.mean(0)),
        [M, M, V],
        "input 2",
        "0.3333 times",
    ),
    "sum over the wrong axis": (
        *LINEAR,
        lambda dz, a, w, b: (dz @ w, dz.t() @ a, dz.sum(1)),
        [M, M, V],
        "input 2",
        "tolerance",
    ),
    "None": (*PRODUCT, lambda dy, a, b: (dy * b, None), [M, M], "input 1", "None or zeros, yet the output depends"),
    "zeros": (*PRODUCT, lambda dy, a, b: (torch.zeros_like(a), dy * a), [M, M], "input 0", "None or zeros"),
    "wrong side of a kink": (*RELU, lambda dy, x: dy * (x < 0), [M], "input 0", "correct the backward"),
    "second output left out": (*PAIR, lambda da, db, x: da * x.cos(), [M], "input 0", "correct the backward"),
    "NaN": (*SQUARE, lambda dy, x: 2 * x * dy / (x != x[0, 1]), [M], "input 0", r"at index \(0, 1\) is -?inf"),
    "single precision": (*SQUARE, lambda dy, x: (2 * x * dy).float(), [M], "input 0", "holds float32 numbers only"),
    "half precision": (*SQUARE, lambda dy, x: (2 * x * dy).half(), [M], "input 0", "tolerance 1e-07"),
    "whole numbers": (*PRODUCT, lambda dy, a, b: (dy * b, (dy * a).long()), [M, M], "input 1", "tolerance 1e-07"),
    "shape": (*LINEAR, lambda dz, a, w, b: (dz @ w, dz.t() @ a, dz.sum(0)[:2]), [M, M, V], "input 2", r"got \[2\]"),
    "shape of another": (*LINEAR, lambda dz, a, w, b: (dz @ w, dz.sum(0), dz.sum(0)), [M, M, V], "input 1", "raised"),
    "count": (*PRODUCT, lambda dy, a, b: dy * b, [M, M], "input 0, input 1", "incorrect number of gradients"),
    "noise": (*PRODUCT, lambda dy, a, b: (dy * b, torch.rand_like(b)), [M, M], "gradient of input 1", "not determin"),
    "alters an input": (*PRODUCT, lambda dy, a, b: alter_and((dy * b, dy * a), b), [M, M], "input 1", "its backward"),
    "alters dy": (*SQUARE, lambda dy, x: alter_and(2 * x * dy, dy), [M], "backward", "altered the gradient"),
}


@pytest.mark.parametrize("full", [False, True], ids=["direction", "entries"])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_backward(fault, full):
    forward, right, wrong, shapes, name, words = FAULTS[fault]
    inputs = tuple(draw(*shape) for shape in shapes)
    assert gradcheck(function(forward, right), inputs, full=full)
    with pytest.raises(GradcheckError, match=words) as error:
        gradcheck(function(forward, wrong), inputs, full=full)
    verdict = str(error.value).splitlines()[0]
    assert name in verdict
    report = gradcheck(function(forward, wrong), inputs, raise_exception=False, full=full)
    assert not report
    assert report.failure in verdict
    wrong_rows = {row.name for row in report.rows if row.failure}
    assert wrong_rows == {name} or not report.rows


@pytest.mark.parametrize("fault", ["sign", "factor", "missing 1/n", "dropped term", "transposed", "None", "shape"])
def test_wrong_backward_in_single_precision(fault):
    forward, right, wrong, shapes, name, words = FAULTS[fault]
    inputs = tuple(draw(*shape, dtype=torch.float32) for shape in shapes)
    assert gradcheck(function(forward, right), inputs)
    with pytest.raises(GradcheckError, match=words) as error:
        gradcheck(function(forward, wrong), inputs)
    assert name in str(error.value).splitlines()[0]


def growing():
    calls = []

    def f(a, b):
        calls.append(0)
        return a.flatten()[: 1 + len(calls)] * 2

    return f


IN_SECRET = function(lambda a, b: alter_and(a * b, b), PRODUCT[1])
FUNCTIONS = {
    "partly detached": (lambda a, b: a + b.detach() * b, "input 1", "it is 0.5 times"),
    "detached": (lambda a, b: (a * b).detach(), "input 0", "None or zeros"),
    "data": (lambda a, b: a.data * b, "input 0", "None or zeros"),
    "in place": (lambda a, b: b.mul_(a), "input 1", "was altered in place by the function"),
    "in place inside a Function": (IN_SECRET, "input 1", "was altered in place by the function"),
    "in place on a view": (lambda a, b: (a * b, b.view(-1)[0].zero_()), "input 1", "was altered in place"),
    "noise": (lambda a, b: a * b + torch.rand(3, 3), "outputs", r"not deterministic.*call module\.eval\(\)"),
    "dropout": (lambda a, b: nn.functional.dropout(a * b), "outputs", "not deterministic"),
    "number of outputs": (growing(), "outputs", "not deterministic"),
    "NaN": (lambda a, b: (a * b, (b - 1e9).sqrt()), "output 1", "NaN or infinite in 9 entries"),
    "infinite": (lambda a, b: a / (b * 0), "output 0", "NaN or infinite in 9 entries"),
    "single precision inside": (lambda a, b: a * b.float().sin().double(), "input 1", "tolerance 1e-07"),
}


@pytest.mark.parametrize("fault", FUNCTIONS)
def test_wrong_function(fault):
    wrong, name, words = FUNCTIONS[fault]
    inputs = draw(3, 3), draw(3, 3)
    before = [x.detach().clone() for x in inputs]
    with pytest.raises(GradcheckError, match=words) as error:
        gradcheck(wrong, inputs)
    assert name in str(error.value).splitlines()[0]
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


def test_a_small_entry_is_no_factor():
    scale = torch.tensor([1.0, 0.01]).double()
    off = function(lambda x: x * scale, lambda dy, x: dy * (scale + torch.tensor([0.0, 2e-8])))
    report = gradcheck(off, draw(2), raise_exception=False, full=True)
    assert "correct the backward" in report.failure


def test_a_failing_backward_is_not_blamed_on_an_unused_input():
    short = function(*SQUARE[:1], lambda dy, x: dy[1:])
    with pytest.raises(GradcheckError, match="backward to input 1 raised: Function MadeBackward returned an invalid"):
        gradcheck(lambda unused, x: short(x), (draw(3), draw(3)))


def test_the_end_of_a_domain_within_eps():
    x = torch.tensor([1.0, 1e-9], dtype=torch.float64, requires_grad=True)
    assert gradcheck(torch.sqrt, x.detach().mul(1e4).requires_grad_())  # smaller steps stay inside
    with pytest.raises(GradcheckError, match=r"input 0 .*but should be nan .*an end .*within eps|could not be checked"):
        gradcheck(torch.sqrt, x)


class Wrong(Function):
    """A linear map whose gradient for the weight is a column short, or too small."""

    @staticmethod
    def forward(x, weight, short):
        return x @ weight.t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.short = inputs[2]

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dw = dy.t() @ x
        return dy @ weight, dw[:, 1:] if ctx.short else 0.9 * dw, None


@pytest.mark.parametrize("short", [True, False])
def test_a_wrong_layer_is_named(short):
    class Layer(nn.Linear):
        def forward(self, input):
            return Wrong.apply(input, self.weight, short)

    net = nn.Sequential(nn.Linear(3, 4), Layer(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2)).double()
    report = gradcheck(net, draw(5, 3), raise_exception=False)
    expected = "backward to parameter 1.weight raised" if short else "the gradient of parameter 1.weight at index"
    assert report.failure.startswith(expected)
    assert [row.name for row in report.rows if row.failure] == ([] if short else ["parameter 1.weight"])


def test_a_module_that_alters_its_parameter_or_drops_out():
    embedding = nn.Embedding(3, 2, max_norm=0.1, dtype=torch.float64)
    before = embedding.weight.detach().clone()
    with pytest.raises(GradcheckError, match="parameter weight was altered in place by the function"):
        gradcheck(embedding, torch.tensor([0, 2]))
    assert torch.equal(embedding.weight, before)
    with pytest.raises(GradcheckError, match="not deterministic"):
        gradcheck(nn.Dropout(), draw(4, 4))


# Nothing is left changed


def state(module, inputs):
    """All that a check could disturb."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **dict(enumerate(inputs))}
    return {
        "values": {k: (id(t), t._version, t.requires_grad, t.is_leaf, t.tolist()) for k, t in tensors.items()},
        "grads": {k: (id(t.grad), t.grad.tolist()) for k, t in tensors.items() if t.is_leaf and t.grad is not None},
        "modes": [m.training for m in module.modules()],
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "names": [*module.state_dict()],
    }


class Raises(nn.Module):
    def forward(self, x):
        raise KeyError("from inside")


@pytest.mark.parametrize(
    "last", [nn.Identity(), nn.Dropout(), nn.Threshold(0, 1, inplace=True), Raises()], ids=lambda m: type(m).__name__
)
def test_nothing_is_left_changed(last):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2), last).double()
    net[0].bias.requires_grad_(False)
    net[3].eval()
    inputs = (draw(5, 3),)
    net[:3](*inputs).sum().backward()
    before = state(net, inputs)
    try:
        gradcheck(net, inputs, raise_exception=False)
    except KeyError:
        assert isinstance(last, Raises)
    assert state(net, inputs) == before


def test_an_error_of_the_function_is_its_own():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as error:
        gradcheck(nn.Linear(3, 2).double(), draw(4, 5))
    assert not isinstance(error.value, GradcheckError)


# Wording


ONES = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("f", "inputs", "options", "message"),
    [
        (torch.sin, torch.ones(2), {}, "gradcheck expects at least one input tensor to require gradient, but none"),
        (torch.sin, (), {}, "at least one input tensor to require gradient"),
        (lambda x: x.to(torch.float8_e5m2), ONES, {}, "output 0 must be dense, real or complex"),
        (torch.sin, ONES, {"full": True, "fast_mode": True}, "full must be False with fast_mode=True"),
        (torch.sin, ONES, {"check_backward_ad": False}, "one of check_backward_ad and check_forward_ad must be True"),
        (torch.argmax, ONES, {}, "func must return a floating-point tensor, got none"),
        (lambda x: None, ONES, {}, "func must return a floating-point tensor, got none"),
        (torch.sin, ONES, {"eps": 0}, "eps must be > 0, got 0"),
        (torch.sin, ONES, {"rtol": -1.0}, "rtol must be >= 0, got -1.0"),
        (torch.sin, ONES, {"atol": math.nan}, "atol must be >= 0, got nan"),
        (torch.sin, ONES, {"nondet_tol": -1.0}, "nondet_tol must be >= 0, got -1.0"),
        (torch.sin, ONES, {"eps": 1e-20}, "eps must exceed the rounding of input 0, got 1e-20"),
    ],
)
def test_errors(f, inputs, options, message):
    if isinstance(inputs, torch.Tensor) and "at least" not in message:
        inputs = inputs.detach().requires_grad_()
    with pytest.raises(ValueError, match=message):
        gradcheck(f, inputs, **options, raise_exception=False)


def test_report_reads_well():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    wrong = function(lambda x, y: x * x * y, lambda dy, x, y: (x * y * dy, x * x * dy))
    report = gradcheck(wrong, (x, torch.ones_like(x, requires_grad=True)), raise_exception=False)
    first, second = report.rows
    assert (first.name, first.shape, second.failure) == ("input 0", (2, 2), "")
    assert first.error == pytest.approx(0.5)
    assert first.analytic == pytest.approx(first.numeric / 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.error = 0.0
    verdict, *lines = str(report).splitlines()
    assert verdict == f"gradcheck failed: {report.failure}"
    assert f"index {first.index} is {first.analytic:.6g} (analytic) but should be {first.numeric:.6g} (num" in verdict
    assert "relative error 5.0e-01, tolerance 1e-07: it is 0.5 times" in verdict
    assert [line.endswith("failed") for line in lines] == [True, False]
    passed = str(gradcheck(torch.sin, x)).splitlines()
    assert passed[0] == "gradcheck passed: relative errors are below 1e-07, with eps 6e-06."
    assert passed[1].startswith("input 0 ")


def test_tolerances():
    off = function(lambda x: 1.0 * x, lambda dy, x: dy * (1 + 1e-4))
    x = draw(3)
    assert gradcheck(off, x, rtol=1e-3)
    assert gradcheck(off, x, atol=1e-2)
    assert not gradcheck(off, x, rtol=1e-5, raise_exception=False)
    assert not gradcheck(off, x, atol=1e-5, raise_exception=False)
    assert gradcheck(torch.sin, x, eps=1e-6, atol=1e-5, rtol=1e-3).eps == 1e-6
    noisy = lambda x: x + 1e-9 * torch.rand(3)  # noqa: E731
    assert gradcheck(noisy, x, nondet_tol=1e-8, eps=1e-3, rtol=1e-3)
