"""Cross-entropy on logits, eq. 4.

Shapes: logits z (N, C, d1, ..., dk) or (C); a target of class indices (N, d1, ..., dk) or (), or of probabilities
like z. With row weights r, which hold the class weight of the target, the reduction and what comes from above, and with
p the softmax of z over classes, the gradient is the report's "difference between predicted and true":

    indices         dz = r (p - onehot)        smoothed by e:  r (1 - e) (p - onehot) + r' e/C (p sum(w) - w)
    probabilities   dz = r (p sum(q) - q),  q = w ((1 - e) t + e/C)

Saved: z and the target, no softmax: it is computed again in backward, which spares a tensor of the size of z and keeps
double backward. Of many logits also two numbers a row, the maximum and the sum of exp(z - max): apart, since the
logarithm of the second would be rounded away beside the first at large logits. Rows of `ignore_index` have r = 0.
"""

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_bp.autograd.function import Function, cast_apply, overridden, transformed, under_autocast
from torch_bp.kernels import exp, formula, log, one_hot, row_max, row_sum, where
from torch_bp.kernels.plain import eager
from torch_bp.kernels.program import HALF
from torch_bp.ops import pairing
from torch_bp.ops.class_loss import (
    ClassLoss,
    CountedLoss,
    along_classes,
    class_dim,
    column,
    countable,
    counted_nll,
    from_above,
    label_tangent,
    number,
    ones,
    tangent,
    total_weight,
)
from torch_bp.ops.reduction import MEAN, NONE, SUM, no_gradient, reduction_code
from torch_bp.ops.rows import from_rows, to_rows

_Optional = torch.Tensor | None
_WORTHWHILE = 1 << 19  # logits below which the steps around the kernel cost more than they save


@formula(per_row=("picked",), labels=("target",), static=("smoothed",))
def label_losses(z, target, picked, *, ignored, hit, spread, smoothed):
    """eq. 4 per row, with the row's maximum and sum of exp(z - maximum); `picked` is z at the target's class."""
    top = row_max(z)
    total = row_sum(exp(z - top))
    loss = log(total) - (hit * (picked - top) + spread * row_sum(z - top) if smoothed else picked - top)
    return where(target == ignored, 0, loss), top, total


@formula(per_row=("rows", "factor", "top", "total"), labels=("target",))
def label_slope(
    z, target, rows=None, factor=None, top=None, total=None, *, scale=1.0, count=1.0, hit=1.0, spread=0.0, ignored
):
    """eq. 4: the gradient at the logits for class indices, softmax minus one-hot. NaN in ignored rows stays."""
    if top is None:
        top = row_max(z)
        total = row_sum(exp(z - top))
    p = exp(z - top) / total
    true = hit * one_hot(target, z) + spread
    if factor is not None:
        return factor * p - rows * true
    if rows is not None:
        return rows * p - rows * true  # not of p - true, which would be rounded once more where p is small
    return where(target == ignored, 0 * p, scale / count * p - scale / count * true)


@formula(per_row=("rows",))
def soft_slope(z, target, rows=None, *, scale=1.0, hit=1.0, spread=0.0):
    """eq. 4: the gradient at the logits for target probabilities, which need not sum to one."""
    top = row_max(z)
    p = exp(z - top)
    p = p / row_sum(p)
    true = hit * target + spread
    slope = p * row_sum(true) - true
    return scale * slope if rows is None else rows * slope


