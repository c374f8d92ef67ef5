"""Derivatives of every kind and order, against float64 finite differences and against torch."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import torch_bp.nn.functional
from tests.tables import ROWS
from torch_bp.kernels import formula
from torch_bp.ops import activation, saves_input

FILLED = [row for row in ROWS if not row.empty]
ONE_OF_EACH = list({row.name: row for row in reversed(FILLED)}.values())
# torch has no forward mode over forward mode for its `softplus` and logits loss ("ZeroTensors are immutable")
NO_FORWARD_TWICE = {"binary_cross_entropy_with_logits"}
filled_rows = pytest.mark.parametrize("row", FILLED, ids=lambda row: row.id)


def assert_same(got, expected):
    # torch's second derivative of `binary_cross_entropy` is itself off by 1e-11
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@filled_rows
def test_finite_differences(row):
    mine, _, tensors = row.pair(requires_grad=True)
    assert gradcheck(mine, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(mine, tensors, fast_mode=True)


@pytest.mark.parametrize("row", ONE_OF_EACH, ids=lambda row: row.id)
def test_finite_differences_in_batches_and_forward_over_reverse(row):
    mine, _, tensors = row.pair(requires_grad=True)
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(mine, tensors, check_forward_ad=True, **batched)
    over = {"check_fwd_over_rev": True, "check_batched_grad": True}
    assert gradgradcheck(mine, tensors, fast_mode=True, **over)


@filled_rows
def test_forward_over_reverse_equals_reverse_over_reverse(row):
    mine, other, tensors = row.pair(requires_grad=True, twice=True)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    with forward_ad.dual_level():
        duals = tuple(map(forward_ad.make_dual, tensors, tangents))
        slopes = torch.autograd.grad(mine(*duals).square().sum(), duals)
        got = [forward_ad.unpack_dual(slope).tangent for slope in slopes]
    slopes = torch.autograd.grad(other(*tensors).square().sum(), tensors, create_graph=True)
    along = sum((slope * tangent).sum() for slope, tangent in zip(slopes, tangents))
    assert_same(got, list(torch.autograd.grad(along, tensors)))


@filled_rows
def test_functional_transforms_equal_torch(row):
    mine, other, tensors = row.pair(twice=True)
    numbers = tuple(range(len(tensors)))

    def total(*tensors, function=mine):
        return function(*tensors).square().sum()

    expected = jacrev(other, numbers)(*tensors)
    assert_same(jacrev(mine, numbers)(*tensors), expected)
    assert_same(jacfwd(mine, numbers)(*tensors), expected)
    expected = hessian(partial(total, function=other), numbers)(*tensors)
    twice = [jacfwd(jacrev(total, numbers), numbers), jacrev(jacrev(total, numbers), numbers)]
    twice += [jacrev(jacfwd(total, numbers), numbers)]
    twice += [jacfwd(jacfwd(total, numbers), numbers)] if row.name not in NO_FORWARD_TWICE else []
    for derivatives in twice:
        assert_same(derivatives(*tensors), expected)


@filled_rows
def test_vmap_of_gradients_equals_torch(row):
    mine, other, tensors = row.pair()
    numbers = tuple(range(len(tensors)))
    batches = tuple(torch.stack([t, t * 0.5, t.flip(0) if t.dim() else t]) for t in tensors)
    results = []
    for function in (mine, other):
        sums = grad(lambda *x, f=function: f(*x).square().sum(), numbers)
        results.append((vmap(function)(*batches), vmap(sums)(*batches)))
    assert_same(*results)


@filled_rows
def test_jvp_equals_torch(row):
    mine, other, tensors = row.pair()
    tangents = tuple(torch.randn_like(t) for t in tensors)
    assert_same(jvp(mine, tensors, tangents), jvp(other, tensors, tangents))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_vmap_over_logits_and_labels(weighted, smoothing, reduction):
    logits, labels = torch.randn(5, 4, 3, dtype=torch.float64), torch.randint(3, (5, 4))
    options = {"weight": torch.rand(3, dtype=torch.float64) if weighted else None, "ignore_index": 1}
    options |= {"label_smoothing": smoothing, "reduction": reduction}
    results = []
    for library in (torch_bp.nn.functional, torch.nn.functional):
        slope = grad(lambda z, y, f=library: f.cross_entropy(z, y, **options).sum())
        results.append(
            vmap(slope)(logits, labels)
            if library is torch_bp.nn.functional
            else torch.stack([slope(z, y) for z, y in zip(logits, labels)])
        )
    assert_same(*results)


def _losses_of_weights():
    """Loss functions of `(library, weights)`, by name, and the weights' shape."""
    torch.manual_seed(0)
    z, share = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    label = torch.tensor([0, 2, -1, 1])
    for reduction in ("none", "mean", "sum"):
        common = {"reduction": reduction}
        yield "bce weight", (3,), lambda f, w, c=common: f.binary_cross_entropy(share, 1 - share, w, **c)
        logits = {"input": z, "target": share, **common}
        yield "logits weight", (4, 1), lambda f, w, c=logits: f.binary_cross_entropy_with_logits(weight=w, **c)
        yield "logits pos_weight", (3,), lambda f, w, c=logits: f.binary_cross_entropy_with_logits(pos_weight=w, **c)
        labelled = {"ignore_index": -1, **common}
        yield "nll", (3,), lambda f, w, c=labelled: f.nll_loss(z, label, w, **c)
        yield "classes", (3,), lambda f, w, c=labelled: f.cross_entropy(z, label, w, **c)
        yield "smoothed", (3,), lambda f, w, c=labelled: f.cross_entropy(z, label, w, label_smoothing=0.2, **c)


