"""Values and gradients of every row equal those of torch."""

import sys

import pytest
import torch

import torch_bp
import torch_bp.nn.functional as ours
from tests.tables import ROWS, Maker
from torch_bp.ops.linear_activation import relu_in_epilogue

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
TOLERANCE = {torch.float32: {"rtol": 2e-6, "atol": 2e-7}, torch.float64: {"rtol": 1e-13, "atol": 1e-14}}


def gradients(function, tensors, upstream=None):
    """The output, and the gradients at `tensors` for an upstream gradient drawn once per shape."""
    output = function(*tensors)
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return output, torch.autograd.grad(output, tensors, upstream)


def assert_same(got, expected, dtype, **more):
    torch.testing.assert_close(got, expected, equal_nan=True, **TOLERANCE[dtype], **more)


@every_row
def test_equal_torch(row):
    for dtype in TOLERANCE:
        mine, other, tensors = row.pair(dtype, requires_grad=True)
        assert_same(gradients(mine, tensors), gradients(other, tensors), dtype)


@every_row
def test_torch_computes_the_value(row):
    """Bit for bit, but for the losses that torch has no operation for, or that we compute."""
    mine, other, tensors = row.pair(torch.float32)
    close = row.name in ("half_mse_loss", "cross_entropy") or ("weight" in row.arguments and row.name == "mse_loss")
    torch.testing.assert_close(mine(*tensors), other(*tensors), rtol=1e-6 if close else 0, atol=0, equal_nan=True)
    assert not mine(*tensors).requires_grad


@every_row
def test_inputs_are_untouched(row):
    drawn = row.draw(torch.float32, requires_grad=True)
    before = {k: (v.detach().clone(), v._version) for k, v in drawn.items() if isinstance(v, torch.Tensor)}
    output = row.ours(**drawn)
    upstream = torch.ones_like(output)
    torch.autograd.grad(output, [drawn[k] for k in row.differentiable], upstream)
    for name, (value, version) in before.items():
        assert torch.equal(drawn[name], value)
        assert drawn[name]._version == version
    assert upstream._version == 0
    assert bool((upstream == 1).all())


def strided(tensor):
    return torch.stack((tensor, tensor), -1)[..., 0] if tensor.dim() else tensor


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def expanded(tensor):
    return tensor[:1].expand_as(tensor) if tensor.dim() else tensor


def channels_last(tensor):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 2 else tensor


def assert_same_in_layout(row, layout):
    drawn = row.draw(torch.float64)
    names = [k for k, v in row.arguments.items() if isinstance(v, Maker)]
    drawn |= {k: layout(drawn[k]).requires_grad_(k in row.differentiable) for k in names}
    copies = drawn | {k: drawn[k].detach().clone().contiguous() for k in names}
    tensors = tuple(drawn[k] for k in row.differentiable)
    contiguous = tuple(copies[k].requires_grad_() for k in row.differentiable)
    mine, other = row.function(row.ours, drawn), row.function(row.theirs, copies)
    output = other(*contiguous).detach()
    for upstream in (layout(torch.randn_like(output)), torch.tensor(0.5).double().expand_as(output)):
        got, expected = gradients(mine, tensors, upstream), gradients(other, contiguous, upstream.contiguous())
        assert_same(got, expected, torch.float64)


@every_row
def test_any_layout(row):
    """Also where torch refuses: `nll_loss` of images has no backward for a transposed input."""
    for layout in (strided, transposed, expanded, channels_last):
        assert_same_in_layout(row, layout)


@every_row
def test_a_gradient_is_computed_only_where_it_is_needed(row):
    for wanted in row.differentiable:
        drawn = row.draw(torch.float64)
        drawn[wanted].requires_grad_()
        expected = torch.autograd.grad(row.theirs(**drawn).sum(), drawn[wanted])
        output = row.ours(**drawn).sum()
        assert_same(torch.autograd.grad(output, drawn[wanted]), expected, torch.float64)


