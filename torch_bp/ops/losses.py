"""Losses that compare element with element: squared error and binary cross-entropy.

Input x and target t have one shape (after broadcasting, where torch broadcasts); the loss is reduced to a number or
kept per element. Each loss is a value, a torch operation that reads memory once, and two formulas: its derivative with
respect to x and to t. Saved: x, t and the weights. Forward mode multiplies the same derivatives with tangents.

    squared error     l = (x - t)^2                                     dl/dx = 2 (x - t)
    half, eq. 3       L = 1/(2n) sum of (x - t)^2                       dL/dx = (x - t) / n
    BCE, eq. 5        l = -(t log x + (1 - t) log(1 - x))               dl/dx = (x - t) / (x (1 - x))
    BCE on logits z   l of x = sigmoid(z), positives weighted by p      dl/dz = (1 + (p - 1) t) sigmoid(z) - p t

The report's eq. 3 divides by twice the number of examples, torch's `reduction="mean"` by the number of elements: two
conventions, two names.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_bp.autograd.function import Function, cast_apply, save, under_autocast
from torch_bp.kernels import formula, log, maximum
from torch_bp.kernels.program import HALF

_Optional = torch.Tensor | None

NONE, MEAN, SUM = (_reduction.get_enum(name) for name in ("none", "mean", "sum"))


@formula
def squared_error_backward(dy, x, t, *, scale):
    """dl/dx of (x - t)^2; eq. 3 with its factor in `scale`. dl/dt is the negative."""
    slope = 2 * scale * (x - t)
    return slope if dy is None else slope * dy


@formula
def bce_backward(dy, x, t, *, scale):
    """eq. 5: dl/dx; the denominator is kept from 0 as torch keeps it."""
    slope = scale * (x - t) / maximum((1 - x) * x, 1e-12)
    return slope if dy is None else slope * dy


@formula
def bce_target_backward(dy, x, t, *, scale):
    """eq. 5: dl/dt = log(1 - x) - log(x)."""
    slope = scale * (log(1 - x) - log(x))
    return slope if dy is None else slope * dy


@formula
def bce_logits_backward(dy, s, t, p, *, scale):
    """eq. 5 after eq. 12: dl/dz, from s = sigmoid(z). Without class weight p it is s - t."""
    slope = scale * (s - t) if p is None else scale * ((1 + (p - 1) * t) * s - p * t)
    return slope if dy is None else slope * dy


@formula
def bce_logits_target_backward(dy, z, positive, negative, p, *, scale):
    """eq. 5 after eq. 12: dl/dt = log s(-z) - p log s(z), from log s(z) and log s(-z); -z without class weight p."""
    slope = -scale * z if p is None else scale * (negative - p * positive)
    return slope if dy is None else slope * dy


def _squared_error_slopes(dy: _Optional, x: Any, t: Any, p: None, scale: Any, wanted: tuple[bool, bool]) -> Any:
    slope = squared_error_backward(dy, x, t, scale=scale)
    return slope if wanted[0] else None, -slope if wanted[1] else None


def _bce_slopes(dy: _Optional, x: Any, t: Any, p: None, scale: Any, wanted: tuple[bool, bool]) -> Any:
    return (
        bce_backward(dy, x, t, scale=scale) if wanted[0] else None,
        bce_target_backward(dy, x, t, scale=scale) if wanted[1] else None,
    )


def _bce_logits_slopes(dy: _Optional, z: Any, t: Any, p: _Optional, scale: Any, wanted: tuple[bool, bool]) -> Any:
    dz = dt = None
    if wanted[0]:
        weight = None if p is None else p.expand_as(z)
        dz = bce_logits_backward(dy, torch.sigmoid(z), t, weight, scale=scale)
    if wanted[1]:
        log_s = torch.nn.functional.logsigmoid
        positive, negative = (None, None) if p is None else (log_s(z), log_s(-z))
        weight = None if p is None else p.expand_as(z)
        dt = bce_logits_target_backward(dy, z, positive, negative, weight, scale=scale)
    return dz, dt


def _elementwise_loss(name: str, value: Callable[..., torch.Tensor], slopes: Callable[..., Any]) -> type[Function]:
    """Make the Function of a loss of `(input, target, weight, pos_weight, reduction, factor)`.

    `value(input, target, weight, pos_weight, reduction)` is reduced by torch, by NONE, MEAN or SUM, and multiplied
    with `factor`; `slopes(dy, input, target, pos_weight, scale, wanted)` returns scale times dl/dx and dl/dt, times dy
    where that is not None.
    """

    def upstream(dy: torch.Tensor, x: torch.Tensor, weight: _Optional, options: tuple[int, float]) -> tuple[Any, Any]:
        """Split what comes from above into one value per element, or None, and a number."""
        reduction, factor = options
        if reduction == NONE:
            return dy if weight is None else dy * weight, factor
        if reduction == MEAN:
            factor = factor / max(x.numel(), 1)
        if weight is None:  # 1/n is subnormal in half precision for a large n
            return None, (dy.float() if dy.dtype in HALF else dy) * factor
        return (weight * dy).expand_as(x), factor

    class Loss(Function):
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
            x, t, weight, pos_weight = ctx.saved_tensors
            dy, scale = upstream(dy, x, weight, ctx.options)
            dx, dt = slopes(dy, x, t, pos_weight, scale, ctx.needs_input_grad[:2])
            return dx, dt, None, None, None, None

        @staticmethod
        def jvp(
            ctx: Any, dx: _Optional, dt: _Optional, dweight: _Optional, dpos_weight: _Optional, *_: Any
        ) -> torch.Tensor:
            x, t, weight, pos_weight = ctx.saved_tensors
            reduction, factor = ctx.options
            one = torch.ones_like(x) if reduction == NONE else x.new_ones(())
            dy, scale = upstream(one, x, weight, ctx.options)
            by_x, by_t = slopes(dy, x, t, pos_weight, scale, (dx is not None, dt is not None))
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


SquaredError = _elementwise_loss(
    "squared_error",
    lambda x, t, _, __, reduction: torch._C._nn.mse_loss(x, t, reduction),
    _squared_error_slopes,
)
BinaryCrossEntropy = _elementwise_loss(
    "binary_cross_entropy",
    lambda x, t, weight, _, reduction: torch._C._nn.binary_cross_entropy(x, t, weight, reduction),
    _bce_slopes,
)
BinaryCrossEntropyWithLogits = _elementwise_loss(
    "binary_cross_entropy_with_logits",
    torch.binary_cross_entropy_with_logits,
    _bce_logits_slopes,
)


def reduction_code(size_average: bool | None, reduce: bool | None, reduction: str) -> int:
    """Return NONE, MEAN or SUM, as the legacy arguments or `reduction` say, checked as torch checks it."""
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_enum(size_average, reduce)
    return _reduction.get_enum(reduction)


def no_gradient(name: str, **tensors: _Optional) -> None:
    """Refuse, in torch's words, weights that ask for a gradient which is not defined."""
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: the derivative for '{argument}' is not implemented; pass {argument}.detach() or set "
                f"requires_grad=False on it."
            )


