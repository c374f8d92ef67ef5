"""Layer normalisation: each example is standardised over its own last dimensions, then scaled and shifted.

    y = w x^ + b        x^ = (x - m) r        r = 1 / sqrt(v + eps)

Shapes: x, x^ and y (*, S), with S the normalised shape, of any number of dimensions; w and b S; m and v (*, 1, ..., 1):
the mean and the biased variance of each example. With <.> the mean over S, and g = w dy the error signal at x^:

    db = sum of dy        dw = sum of dy x^        dx = r (g - <g> - x^ <x^ g>)

where the sums run over examples. Saved: x, w, m and r; x^ is computed again. m and r are results of the operation
beside y, so that derivatives of the derivative see them change with x (`torch_bp.ops.standardize`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_bp.autograd.function import Function, cast_apply, forward_over_forward, overridden, save, under_autocast
from torch_bp.kernels import column_sum, formula, row_sum
from torch_bp.kernels.program import HALF
from torch_bp.ops.rows import shaped
from torch_bp.ops.standardize import (
    affine,
    affine_tangent,
    narrow,
    statistics,
    statistics_backward,
    tangents,
    wide,
)

_Optional = torch.Tensor | None


def _over(count: int) -> tuple[int, ...]:
    """The last `count` dimensions."""
    return tuple(range(-count, 0))


@formula(per_row=("mean", "inverse"), per_column=("weight",), static=("wanted",))
def layer_norm_backward(dy, x, mean, inverse, weight=None, *, count, wanted):
    """dx for given statistics, dw and db, where `wanted`.

    dx is r (g - <g> - x^ <x^ g>), with g centred first, which loses no digits to a large <g>.
    """
    standard, dx = (x - mean) * inverse, None
    if wanted[0]:
        g = dy if weight is None else weight * dy
        g = g - row_sum(g) / count
        dx = inverse * (g - standard * (row_sum(g * standard) / count))
    return dx, column_sum(dy * standard) if wanted[1] else None, column_sum(dy) if wanted[2] else None


class LayerNorm(Function):
    """y, m and r of examples of `dims` dimensions."""

    equations = (
        "y = w x^ + b, x^ = (x - m) r",
        ("dx = r (g - <g> - x^ <x^ g>), g = w dy", "dw = sum of dy x^", "db = sum of dy"),
    )

    @staticmethod
    def forward(
        x: torch.Tensor, weight: _Optional, bias: _Optional, dims: int, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, mean, inverse = torch.native_layer_norm(x, x.shape[x.dim() - dims :], weight, bias, eps)
        if forward_over_forward():
            mean, inverse = statistics(x, _over(dims), eps)
            return affine((wide(x) - mean) * inverse, weight, bias).to(x.dtype), mean, inverse
        if mean.dtype in HALF:
            return y, *statistics(x, _over(dims), eps)
        return y, mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, weight, bias, ctx.dims, _ = inputs
        save(ctx, x, *output[1:], weight)
        ctx.bias = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: _Optional, d_mean: _Optional, d_inverse: _Optional) -> tuple[_Optional, ...]:
        x, mean, inverse, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        wide_x, dy = wide(x), torch.zeros_like(wide(x)) if dy is None else wide(dy)
        shape = x.shape[x.dim() - ctx.dims :]
        count = math.prod(shape)
        dx: Any = None
        dw: Any = None
        db: Any = None
        if not any(wanted):
            return (None,) * 5
        if not x.numel():
            dx = dy * wide_x
            dw, db = (dx.sum_to_size(shape) if want else None for want in wanted[1:])
        else:
            rows = x.numel() // count
            matrices = shaped(dy, (rows, count)), shaped(wide_x, (rows, count))
            columns = shaped(mean, (rows, 1)), shaped(inverse, (rows, 1))
            scale = None if weight is None else shaped(wide(weight), (count,))
            dx, dw, db = layer_norm_backward(*matrices, *columns, scale, count=float(count), wanted=wanted)
        if wanted[0]:
            dx = shaped(dx, x.shape)
            by_statistics = statistics_backward(d_mean, d_inverse, inverse, count)
            if by_statistics is not None:
                dx = dx + by_statistics[0] - (wide_x - mean) * inverse * by_statistics[1]
            dx = narrow(dx, x.dtype)
        dw = narrow(shaped(dw, shape), weight.dtype) if wanted[1] else None
        return dx if wanted[0] else None, dw, narrow(shaped(db, shape), ctx.bias) if wanted[2] else None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: _Optional, dw: _Optional, db: _Optional, *_: None) -> tuple[torch.Tensor, ...]:
        x, mean, inverse, weight = ctx.saved_tensors
        standard = (wide(x) - mean) * inverse
        d_mean, d_inverse = torch.zeros_like(mean), torch.zeros_like(inverse)
        change = None
        if dx is not None:
            change, d_mean, d_inverse = tangents(wide(dx), standard, inverse, _over(ctx.dims))
        return affine_tangent(change, standard, weight, dw, db).to(x.dtype), d_mean, d_inverse


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """As `torch.nn.functional.layer_norm`: `input` (*, S), `weight` and `bias` S or None, `normalized_shape` S.

    Raises:
        RuntimeError: shapes or dtypes do not fit, in torch's words.

    Example:
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), (2,), eps=1e-12)
        tensor([[-1.,  1.]])
    """
    tensors = (input, weight, bias)
    if has_torch_function_variadic(*tensors) and overridden():
        return handle_torch_function(layer_norm, tensors, input, normalized_shape, weight=weight, bias=bias, eps=eps)
    dims = len(normalized_shape) if isinstance(normalized_shape, Sequence) else 0
    # torch's alone: ragged rows, and its errors about what is no tensor and about a shape
    if (
        not dims
        or not isinstance(input, torch.Tensor)
        or input.is_nested
        or tuple(input.shape[-dims:]) != tuple(normalized_shape)
    ):
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    if input.is_cuda and under_autocast(input):  # on the CPU torch leaves the dtype as it is
        return cast_apply(LayerNorm, torch.float32, input, weight, bias, dims, eps)[0]
    return LayerNorm.apply(input, weight, bias, dims, eps)[0]
