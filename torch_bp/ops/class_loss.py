"""What the losses over classes have in common.

Shapes: z (N, C, d1, ..., dk) or (C); a target of class indices (N, d1, ..., dk) or (). Formulas see z as a matrix of
one row per target, and the target as a column.
"""

from collections.abc import Callable
from typing import Any

import torch

from torch_bp.autograd.function import Function, save, under_autocast
from torch_bp.kernels.capture import capturing
from torch_bp.kernels.plain import PLAIN_TYPES, reusable
from torch_bp.ops.reduction import MEAN, NONE, SUM

_Optional = torch.Tensor | None


def class_dim(z: torch.Tensor) -> int:
    """Return the dimension of classes."""
    return 0 if z.dim() == 1 else 1


def along_classes(weight: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Shape the weights (C) so that they broadcast over z."""
    return weight.view([-1 if d == class_dim(z) else 1 for d in range(z.dim())])


_nll_loss_forward = torch.ops.aten.nll_loss_forward.default


def counted_nll(logp: torch.Tensor, target: torch.Tensor, reduction: int, ignored: int) -> tuple[torch.Tensor, Any]:
    """Return torch's negative log likelihood of log-probabilities (N, C), and how many rows count, of none 1.

    A tensor where the next call may count others; None where only the device knows.
    """
    loss, count = _nll_loss_forward(logp, target, None, reduction, ignored)
    if reduction != MEAN or not count.is_cpu:
        return loss, None
    return loss, count.clamp(min=1) if capturing() else count.item() or 1.0


def countable(z: torch.Tensor, target: torch.Tensor, weight: _Optional) -> bool:
    """True if `counted_nll` takes these and nobody watches, who would have to know the count before it is there."""
    return (
        weight is None
        and type(z) in PLAIN_TYPES
        and type(target) in PLAIN_TYPES
        and reusable()
        and z.dim() == 2
        and target.dtype is torch.int64
        and target.shape == z.shape[:1]
        and z.dtype in (torch.float32, torch.float64)
        and z.device == target.device
        and z.numel() > 0
        and not under_autocast(z)
    )


def column(target: torch.Tensor, ignored: int) -> tuple[torch.Tensor, int]:
    """Return class indices as a column (R, 1), and the index that is ignored.

    Torch takes uint8 indices, in which -100 would be class 156. A kernel compares in float32: an index that has no
    place there is replaced by -1.
    """
    labels = target.unsqueeze(1) if target.dim() == 1 else target.reshape(-1, 1)
    labels = labels.long() if labels.dtype is not torch.int64 else labels
    if abs(ignored) < 2**24:
        return labels, ignored
    return torch.where(labels == ignored, -1, labels), -1


def number(mask: torch.Tensor) -> torch.Tensor:
    """How many are true; vmap has no rule for the faster way."""
    return torch.count_nonzero(mask) if reusable() else mask.sum()


def from_above(
    dy: torch.Tensor,
    target: torch.Tensor,
    weight: _Optional,
    reduction: int,
    ignored: int,
    count: float | None = None,
) -> tuple[Any, dict[str, Any], Any]:
    """Return what multiplies the loss of each row: per row, as numbers for formulas, and per row before class weights.

    None in the place of ones. Rows that are ignored have 0; where there are numbers for all rows, formulas see to it.
    A mean is `scale` over `count`, how many rows count, which may be known already. Of none it is 1: dy / 0 would make
    NaN of the formulas' own derivatives.
    """
    if weight is None and reduction == SUM:
        return None, {"scale": dy}, None
    if weight is None and reduction == MEAN and count is not None:
        return None, {"scale": dy, "count": count}, None
    labels, ignored = column(target, ignored)
    counted = labels != ignored
    if weight is None:
        if reduction == NONE:
            return torch.where(counted, dy.reshape(-1, 1), 0), {}, None
        return None, {"scale": dy, "count": number(counted).clamp(min=1)}, None
    weights = torch.where(counted, weight.to(dy.dtype)[torch.where(counted, labels, 0)], 0)
    rows = dy.reshape(-1, 1) if reduction == NONE else dy / weights.sum() if reduction == MEAN else dy
    return torch.where(counted, rows * weights, 0), {}, torch.where(counted, rows, 0)


def ones(z: torch.Tensor, reduction: int) -> torch.Tensor:
    """Return a dy of ones for the loss of logits z."""
    return torch.ones_like(z.select(class_dim(z), 0)) if reduction == NONE else z.new_ones(())


def tangent(slope: torch.Tensor, change: torch.Tensor, z: torch.Tensor, reduction: int) -> torch.Tensor:
    """The change of the loss: row-wise or total product of the gradient for dy = 1 with a tangent."""
    product = slope * change
    return product.sum(class_dim(z)) if reduction == NONE else product.sum()


def total_weight(z: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, ignored: int) -> torch.Tensor:
    """The sum of the class weights of all counted rows, which a mean is divided by."""
    return torch._C._nn.nll_loss_nd(-torch.ones_like(z), target, weight, SUM, ignored)  # type: ignore[arg-type]


def label_tangent(
    forward: Callable[..., torch.Tensor], backward: Callable[..., torch.Tensor], ctx: Any, dz: _Optional, dw: _Optional
) -> Any:
    """The change of a loss of class indices with its input and with its class weights.

    With the weights a sum is linear, and a mean the ratio of two sums.
    """
    (z, target, weight), (reduction, ignored, *smoothing) = ctx.saved_tensors, ctx.options
    change: Any = 0
    if dz is not None:
        slope = backward(ones(z, reduction), z, target, weight, *ctx.options)
        change = tangent(slope, dz, z, reduction)
    if dw is not None:
        by_weight = forward(z, target, dw, SUM if reduction == MEAN else reduction, ignored, *smoothing)
        if reduction == MEAN:
            loss = forward(z, target, weight, MEAN, ignored, *smoothing)
            by_weight = by_weight - loss * total_weight(z, target, dw, ignored)
            by_weight = by_weight / total_weight(z, target, weight, ignored)
        change = change + by_weight
    return change


class ClassLoss(Function):
    """What is kept: input, target, class weights and the options."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        save(ctx, *inputs[:3])
        ctx.options = inputs[3:]


class CountedLoss(Function):
    """What is kept of `counted_nll` and its like: input, target, the options and how many rows count."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.options = (*inputs[2:], output[1])
