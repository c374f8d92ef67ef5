"""Losses along a class dimension: cross-entropy on logits (eq. 4) and the negative log likelihood it contains.

Shapes: z (N, C, d1, ..., dk) or (C); a target of class indices (N, d1, ..., dk) or (), or of probabilities like z.
With row weights r, which hold the class weight of the target, the reduction and what comes from above, and with p the
softmax of z over classes, the gradient is the report's "difference between predicted and true":

    indices         dz = r (p - onehot)        smoothed by e:  r (1 - e) (p - onehot) + r' e/C (p sum(w) - w)
    probabilities   dz = r (p sum(q) - q),  q = w ((1 - e) t + e/C)

Saved: z and the target, no softmax: it is computed again in backward, which spares a tensor of the size of z and keeps
double backward. `ignore_index` rows have r = 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_bp.autograd.function import Function, cast_apply, connected, save, transformed, under_autocast
from torch_bp.kernels.plain import reusable
from torch_bp.kernels.program import HALF
from torch_bp.ops import pairing
from torch_bp.ops.reduction import MEAN, NONE, SUM, no_gradient, reduction_code

_Optional = torch.Tensor | None


def _class_dim(z: torch.Tensor) -> int:
    return 0 if z.dim() == 1 else 1


def _along_classes(weight: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Shape the weights (C) so that they broadcast over z."""
    return weight.view([-1 if d == _class_dim(z) else 1 for d in range(z.dim())])


def _rows(dy: Any, z: torch.Tensor, target: Any, weight: _Optional, reduction: int, ignored: int) -> tuple[Any, ...]:
    """Return per row: the class (0 where ignored), dy times the target's class weight, and dy or 0 where ignored."""
    target = target.long()  # torch takes uint8 targets, in which -100 would be class 156
    counted = target != ignored
    classes = torch.where(counted, target, 0)
    if weight is None:
        # 0 also where all rows are ignored and dy is therefore Inf
        rows = even_rows = torch.where(counted, dy / counted.sum() if reduction == MEAN else dy, 0)
    else:
        weights = torch.where(counted, weight.to(z.dtype)[classes], 0)
        dy = dy / weights.sum() if reduction == MEAN else dy
        rows, even_rows = torch.where(counted, dy * weights, 0), torch.where(counted, dy, 0)
    dim = _class_dim(z)
    return classes.unsqueeze(dim), rows.unsqueeze(dim), even_rows.unsqueeze(dim)


def nll_backward(dy: Any, z: torch.Tensor, target: Any, weight: _Optional, reduction: int, ignored: int) -> Any:
    """The gradient at log-probabilities: minus the row weight at the target class, 0 elsewhere."""
    dtype = z.dtype
    if dtype in HALF:
        z, dy = z.float(), dy.float()
    classes, rows, _ = _rows(dy, z, target, weight, reduction, ignored)
    zeros = rows.new_zeros(z.shape)  # of `rows`, whose batch dimension it then has under `is_grads_batched`
    scatter = zeros.scatter_ if reusable() else zeros.scatter
    return scatter(_class_dim(z), classes, -rows.expand_as(classes)).to(dtype)


def cross_entropy_backward(
    dy: Any, z: torch.Tensor, target: Any, weight: _Optional, reduction: int, ignored: int, smoothing: float
) -> torch.Tensor:
    """eq. 4: the gradient at the logits for class indices, softmax minus one-hot."""
    dim, dtype = _class_dim(z), z.dtype
    if dtype in HALF:
        z, dy = z.float(), dy.float()
    classes, rows, even_rows = _rows(dy, z, target, weight, reduction, ignored)
    rows = rows if smoothing == 0 else rows * (1 - smoothing)
    factor = rows
    if smoothing != 0:
        even = even_rows * (smoothing / z.shape[dim])
        factor = rows + even * (z.shape[dim] if weight is None else weight.sum())
    dz = torch.softmax(z, dim) * factor
    if smoothing != 0:
        dz = dz - (even if weight is None else even * _along_classes(weight, z))
    # dz is a new tensor and nothing has saved it
    return dz.scatter_add_(dim, classes, -rows.expand_as(classes)).to(dtype)


