"""Batch normalisation, sec. 9.3, remedy 3: each channel is standardised over the batch, then scaled and shifted.

    y = w x^ + b        x^ = (x - m) r        r = 1 / sqrt(v + eps)

Shapes: x, x^ and y (N, C, *); w, b, m and v (C). Sums and means <.> run over the n numbers of a channel.

In training m and v are the mean and the biased variance of the batch, which change with x:

    db = sum of dy        d = dy - db / n        dw = sum of d x^        dx = w r (d - x^ dw / n)

(The sum of d x^ is that of dy x^; it is had as the latter less db / n times the sum of x^, which is 0 but for the
rounding of m, so that one pass gives all sums.) In evaluation they are the running statistics, which do not:

    db = sum of dy        dw = sum of dy x^        dx = w r dy

Saved: x, w, and m and r of each channel; x^ is computed again. In training m and r are results of the operation beside
y, so that derivatives of the derivative see them change with x (`torch_bp.ops.standardize`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_bp.autograd.function import Function, forward_over_forward, overridden, recomputing, save, tangents_possible
from torch_bp.kernels import column_sum, formula, row_sum
from torch_bp.kernels.program import HALF
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


def _rows(x: torch.Tensor) -> tuple[int, ...]:
    """All dimensions but the channels'."""
    return (0, *range(2, x.dim()))


def _per_channel(values: Any, x: torch.Tensor) -> Any:
    """See (C) values, or None, as (1, C, *) beside x, half precision as float32."""
    return None if values is None else wide(values).view(1, -1, *[1] * (x.dim() - 2))


def _sums_by(add: Callable[[Any], Any]) -> Callable[..., Any]:
    def batch_norm_sums(dy, x, mean, inverse):
        """The sums of dy, dy x^ and x^ over the batch; the last is 0 but for rounding."""
        standard = (x - mean) * inverse
        return add(dy), add(dy * standard), add(standard)

    return batch_norm_sums


def _slope(dy, x, mean, inverse, db, dw, weight=None, *, count):
    """dx for given statistics: w r (d - x^ dw / n)."""
    slope = inverse if weight is None else weight * inverse
    return slope * (dy - db / count - (x - mean) * inverse * (dw / count))


_STATISTICS = ("mean", "inverse", "db", "dw", "weight")
# Channels are the columns of a matrix (N, C), and of (N, C, *) the rows of one of N C rows, which is the same memory.
batch_norm_sums = formula(per_column=_STATISTICS[:2])(_sums_by(column_sum))
batch_norm_row_sums = formula(per_row=_STATISTICS[:2])(_sums_by(row_sum))
batch_norm_slope = formula(per_column=_STATISTICS)(_slope)
batch_norm_row_slope = formula(per_row=_STATISTICS)(_slope)


def _in_rows(values: Any, x: torch.Tensor) -> Any:
    """Return (C) values, or None, as a column (N C, 1)."""
    return None if values is None else values.expand(x.shape[0], -1).reshape(-1, 1)


def _sums(dy: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor) -> Any:
    """The three sums (C)."""
    if x.dim() == 2:
        return batch_norm_sums(dy, x, mean, inverse)
    shape = mean.numel() * x.shape[0], -1
    found = batch_norm_row_sums(dy.reshape(shape), x.reshape(shape), _in_rows(mean, x), _in_rows(inverse, x))
    return (each.view(x.shape[:2]).sum(0) for each in found)


def _slopes(dy: torch.Tensor, x: torch.Tensor, *statistics: Any, count: float) -> torch.Tensor:
    """dx in the shape of x."""
    if x.dim() == 2:
        return batch_norm_slope(dy, x, *statistics, count=count)
    shape = x.shape[0] * x.shape[1], -1
    columns = (_in_rows(values, x) for values in statistics)
    return batch_norm_row_slope(dy.reshape(shape), x.reshape(shape), *columns, count=count).view(x.shape)


def batch_norm_backward(
    dy: _Optional,
    x: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: Any,
    bias_dtype: Any,
    wanted: tuple[bool, bool, bool],
    d_mean: _Optional = None,
    d_inverse: _Optional = None,
) -> tuple[_Optional, _Optional, _Optional]:
    """The gradients at x, w and b, where `wanted`, of a batch with these statistics (C)."""
    n, wide_x = x.numel() // mean.numel(), wide(x)
    dy = torch.zeros_like(wide_x) if dy is None else wide(dy)
    given = dy, wide_x, mean, inverse
    dx: Any = None
    dw: Any = None
    if wanted[0] or wanted[1]:
        db, dw, rest = _sums(*given)
        dw = torch.addcmul(dw, db, rest, value=-1 / n)
    else:
        db = dy.sum(_rows(x))
    if wanted[0]:
        scale = None if weight is None else wide(weight)
        dx = _slopes(*given, db, dw, scale, count=float(n))
        by_statistics = statistics_backward(d_mean, d_inverse, inverse, n)
        if by_statistics is not None:
            by_mean, by_inverse = (_per_channel(slope, x) for slope in by_statistics)
            dx = dx + by_mean - (wide_x - _per_channel(mean, x)) * _per_channel(inverse, x) * by_inverse
        dx = narrow(dx, x.dtype)
    dw = narrow(dw, weight.dtype) if wanted[1] else None
    return dx, dw, narrow(db, bias_dtype) if wanted[2] else None