def _apply(function: type[Function], *args: Any, casts: bool = True) -> torch.Tensor:
    x, t = args[0], args[1]
    if x.dtype is not t.dtype:  # torch promotes here; the formulas expect one dtype
        dtype = torch.promote_types(x.dtype, t.dtype)
        x, t = x.to(dtype), t.to(dtype)
    if under_autocast(x):
        return cast_apply(function, torch.float32 if casts else x.dtype, x, t, *args[2:])
    return function.apply(x, t, *args[2:])


def _same_size_expected(input: torch.Tensor, target: torch.Tensor) -> None:
    if target.size() != input.size():
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )


def mse_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: _Optional = None,
) -> torch.Tensor:
    """As `torch.nn.functional.mse_loss`: "mean" divides by the number of elements. See `half_mse_loss` for eq. 3.

    Example:
        >>> mse_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        tensor(2.)
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            mse_loss, (input, target, weight), input, target, size_average, reduce, reduction, weight
        )
    _same_size_expected(input, target)
    code = reduction_code(size_average, reduce, reduction)
    x, t = (input, target) if input.shape == target.shape else torch.broadcast_tensors(input, target)
    if weight is None:
        return _apply(SquaredError, x, t, None, None, code, 1.0)
    if weight.size() != input.size():
        raise ValueError("Weights and input must have the same size.")
    # torch composes this case; on the CPU autocast leaves what it is composed of alone
    losses = _apply(SquaredError, x, t, None, None, NONE, 1.0, casts=input.is_cuda) * weight
    return losses if code == NONE else losses.sum() / (weight.sum() if code == MEAN else 1)


def half_mse_loss(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The report's squared error, eq. 3: 1/(2n) times the sum over examples and outputs of (input - target)^2.

    Args:
        input: predictions (n, *); n is the size of the first dimension. A tensor without dimensions is one example.
        target: what they should be, of the same shape.

    Returns:
        A number of the input's dtype; NaN for an empty batch, as torch's mean.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> half_mse_loss(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.zeros(2, 2))
        tensor(0.5000)
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(half_mse_loss, (input, target), input, target)
    if target.size() != input.size():
        raise ValueError(
            f"half_mse_loss: target must be of the input's shape (n, *), got target {tuple(target.size())} and input "
            f"{tuple(input.size())}; use target.view_as(input) if they hold the same elements."
        )
    n = input.size(0) if input.dim() else 1
    return _apply(SquaredError, input, target, None, None, SUM, 0.5 / n if n else float("nan"))


def binary_cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: _Optional = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """As `torch.nn.functional.binary_cross_entropy`; eq. 5. `input` and `target` lie in [0, 1].

    Example:
        >>> binary_cross_entropy(torch.tensor([0.5]), torch.tensor([1.0]))
        tensor(0.6931)
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            binary_cross_entropy,
            (input, target, weight),
            input,
            target,
            weight,
            size_average,
            reduce,
            reduction,
        )
    code = reduction_code(size_average, reduce, reduction)
    if target.size() != input.size():
        raise ValueError(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}) is "
            "deprecated. Please ensure they have the same size."
        )
    if input.is_cuda and under_autocast(input):
        raise RuntimeError(
            "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.\n"
            "Compute the loss on logits with binary_cross_entropy_with_logits or BCEWithLogitsLoss, which are safe."
        )
    no_gradient("binary_cross_entropy", weight=weight)
    if weight is not None:
        weight = weight.expand(torch.broadcast_shapes(target.size(), weight.size()))
    if input.dtype is not target.dtype:  # torch refuses here, with its own words
        return torch.nn.functional.binary_cross_entropy(input, target, weight, reduction=reduction)
    return _apply(BinaryCrossEntropy, input, target, weight, None, code, 1.0)


def binary_cross_entropy_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: _Optional = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: _Optional = None,
) -> torch.Tensor:
    """As `torch.nn.functional.binary_cross_entropy_with_logits`; eq. 5 on eq. 12, exact at large logits.

    Example:
        >>> binary_cross_entropy_with_logits(torch.tensor([1e4]), torch.tensor([1.0]))
        tensor(0.)
    """
    if has_torch_function_variadic(input, target, weight, pos_weight):
        return handle_torch_function(
            binary_cross_entropy_with_logits,
            (input, target, weight, pos_weight),
            input,
            target,
            weight,
            size_average,
            reduce,
            reduction,
            pos_weight,
        )
    code = reduction_code(size_average, reduce, reduction)
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    if input.dtype is not target.dtype and not under_autocast(input):  # torch mixes some dtypes here and refuses others
        return torch.nn.functional.binary_cross_entropy_with_logits(
            input, target, weight, reduction=reduction, pos_weight=pos_weight
        )
    no_gradient("binary_cross_entropy_with_logits", weight=weight, pos_weight=pos_weight)
    return _apply(BinaryCrossEntropyWithLogits, input, target, weight, pos_weight, code, 1.0)