def cross_entropy_backward(
    dy: Any,
    z: torch.Tensor,
    target: Any,
    weight: _Optional,
    reduction: int,
    ignored: int,
    smoothing: float,
    top: _Optional = None,
    total: _Optional = None,
    count: float | None = None,
) -> torch.Tensor:
    """The gradient at logits of any shape for class indices; the last three may be known already."""
    dim, dtype = class_dim(z), z.dtype
    classes = z.shape[dim]
    if not classes:
        return z.clone()
    if dtype in HALF:
        z, dy = z.float(), dy.float()
    spread = smoothing / classes
    rows, options, even = from_above(dy, target, weight, reduction, ignored, count)
    labels, ignored = column(target, ignored)
    options |= {"hit": 1 - smoothing, "spread": spread if weight is None else 0.0, "ignored": ignored}
    factor = None
    if even is not None and smoothing:
        even = spread * even  # rounded once for both terms, which cancel
        factor = (1 - smoothing) * rows + even * weight.to(dy.dtype).sum()  # type: ignore[union-attr]
    slope = label_slope(to_rows(z, dim), labels, rows, factor, top, total, **options)
    dz = from_rows(slope, z, dim)
    if factor is not None:
        even = even.reshape(z.select(dim, 0).shape).unsqueeze(dim)
        dz = dz - even * along_classes(weight, z)  # type: ignore[arg-type]
    return dz.to(dtype)


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
    dim, dtypes = class_dim(z), (z.dtype, target.dtype)
    wide = torch.promote_types(*dtypes)
    wide = torch.float32 if wide in HALF else wide
    z, target, dy = z.to(wide), target.to(wide), dy.to(wide)
    classes = z.shape[dim]
    spread = smoothing / max(classes, 1)
    if reduction == MEAN:
        dy = dy / (z.numel() // max(classes, 1))
    rows = dy.unsqueeze(dim) if reduction == NONE else dy
    dz = dt = dw = None
    if wanted[0] and classes:
        options = {} if reduction == NONE else {"scale": dy}
        options |= {"hit": 1 - smoothing, "spread": spread}
        true = target
        if weight is not None:
            true = ((1 - smoothing) * target + spread) * along_classes(weight, z)
            options |= {"hit": 1.0, "spread": 0.0}
        column_of_rows = to_rows(rows, dim) if reduction == NONE else None
        dz = from_rows(soft_slope(to_rows(z, dim), to_rows(true, dim), column_of_rows, **options), z, dim)
        dz = dz.to(dtypes[0])
    elif wanted[0]:
        dz = z.to(dtypes[0])
    if wanted[1]:
        slope = -(1 - smoothing) * torch.log_softmax(z, dim)
        dt = (rows * (slope if weight is None else slope * along_classes(weight, z))).to(dtypes[1])
    if wanted[2]:
        others = [d for d in range(z.dim()) if d != dim]
        terms = -rows * ((1 - smoothing) * target + spread) * torch.log_softmax(z, dim)
        dw = terms.sum(others) if others else terms
    return dz, dt, dw


class CrossEntropy(ClassLoss):
    """eq. 4 with class indices."""

    equations = ("L = mean of -log(softmax(z)[target]), eq. 4", "dz = (softmax(z) - onehot) dL / n, eq. 4")

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
            return total / total_weight(z, target, weight, ignored)
        return torch._C._nn.cross_entropy_loss(z, target, weight, reduction, ignored, smoothing)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[_Optional, ...]:
        return cross_entropy_backward(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dz: _Optional, _: None, dw: _Optional, *__: Any) -> Any:
        return label_tangent(CrossEntropy.forward, cross_entropy_backward, ctx, dz, dw)


class RowCrossEntropy(Function):
    """eq. 4 with class indices and without class weights, where nobody watches, from one kernel over the rows."""

    equations = ("L = mean of -log(softmax(z)[target]), eq. 4", "dz = (softmax(z) - onehot) dL / n, eq. 4")

    @staticmethod
    def forward(
        z: torch.Tensor, target: torch.Tensor, reduction: int, ignored: int, smoothing: float
    ) -> tuple[torch.Tensor, ...]:
        dim = class_dim(z)
        rows = to_rows(z, dim)
        # Checks the labels as torch checks them; 0 for rows that are ignored.
        picked = -torch._C._nn.nll_loss_nd(rows, target.reshape(-1), None, NONE, ignored)  # type: ignore[arg-type]
        labels, ignored = column(target, ignored)
        options = {"hit": 1 - smoothing, "spread": smoothing / z.shape[dim], "smoothed": smoothing != 0}
        losses, top, total = label_losses(rows, labels, picked.view(-1, 1), ignored=ignored, **options)
        if reduction == NONE:
            return losses.reshape(target.shape), top, total
        loss = losses.sum()
        return loss / number(labels != ignored) if reduction == MEAN else loss, top, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], *statistics)
        ctx.options = inputs[2:]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple[_Optional, ...]:
        if dy is None:
            return None, None, None, None, None
        z, target, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():  # the statistics depend on z
            statistics = []
        return cross_entropy_backward(dy, z, target, None, *ctx.options, *statistics), None, None, None, None