class BatchNorm(Function):
    """y, m and r of a batch. The running statistics are updated on the way."""

    equations = ("y = w x^ + b, x^ = (x - m) r", ("dx = w r (d - x^ dw / n)", "dw = sum of d x^", "db = sum of dy"))

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: _Optional,
        bias: _Optional,
        running_mean: _Optional,
        running_var: _Optional,
        momentum: float,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        again = forward_over_forward()
        if again or mean.dtype in HALF:
            mean, inverse = (t.reshape(-1) for t in statistics(x, _rows(x), eps))
        if again:
            standard = (wide(x) - _per_channel(mean, x)) * _per_channel(inverse, x)
            y = affine(standard, _per_channel(weight, x), _per_channel(bias, x)).to(x.dtype)
        return y, mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        save(ctx, inputs[0], *output[1:], inputs[1])
        ctx.bias = None if inputs[2] is None else inputs[2].dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: _Optional, d_mean: _Optional, d_inverse: _Optional) -> tuple[_Optional, ...]:
        x, mean, inverse, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        slopes = batch_norm_backward(dy, x, mean, inverse, weight, ctx.bias, wanted, d_mean, d_inverse)
        return *slopes, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: _Optional, dw: _Optional, db: _Optional, *_: None) -> tuple[torch.Tensor, ...]:
        x, mean, inverse, weight = ctx.saved_tensors
        mean, inverse = (_per_channel(t, x) for t in (mean, inverse))
        standard = (wide(x) - mean) * inverse
        change, d_mean, d_inverse = None, torch.zeros_like(mean), torch.zeros_like(inverse)
        if dx is not None:
            change, d_mean, d_inverse = tangents(wide(dx), standard, inverse, _rows(x))
        parameters = (_per_channel(values, x) for values in (weight, dw, db))
        tangent = affine_tangent(change, standard, *parameters).to(x.dtype)
        return tangent, d_mean.reshape(-1), d_inverse.reshape(-1)


class FixedBatchNorm(Function):
    """y with given statistics, which are constants."""

    equations = ("y = w x^ + b, x^ = (x - m) r", ("dx = w r dy", "dw = sum of dy x^", "db = sum of dy"))

    @staticmethod
    def forward(
        x: torch.Tensor, weight: _Optional, bias: _Optional, mean: torch.Tensor, variance: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, bias, mean, variance, ctx.eps = inputs
        kept = x if ctx.needs_input_grad[1] or tangents_possible() else None
        save(ctx, kept, mean, variance, weight)
        ctx.bias = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[_Optional, ...]:
        x, mean, variance, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        dtype, rows, dy = dy.dtype, _rows(dy), wide(dy)
        root = (_per_channel(variance, dy) + ctx.eps).sqrt()
        dx = dw = db = None
        if needs_dx:
            dx = (dy * (1 / root if weight is None else _per_channel(weight, dy) / root)).to(dtype)
        if needs_dw:
            dw = ((dy * (wide(x) - _per_channel(mean, dy))).sum(rows) / root.view(-1)).to(weight.dtype)
        if needs_db:
            db = dy.sum(rows).to(ctx.bias)
        return dx, dw, db, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: _Optional, dw: _Optional, db: _Optional, *_: None) -> torch.Tensor:
        x, mean, variance, weight = ctx.saved_tensors
        root = (_per_channel(variance, x) + ctx.eps).sqrt()
        standard = (wide(x) - _per_channel(mean, x)) / root
        parameters = (_per_channel(values, x) for values in (weight, dw, db))
        return affine_tangent(None if dx is None else wide(dx) / root, standard, *parameters).to(x.dtype)


def normalizable(x: torch.Tensor, per_channel: tuple[_Optional, ...], training: bool, eps: float) -> bool:
    """True where the equations hold; the rest is torch's: its errors, and batches without a number."""
    if x.dim() < 2 or not x.numel() or eps < 0:
        return False
    if any(t is not None and t.shape != x.shape[1:2] for t in per_channel):
        return False
    if training:
        return eps > 0 and x.numel() > x.shape[1]
    return per_channel[0] is not None and per_channel[1] is not None


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """As `torch.nn.functional.batch_norm`: `input` (N, C, *), all else (C) or None; sec. 9.3.

    The running statistics are moved by `momentum` towards the batch's mean and unbiased variance, once for each batch:
    where activation checkpointing computes a batch again during backward they stay, which torch's do not.

    Raises:
        ValueError: training with one value per channel, or an `eps` of 0 or less (0 is allowed in evaluation).
        RuntimeError: shapes or dtypes do not fit, or there are no statistics to evaluate with, in torch's words.

    Example:
        >>> batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True, eps=1e-12)
        tensor([[-1.],
                [ 1.]])
    """
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*tensors) and overridden():
        more = {"weight": weight, "bias": bias, "training": training, "momentum": momentum, "eps": eps}
        return handle_torch_function(batch_norm, tensors, *tensors[:3], **more)  # type: ignore[arg-type]
    if not normalizable(input, tensors[1:], training, eps):
        return torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return FixedBatchNorm.apply(input, weight, bias, running_mean, running_var, eps)
    if recomputing():
        running_mean = running_var = None
    return BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)[0]
