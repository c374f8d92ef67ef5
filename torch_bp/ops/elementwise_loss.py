"""What losses that compare element with element have in common: one Function made of a value and two derivatives.

Input x and target t have one shape; the loss is reduced to a number or kept per element. Saved: x, t and the weights.
Forward mode multiplies the same derivatives with tangents.
"""

from collections.abc import Callable
from typing import Any

import torch

from torch_bp.autograd.function import Function, cast_apply, save, under_autocast
from torch_bp.kernels.program import HALF
from torch_bp.ops.reduction import MEAN, NONE

_Optional = torch.Tensor | None


def elementwise_loss(
    name: str, value: Callable[..., torch.Tensor], slopes: Callable[..., Any], described: tuple[str, str]
) -> type[Function]:
    """Make the Function of a loss of `(input, target, weight, pos_weight, reduction, factor)`.

    `value(input, target, weight, pos_weight, reduction)` is reduced by torch, by NONE, MEAN or SUM, and multiplied
    with `factor`; `slopes(dy, input, target, pos_weight, wanted, scale=, factor=)` returns both times dl/dx and dl/dt,
    times dy where that is not None. `described` are its equations, forward and backward.
    """

    def upstream(dy: torch.Tensor, x: torch.Tensor, weight: _Optional, options: tuple[int, float]) -> tuple[Any, Any]:
        """Split what comes from above into one value per element, or None, and numbers that formulas multiply."""
        reduction, factor = options
        if reduction == NONE:
            return dy if weight is None else dy * weight, {"scale": 1.0, "factor": factor}
        if reduction == MEAN:
            factor = factor / max(x.numel(), 1)
        if weight is None:  # 1/n is subnormal in half precision for a large n
            return None, {"scale": dy.float() if dy.dtype in HALF else dy, "factor": factor}
        return (weight * dy).expand_as(x), {"scale": 1.0, "factor": factor}

    class Loss(Function):
        equations = described

        @staticmethod
        def forward(
            x: torch.Tensor,
            t: torch.Tensor,
            weight: _Optional,
            pos_weight: _Optional,
            reduction: int,
            factor: float,
        ) -> torch.Tensor:
            loss = value(x, t, weight, pos_weight, reduction)
            return loss if factor == 1 else loss * factor

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            save(ctx, *inputs[:4])
            ctx.options = inputs[4:]

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[_Optional, ...]:
            given = (*ctx.saved_tensors, dy)
            dtype = dy.dtype
            if dtype in HALF:  # rounded once, at the end
                given = tuple(None if tensor is None else tensor.float() for tensor in given)
            x, t, weight, pos_weight, dy = given
            dy, numbers = upstream(dy, x, weight, ctx.options)
            dx, dt = slopes(dy, x, t, pos_weight, ctx.needs_input_grad[:2], **numbers)
            if dtype in HALF:
                dx, dt = (None if slope is None else slope.to(dtype) for slope in (dx, dt))
            return dx, dt, None, None, None, None

        @staticmethod
        def jvp(
            ctx: Any, dx: _Optional, dt: _Optional, dweight: _Optional, dpos_weight: _Optional, *_: Any
        ) -> torch.Tensor:
            x, t, weight, pos_weight = ctx.saved_tensors
            reduction, factor = ctx.options
            one = torch.ones_like(x) if reduction == NONE else x.new_ones(())
            dy, numbers = upstream(one, x, weight, ctx.options)
            by_x, by_t = slopes(dy, x, t, pos_weight, (dx is not None, dt is not None), **numbers)
            changes = [slope * d for slope, d in ((by_x, dx), (by_t, dt)) if d is not None]
            changes = changes if reduction == NONE else [change.sum() for change in changes]
            if dweight is not None:  # the loss is linear in this weight, and affine in the next
                changes.append(factor * value(x, t, dweight, pos_weight, reduction))
            if dpos_weight is not None:
                with_it, without = (
                    value(x, t, weight, p, reduction) for p in (dpos_weight, torch.zeros_like(dpos_weight))
                )
                changes.append(factor * (with_it - without))
            return sum(changes[1:], changes[0])

    Loss.rename(name)
    return Loss


def apply(function: type[Function], *args: Any, casts: bool = True) -> torch.Tensor:
    """Apply a loss to input, target and the rest; under autocast in float32, or with `casts=False` as they are."""
    x, t = args[0], args[1]
    if x.dtype is not t.dtype:  # torch promotes here; the formulas expect one dtype
        dtype = torch.promote_types(x.dtype, t.dtype)
        x, t = x.to(dtype), t.to(dtype)
    if under_autocast(x):
        return cast_apply(function, torch.float32 if casts else x.dtype, x, t, *args[2:])
    return function.apply(x, t, *args[2:])
