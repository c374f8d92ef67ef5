"""The rows on a CUDA device."""

import pytest
import torch

import torch_bp.nn.functional as ours
from tests.ops.test_values import gradients
from tests.tables import ROWS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)


def pair(row, dtype):
    """As `row.pair`, on the device."""
    drawn = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in row.draw(dtype).items()}
    tensors = tuple(drawn[k].requires_grad_() for k in row.differentiable)
    return row.function(row.ours, drawn), row.function(row.theirs, drawn), tensors


@every_row
def test_equal_torch(row):
    for dtype in (torch.float32, torch.float64):
        mine, other, tensors = pair(row, dtype)
        got, expected = gradients(mine, tensors), gradients(other, tensors)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def under_autocast(function):
    def cast(*tensors):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return function(*tensors)

    return cast


@pytest.mark.parametrize("row", [r for r in ROWS if r.name != "binary_cross_entropy"], ids=lambda row: row.id)
def test_autocast_as_torch(row):
    for dtype in (torch.float32, torch.bfloat16):
        mine, other, tensors = pair(row, dtype)
        got, expected = gradients(under_autocast(mine), tensors), gradients(under_autocast(other), tensors)
        assert got[0].dtype == expected[0].dtype
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3, equal_nan=True)


def test_binary_cross_entropy_refuses_autocast():
    x = torch.full((2,), 0.5, device="cuda")
    for function in (ours.binary_cross_entropy, torch.nn.functional.binary_cross_entropy):
        with torch.autocast("cuda"), pytest.raises(RuntimeError, match="unsafe to autocast"):
            function(x, x)
