"""Binary cross-entropy, eq. 5, on probabilities and on logits.

    on probabilities x    l = -(t log x + (1 - t) log(1 - x))                        dl/dx = (x - t) / (x (1 - x))
    on logits z           l of x = sigmoid(z), positives weighted by p               dl/dz = (1 + (p - 1) t) s(z) - p t

Shapes: input, target t and the result alike; class weights p broadcast. Saved: input, target and weights.
"""

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_bp.autograd.function import overridden, under_autocast
from torch_bp.kernels import formula, log, maximum, sigmoid
from torch_bp.ops import pairing
from torch_bp.ops.elementwise_loss import apply, elementwise_loss
from torch_bp.ops.reduction import no_gradient, reduction_code

_Optional = torch.Tensor | None


@formula
def bce_backward(dy, x, t, *, scale, factor):
    """eq. 5: dl/dx; the denominator is kept from 0 as torch keeps it."""
    slope = scale * factor * (x - t) / maximum((1 - x) * x, 1e-12)
    return slope if dy is None else slope * dy


@formula
def bce_target_backward(dy, x, t, *, scale, factor):
    """eq. 5: dl/dt = log(1 - x) - log(x)."""
    slope = scale * factor * (log(1 - x) - log(x))
    return slope if dy is None else slope * dy


@formula
def bce_logits_backward(dy, z, t, p, *, scale, factor):
    """eq. 5 after eq. 12: dl/dz, with s = sigmoid(z). Without class weight p it is s - t."""
    s = sigmoid(z)
    slope = scale * factor * (s - t) if p is None else scale * factor * ((1 + (p - 1) * t) * s - p * t)
    return slope if dy is None else slope * dy


@formula
def bce_logits_target_backward(dy, z, positive, negative, p, *, scale, factor):
    """eq. 5 after eq. 12: dl/dt = log s(-z) - p log s(z), from log s(z) and log s(-z); -z without class weight p."""
    slope = -(scale * factor) * z if p is None else scale * factor * (negative - p * positive)
    return slope if dy is None else slope * dy


def _bce_slopes(dy: _Optional, x: Any, t: Any, p: None, wanted: tuple[bool, bool], **numbers: Any) -> Any:
    return (
        bce_backward(dy, x, t, **numbers) if wanted[0] else None,
        bce_target_backward(dy, x, t, **numbers) if wanted[1] else None,
    )


def _bce_logits_slopes(dy: _Optional, z: Any, t: Any, p: _Optional, wanted: tuple[bool, bool], **numbers: Any) -> Any:
    dz = dt = None
    if wanted[0]:
        weight = None if p is None else p.expand_as(z)
        dz = bce_logits_backward(dy, z, t, weight, **numbers)
    if wanted[1]:
        log_s = torch.nn.functional.logsigmoid
        positive, negative = (None, None) if p is None else (log_s(z), log_s(-z))
        weight = None if p is None else p.expand_as(z)
        dt = bce_logits_target_backward(dy, z, positive, negative, weight, **numbers)
    return dz, dt


BinaryCrossEntropy = elementwise_loss(
    "binary_cross_entropy",
    lambda x, t, weight, _, reduction: torch._C._nn.binary_cross_entropy(x, t, weight, reduction),
    _bce_slopes,
    ("L = mean of -t log x - (1 - t) log(1 - x), eq. 5", "dx = (x - t) / (x (1 - x)) dL / n"),
)
BinaryCrossEntropyWithLogits = elementwise_loss(
    "binary_cross_entropy_with_logits",
    torch.binary_cross_entropy_with_logits,
    _bce_logits_slopes,
    ("L = mean of -t log s(z) - (1 - t) log(1 - s(z)), eq. 5", "dz = (s(z) - t) dL / n"),
)


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
    if has_torch_function_variadic(input, target, weight) and overridden():
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
    if pairing.enabled:
        pairing.check("binary_cross_entropy", input)
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
    return apply(BinaryCrossEntropy, input, target, weight, None, code, 1.0)


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
    if has_torch_function_variadic(input, target, weight, pos_weight) and overridden():
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
    if pairing.enabled:
        pairing.check("binary_cross_entropy_with_logits", input)
    code = reduction_code(size_average, reduce, reduction)
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    if input.dtype is not target.dtype and not under_autocast(input):  # torch mixes some dtypes here and refuses others
        return torch.nn.functional.binary_cross_entropy_with_logits(
            input, target, weight, reduction=reduction, pos_weight=pos_weight
        )
    no_gradient("binary_cross_entropy_with_logits", weight=weight, pos_weight=pos_weight)
    return apply(BinaryCrossEntropyWithLogits, input, target, weight, pos_weight, code, 1.0)
