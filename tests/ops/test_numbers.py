"""Numbers that are hard: kinks, infinities, NaN, large logits, half precision, autocast."""

import math

import pytest
import torch

from tests import exactness
from tests.hostile import HOSTILE
from tests.ops.test_values import gradients
from tests.tables import LOGITS, ROWS, Maker

FILLED = [row for row in ROWS if not row.empty]
filled_rows = pytest.mark.parametrize("row", FILLED, ids=lambda row: row.id)


def both(row, drawn):
    """Output and gradients of ours and of torch's."""
    results = []
    for function in (row.ours, row.theirs):
        tensors = tuple(drawn[k].requires_grad_() for k in row.differentiable)
        output, slopes = gradients(row.function(function, drawn), tensors)
        results.append((output.detach(), *slopes))
    return results


def sprinkled(row, dtype, generator):
    """Arguments of which every other number is a special one that its maker allows."""
    drawn = row.draw(dtype)
    for name, maker in row.arguments.items():
        if isinstance(maker, Maker) and maker.special:
            shape = drawn[name].shape
            chosen = torch.randint(len(maker.special), shape, generator=generator)
            special = torch.tensor(maker.special, dtype=dtype)[chosen]
            drawn[name] = torch.where(torch.rand(shape, generator=generator) < 0.5, special, drawn[name])
    return drawn


@filled_rows
def test_kinks_infinities_and_nan_as_torch(row):
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        got, expected = both(row, sprinkled(row, torch.float32, generator))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "name", ["sigmoid", "tanh", "relu", "leaky_relu", "hardtanh", "elu", "silu", "gelu", "softplus"]
)
def test_derivatives_at_zeros_of_both_signs_are_torchs(name):
    row = next(row for row in ROWS if row.name == name)
    got, expected = both(row, {"input": torch.tensor([0.0, -0.0, 5e-324, -5e-324], dtype=torch.float64)})
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[1].signbit(), expected[1].signbit())


@pytest.mark.parametrize("name", ["nll_loss", "cross_entropy"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0])], ids=["", "weight"])
def test_all_rows_ignored(name, smoothing, weight):
    """The mean of nothing is NaN, and its gradient 0, as is the gradient's."""
    row = next(row for row in ROWS if row.name == name)
    more = {"label_smoothing": smoothing} if name == "cross_entropy" else {}
    drawn = {"input": torch.randn(2, 3), "target": torch.full((2,), -100), "weight": weight, **more}
    got, expected = both(row, drawn)
    assert math.isnan(got[0])
    assert math.isnan(expected[0])
    assert torch.equal(got[1], torch.zeros(2, 3))
    assert torch.equal(got[1], expected[1])
    (slope,) = torch.autograd.grad(row.ours(**drawn), drawn["input"], create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), drawn["input"])
    assert torch.equal(curvature, torch.zeros(2, 3))


HARD = [pytest.param(row, id=row.id) for row in HOSTILE]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in FILLED] + HARD)
def test_no_less_exact_than_torch(row):
    """R5: against float64 at most 1.5 times torch's largest error, or half a unit in the last place of the largest.

    `python -m tests.benchmarks R5` prints the numbers.
    """
    for dtype in exactness.DTYPES:
        for result in exactness.measure(row, dtype):
            assert result.ratio <= exactness.WORST, (dtype, result)


@pytest.mark.parametrize("row", [r for r in FILLED if r.arguments["input"].special is LOGITS], ids=lambda row: row.id)
def test_large_logits_in_float64(row):
    """10: where `softplus` begins to cut corners; 1e4: where exp overflows."""
    for scale in (10, 1e4):
        drawn = row.draw(torch.float64)
        drawn["input"] = drawn["input"] * scale
        torch.testing.assert_close(*both(row, drawn), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0, 10, 1e3])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_standardising_beside_an_offset_is_no_less_exact_than_torch(name, offset):
    """Root mean square over many numbers, in float32 against float64."""
    row = next(row for row in ROWS if row.name == name)
    shape = {"normalized_shape": (32,)} if name == "layer_norm" else {}
    count = 32
    drawn = row.draw(torch.float32) | shape | {k: torch.randn(count) for k in ("weight", "bias")}
    drawn["input"] = offset + torch.randn(64, count)
    got, expected = both(row, drawn)
    _, exact = both(row, {k: v.detach().double() if isinstance(v, torch.Tensor) else v for k, v in drawn.items()})
    for mine, other, reference in zip(got, expected, exact):
        errors = [(found - reference).square().mean().sqrt() for found in (mine, other)]
        assert errors[0] <= 1.1 * errors[1] + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_feature_has_no_slope(dtype):
    """A number alone standardises to 0 whatever it is; torch leaves a rounding error, times 1 / sqrt(eps)."""
    row = next(row for row in ROWS if row.name == "layer_norm")
    drawn = {"input": torch.randn(8, 1, dtype=dtype), "normalized_shape": (1,)}
    drawn |= {k: torch.randn(1, dtype=dtype) for k in ("weight", "bias")}
    (output, slope, *_), _ = both(row, drawn)
    assert torch.equal(output, drawn["bias"].expand(8, 1))
    assert torch.equal(slope, torch.zeros(8, 1, dtype=dtype))


def under_autocast(function):
    def cast(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*tensors)

    return cast


def standardizes(row):
    """True where torch's statistics are of half precision too, which puts its gradients off by more than a percent."""
    return row.name == "layer_norm" or (row.name == "batch_norm" and row.arguments["training"])


def slopes_in_float32(function, tensors):
    """Gradients with the numbers of `tensors`, computed in float32."""
    upstream = gradients(lambda t: t, [torch.zeros_like(function(*tensors)).requires_grad_()])[1][0]
    wide = tuple(t.detach().float().requires_grad_() for t in tensors)
    return [slope.to(upstream.dtype) for slope in gradients(function, wide, upstream.float())[1]]


@filled_rows
def test_autocast_as_torch(row):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        mine, other, tensors = row.pair(dtype, requires_grad=True)
        output, slopes = gradients(under_autocast(mine), tensors)
        expected, expected_slopes = gradients(under_autocast(other), tensors)
        if dtype == torch.bfloat16 and standardizes(row):
            expected_slopes = slopes_in_float32(other, tensors)
        assert output.dtype == expected.dtype
        assert all(slope.dtype == dtype for slope in slopes)
        close = {"rtol": 1e-5 if output.dtype == torch.float32 else 1e-2, "atol": 1e-6}
        torch.testing.assert_close((output, *slopes), (expected, *expected_slopes), **close)