@pytest.mark.parametrize("mode", ["functional", "dual numbers"])
@pytest.mark.parametrize(("name", "shape", "loss"), list(_losses_of_weights()))
def test_forward_mode_of_weights_equals_differences_of_torchs_loss(name, shape, loss, mode):
    """torch has no derivative for these; without ours a tangent of a weight would be lost without a word."""
    weight, tangent = torch.rand(shape, dtype=torch.float64) + 0.5, torch.randn(shape, dtype=torch.float64)
    step = 1e-5
    ends = [loss(torch.nn.functional, weight + sign * step * tangent) for sign in (1, -1)]
    if mode == "functional":
        _, change = jvp(lambda w: loss(torch_bp.nn.functional, w), (weight,), (tangent,))
    else:
        with forward_ad.dual_level():
            change = forward_ad.unpack_dual(loss(torch_bp.nn.functional, forward_ad.make_dual(weight, tangent))).tangent
    torch.testing.assert_close(change, (ends[0] - ends[1]) / (2 * step), rtol=1e-7, atol=1e-9)


def test_an_activation_with_parameters_may_be_all_formulas():
    from torch_bp.kernels import exp, formula
    from torch_bp.ops.pointwise import activation, saves_input

    @formula
    def swish_value(z, *, beta):
        return z / (1 + exp(-beta * z))

    @formula
    def swish_backward(dy, z, *, beta):
        gate = 1 / (1 + exp(-beta * z))
        return dy * (gate + beta * z * gate * (1 - gate))

    swish = activation("swish", swish_value, swish_backward, saves_input, ("beta",))
    z = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda z: swish(z, 1.5), z, check_forward_ad=True)
    assert_same(swish(z, 1.0), torch.nn.functional.silu(z))


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_complex_derivatives(name):
    z = torch.randn(5, dtype=torch.complex128, requires_grad=True)
    function = getattr(torch_bp.nn.functional, name)
    assert gradcheck(function, z, check_forward_ad=True)
    assert gradgradcheck(function, z)


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_the_slope_of_a_kinked_line_has_a_derivative_which_is_zero(name):
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    (slope,) = torch.autograd.grad(getattr(torch_bp.nn.functional, name)(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(slope.sum(), x)[0].tolist() == [0, 0]


def test_half_precision_targets_do_not_make_the_gradient_coarse():
    z = torch.randn(64, 10, requires_grad=True)
    share = torch.softmax(torch.randn(64, 10), 1).bfloat16()
    exact = torch.autograd.grad(torch.nn.functional.cross_entropy(z.double(), share.double()), z)[0]
    torch.testing.assert_close(torch.autograd.grad(torch_bp.nn.functional.cross_entropy(z, share), z)[0], exact)


def test_a_derivative_from_the_input_says_so():
    """Given the output, which is what it is given otherwise, it would be wrong without a word."""

    @formula
    def value(z):
        return z / (1 + abs(z))

    @formula
    def slope(dy, z):
        return dy / (1 + abs(z)) ** 2

    with pytest.raises(TypeError, match="pass saves=saves_input"):
        activation("softsign", value, slope)
    softsign = activation("softsign", value, slope, saves=saves_input)
    assert torch.autograd.gradcheck(softsign, torch.randn(5, dtype=torch.float64, requires_grad=True))