def soft_cross_entropy_backward(
    dy: Any,
    z: Any,
    target: Any,
    weight: _Optional,
    reduction: int,
    smoothing: float,
    wanted: tuple[bool, ...],
) -> tuple[_Optional, ...]:
    """eq. 4: the gradients at the logits, at the target and at the class weights for target probabilities."""
    dim, dtypes = _class_dim(z), (z.dtype, target.dtype)
    wide = torch.promote_types(*dtypes)
    wide = torch.float32 if wide in HALF else wide
    z, target, dy = z.to(wide), target.to(wide), dy.to(wide)
    classes = z.shape[dim]
    if reduction == MEAN:
        dy = dy / (z.numel() // max(classes, 1))
    rows = dy.unsqueeze(dim) if reduction == NONE else dy
    dz = dt = dw = None
    smoothed = target if smoothing == 0 else target * (1 - smoothing) + smoothing / max(classes, 1)
    if wanted[0]:
        true = smoothed if weight is None else smoothed * _along_classes(weight, z)
        dz = (rows * (torch.softmax(z, dim) * true.sum(dim, keepdim=True) - true)).to(dtypes[0])
    if wanted[1]:
        slope = -(1 - smoothing) * torch.log_softmax(z, dim)
        dt = (rows * (slope if weight is None else slope * _along_classes(weight, z))).to(dtypes[1])
    if wanted[2]:
        others = [d for d in range(z.dim()) if d != dim]
        terms = -rows * smoothed * torch.log_softmax(z, dim)
        dw = terms.sum(others) if others else terms
    return dz, dt, dw


def _tangent(slope: torch.Tensor, tangent: torch.Tensor, z: torch.Tensor, reduction: int) -> torch.Tensor:
    """The change of the loss: row-wise or total product of the gradient for dy = 1 with a tangent."""
    product = slope * tangent
    return product.sum(_class_dim(z)) if reduction == NONE else product.sum()


def _total_weight(z: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, ignored: int) -> torch.Tensor:
    """The sum of the class weights of all counted rows, which a mean is divided by."""
    return NegativeLogLikelihood.forward(-torch.ones_like(z), target, weight, SUM, ignored)


def _ones(ctx: Any, z: torch.Tensor) -> torch.Tensor:
    """A dy of ones for the loss of logits z."""
    if ctx.options[0] != NONE:
        return z.new_ones(())
    return torch.ones_like(z.select(_class_dim(z), 0))


def _label_tangent(
    forward: Callable[..., torch.Tensor], backward: Callable[..., torch.Tensor], ctx: Any, dz: _Optional, dw: _Optional
) -> Any:
    """The change of a loss of class indices with its input and with its class weights.

    With the weights a sum is linear, and a mean the ratio of two sums.
    """
    (z, target, weight), (reduction, ignored, *smoothing) = ctx.saved_tensors, ctx.options
    change: Any = 0
    if dz is not None:
        slope = backward(_ones(ctx, z), z, target, weight, *ctx.options)
        change = _tangent(slope, dz, z, reduction)
    if dw is not None:
        by_weight = forward(z, target, dw, SUM if reduction == MEAN else reduction, ignored, *smoothing)
        if reduction == MEAN:
            loss = forward(z, target, weight, MEAN, ignored, *smoothing)
            by_weight = by_weight - loss * _total_weight(z, target, dw, ignored)
            by_weight = by_weight / _total_weight(z, target, weight, ignored)
        change = change + by_weight
    return change


class _ClassLoss(Function):
    """What the losses here keep: input, target, class weights and the options."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        save(ctx, *inputs[:3])
        ctx.options = inputs[3:]


class CrossEntropy(_ClassLoss):
    """eq. 4 with class indices."""

    @staticmethod
    def forward(
        z: torch.Tensor,
        target: torch.Tensor,
        weight: _Optional,
        reduction: int,
        ignored: int,
        smoothing: float,
    ) -> torch.Tensor:
        if reduction == MEAN and weight is not None and smoothing and transformed():
            # torch selects the counted rows there, which vmap cannot: the mean is the ratio of two sums
            total = CrossEntropy.forward(z, target, weight, SUM, ignored, smoothing)
            return total / _total_weight(z, target, weight, ignored)
        return torch._C._nn.cross_entropy_loss(z, target, weight, reduction, ignored, smoothing)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[_Optional, ...]:
        return cross_entropy_backward(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dz: _Optional, _: None, dw: _Optional, *__: Any) -> Any:
        return _label_tangent(CrossEntropy.forward, cross_entropy_backward, ctx, dz, dw)


class SoftCrossEntropy(_ClassLoss):
    """eq. 4 with target probabilities."""

    @staticmethod
    def forward(
        z: torch.Tensor, target: torch.Tensor, weight: _Optional, reduction: int, smoothing: float
    ) -> torch.Tensor:
        return torch._C._nn.cross_entropy_loss(z, target, weight, reduction, -100, smoothing)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[_Optional, ...]:
        z, target, weight = ctx.saved_tensors
        reduction, smoothing = ctx.options
        wanted = ctx.needs_input_grad[:3]
        slopes = soft_cross_entropy_backward(dy, z, target, weight, reduction, smoothing, wanted)
        return *slopes, None, None

    @staticmethod
    def jvp(ctx: Any, dz: _Optional, dt: _Optional, dw: _Optional, *_: Any) -> torch.Tensor:
        z, target, weight = ctx.saved_tensors
        if dw is not None:  # the loss is linear in the weights, and so in their tangent
            by_weight = SoftCrossEntropy.forward(z, target, dw, *ctx.options)
        wanted = (dz is not None, dt is not None, False)
        reduction, smoothing = ctx.options
        slopes = soft_cross_entropy_backward(_ones(ctx, z), z, target, weight, reduction, smoothing, wanted)
        terms = [_tangent(s, t, z, ctx.options[0]) for s, t in zip(slopes, (dz, dt)) if s is not None and t is not None]
        terms += [by_weight] if dw is not None else []
        return sum(terms[1:], terms[0])


class NegativeLogLikelihood(_ClassLoss):
    """The loss on log-probabilities that eq. 4 ends with."""

    @staticmethod
    def forward(
        logp: torch.Tensor, target: torch.Tensor, weight: _Optional, reduction: int, ignored: int
    ) -> torch.Tensor:
        return torch._C._nn.nll_loss_nd(logp, target, weight, reduction, ignored)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[_Optional, ...]:
        logp, target, weight = ctx.saved_tensors
        slope = nll_backward(dy, logp, target, weight, *ctx.options)
        return connected(slope, logp), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dlogp: _Optional, _: None, dw: _Optional, *__: Any) -> Any:
        return _label_tangent(NegativeLogLikelihood.forward, nll_backward, ctx, dlogp, dw)


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: _Optional = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """As `torch.nn.functional.cross_entropy`; eq. 4 on logits, for class indices or probabilities.

    Raises:
        IndexError: a class index outside [0, C), on the CPU; on CUDA the device asserts, as torch does.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
        tensor(0.6931)
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
        )
    if pairing.enabled:
        pairing.check("cross_entropy", input)
    code = reduction_code(size_average, reduce, reduction)
    label_smoothing = max(label_smoothing, 0.0)  # torch takes what is negative for none
    args: tuple[Any, ...]
    if target.is_floating_point() and input.shape == target.shape:
        if ignore_index >= 0:
            raise RuntimeError("ignore_index is not supported for floating point target")
        function: type[Function] = SoftCrossEntropy
        args = (input, target, weight, code, label_smoothing)
    else:
        function, args = CrossEntropy, (input, target, weight, code, ignore_index, label_smoothing)
        no_gradient("cross_entropy", weight=weight)
    if under_autocast(input):
        return cast_apply(function, torch.float32, *args)
    return function.apply(*args)


def nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: _Optional = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """As `torch.nn.functional.nll_loss`, on log-probabilities.

    Example:
        >>> nll_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]))
        tensor(2.)
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            nll_loss,
            (input, target, weight),
            input,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
        )
    if pairing.enabled:
        pairing.check("nll_loss", input)
    code = reduction_code(size_average, reduce, reduction)
    no_gradient("nll_loss", weight=weight)
    args = (input, target, weight, code, ignore_index)
    if under_autocast(input):
        return cast_apply(NegativeLogLikelihood, torch.float32, *args)
    return NegativeLogLikelihood.apply(*args)