class CountedCrossEntropy(CountedLoss):
    """eq. 4 of few logits, with class indices and without class weights: torch's two kernels make less ado of it."""

    equations = ("L = mean of -log(softmax(z)[target]), eq. 4", "dz = (softmax(z) - onehot) dL / n, eq. 4")

    @staticmethod
    def forward(z: torch.Tensor, target: torch.Tensor, reduction: int, ignored: int) -> tuple[torch.Tensor, Any]:
        return counted_nll(torch.log_softmax(z, 1), target, reduction, ignored)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, _: None) -> tuple[_Optional, ...]:
        z, target = ctx.saved_tensors
        reduction, ignored, count = ctx.options
        slope = cross_entropy_backward(dy, z, target, None, reduction, ignored, 0.0, count=count)
        return slope, None, None, None


class SoftCrossEntropy(ClassLoss):
    """eq. 4 with target probabilities."""

    equations = ("L = mean of -sum of t log(softmax(z)), eq. 4", "dz = (softmax(z) sum(t) - t) dL / n, eq. 4")

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
        slopes = soft_cross_entropy_backward(ones(z, reduction), z, target, weight, reduction, smoothing, wanted)
        terms = [tangent(s, t, z, ctx.options[0]) for s, t in zip(slopes, (dz, dt)) if s is not None and t is not None]
        terms += [by_weight] if dw is not None else []
        return sum(terms[1:], terms[0])


def _by_rows(z: torch.Tensor, target: torch.Tensor) -> bool:
    """True if `RowCrossEntropy` may serve: nobody watches, and torch would take these arguments."""
    return (
        eager()
        and isinstance(target, torch.Tensor)
        and z.dtype in (torch.float32, torch.float64)
        and (target.dtype is torch.int64 or (target.dtype is torch.uint8 and z.dim() == 2))
        and z.dim() > 0
        and z.device == target.device
        and target.shape == (z.shape[:1] + z.shape[2:] if z.dim() > 1 else ())
        and not under_autocast(z)
    )


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
    if has_torch_function_variadic(input, target, weight) and overridden():
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
    if not isinstance(input, torch.Tensor):  # torch's error
        return torch._C._nn.cross_entropy_loss(input, target, weight, code, ignore_index, label_smoothing)
    label_smoothing = max(label_smoothing, 0.0)  # torch takes what is negative for none
    args: tuple[Any, ...]
    if isinstance(target, torch.Tensor) and target.is_floating_point() and input.shape == target.shape:
        if ignore_index >= 0:
            raise RuntimeError("ignore_index is not supported for floating point target")
        function: type[Function] = SoftCrossEntropy
        args = (input, target, weight, code, label_smoothing)
    else:
        if label_smoothing and getattr(target, "dtype", None) is torch.uint8 and not 0 <= ignore_index < 256:
            # torch ignores the wrapped index in one of two terms: its business, forward and backward
            return torch.nn.functional.cross_entropy(
                input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
            )
        function, args = CrossEntropy, (input, target, weight, code, ignore_index, label_smoothing)
        no_gradient("cross_entropy", weight=weight)
        if input.numel() < _WORTHWHILE:
            if not label_smoothing and countable(input, target, weight):
                return CountedCrossEntropy.apply(input, target, code, ignore_index)[0]
        elif weight is None and label_smoothing <= 1 and _by_rows(input, target):
            return RowCrossEntropy.apply(input, target, code, ignore_index, label_smoothing)[0]
    if under_autocast(input):
        return cast_apply(function, torch.float32, *args)
    return function.apply(*args)
