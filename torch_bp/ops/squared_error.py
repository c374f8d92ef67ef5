"""Squared error, in torch's convention and in the report's.

    squared error     l = (x - t)^2                               dl/dx = 2 (x - t)        dl/dt = -dl/dx
    half, eq. 3       L = 1/(2n) sum of (x - t)^2                 dL/dx = (x - t) / n

The report's eq. 3 divides by twice the number of examples, torch's `reduction="mean"` by the number of elements: two
conventions, two names. Shapes: input x and target t alike, after broadcasting. Saved: both.
"""

import warnings
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_bp.autograd.function import overridden
from torch_bp.kernels import formula
from torch_bp.ops.elementwise_loss import apply, elementwise_loss
from torch_bp.ops.reduction import MEAN, NONE, SUM, reduction_code

_Optional = torch.Tensor | None


@formula
def squared_error_backward(dy, x, t, *, scale, factor):
    """dl/dx of (x - t)^2; eq. 3 with its own `factor`. dl/dt is the negative."""
    slope = 2 * (scale * factor) * (x - t)
    return slope if dy is None else slope * dy


def _squared_error_slopes(dy: _Optional, x: Any, t: Any, p: None, wanted: tuple[bool, bool], **numbers: Any) -> Any:
    slope = squared_error_backward(dy, x, t, **numbers)
    return slope if wanted[0] else None, -slope if wanted[1] else None


SquaredError = elementwise_loss(
    "squared_error",
    lambda x, t, _, __, reduction: torch._C._nn.mse_loss(x, t, reduction),
    _squared_error_slopes,
    ("L = mean of (x - t)^2, eq. 3", "dx = 2 (x - t) dL / n, eq. 3"),
)


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
    if has_torch_function_variadic(input, target, weight) and overridden():
        return handle_torch_function(
            mse_loss, (input, target, weight), input, target, size_average, reduce, reduction, weight
        )
    _same_size_expected(input, target)
    code = reduction_code(size_average, reduce, reduction)
    x, t = (input, target) if input.shape == target.shape else torch.broadcast_tensors(input, target)
    if weight is None:
        return apply(SquaredError, x, t, None, None, code, 1.0)
    if weight.size() != input.size():
        raise ValueError("Weights and input must have the same size.")
    # torch composes this case; on the CPU autocast leaves what it is composed of alone
    losses = apply(SquaredError, x, t, None, None, NONE, 1.0, casts=input.is_cuda) * weight
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
    if has_torch_function_variadic(input, target) and overridden():
        return handle_torch_function(half_mse_loss, (input, target), input, target)
    if target.size() != input.size():
        raise ValueError(
            f"half_mse_loss: target must be of the input's shape (n, *), got target {tuple(target.size())} and input "
            f"{tuple(input.size())}; use target.view_as(input) if they hold the same elements."
        )
    n = input.size(0) if input.dim() else 1
    return apply(SquaredError, input, target, None, None, SUM, 0.5 / n if n else float("nan"))