@every_row
def test_a_subset_of_gradients(row):
    mine, other, tensors = row.pair(torch.float64, requires_grad=True)
    for tensor in tensors:
        expected = torch.autograd.grad(other(*tensors).sum(), tensor)
        assert_same(torch.autograd.grad(mine(*tensors).sum(), tensor), expected, torch.float64)


@every_row
def test_engines_agree(row):
    for dtype in TOLERANCE:
        mine, _, tensors = row.pair(dtype, requires_grad=True)
        with torch_bp.kernels.use("torch"):
            expected = gradients(mine, tensors)
        with torch_bp.kernels.use("numba"):
            assert_same(gradients(mine, tensors), expected, dtype)


@pytest.mark.parametrize(
    ("name", "target", "arguments"),
    [
        ("mse_loss", torch.rand(4, 3).double(), {}),
        ("mse_loss", torch.rand(3), {"reduction": "none"}),
        ("mse_loss", torch.rand(2, 4, 3), {"reduction": "sum"}),
        ("mse_loss", torch.arange(12).view(4, 3), {}),
        ("binary_cross_entropy_with_logits", torch.rand(4, 3).double(), {}),
        ("binary_cross_entropy_with_logits", torch.rand(4, 3).double(), {"pos_weight": torch.rand(3)}),
        ("cross_entropy", torch.rand(4, 3).double(), {}),
        ("cross_entropy", torch.tensor([2, 0, 1, 1], dtype=torch.uint8), {"label_smoothing": 0.1}),
        ("nll_loss", torch.tensor([2, 0, 1, 1], dtype=torch.uint8), {"weight": torch.rand(3)}),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_other_dtypes_and_shapes_of_targets(name, target, arguments):
    """Promoted and broadcast as in torch; gradients have the dtype and the shape of what they belong to."""
    tensors = [torch.randn(4, 3, requires_grad=True)]
    tensors += [target.requires_grad_()] if target.is_floating_point() else []
    results = []
    for module in (ours, torch.nn.functional):
        output = getattr(module, name)(tensors[0], target, **arguments)
        results.append((output, torch.autograd.grad(output.sin().sum(), tensors)))
    assert_same(*results, torch.float32)


def test_cross_entropy_of_few_logits_equals_torch(monkeypatch):
    """Which the row kernel leaves to torch's forward: values, first and second derivatives."""
    monkeypatch.setattr(sys.modules["torch_bp.ops.cross_entropy"], "_WORTHWHILE", 1 << 18)
    for row in ROWS:
        if row.name == "cross_entropy" and not row.empty:
            mine, other, tensors = row.pair(torch.float64, requires_grad=True)
            assert_same(gradients(mine, tensors), gradients(other, tensors), torch.float64)
            twice = []
            for function in (mine, other):
                output = function(*tensors)
                slopes = torch.autograd.grad(output.sum(), tensors, create_graph=True)
                twice.append(torch.autograd.grad(sum(slope.sin().sum() for slope in slopes), tensors))
            assert_same(*twice, torch.float64)


@pytest.mark.parametrize("ignored", [-100, 0, 156, 256, 2**40])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bytes_as_labels(ignored, smoothing):
    """An index that is ignored and fits no byte wraps around, in one of torch's two terms."""
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 0], dtype=torch.uint8)
    results = []
    for module in (ours, torch.nn.functional):
        loss = module.cross_entropy(z, target, ignore_index=ignored, label_smoothing=smoothing)
        results.append((loss, torch.autograd.grad(loss, z)))
    assert_same(*results, torch.float64)


def test_the_product_that_cuts_off_by_itself_is_relu_of_the_affine_map():
    a, weight, bias = torch.randn(7, 5), torch.randn(3, 5), torch.randn(3)
    expected = torch.relu(torch.nn.functional.linear(a, weight, bias))
    torch.testing.assert_close(relu_in_epilogue(a, weight, bias), expected)
