"""As `torch.nn.functional`: the functions that torch_bp writes by hand, and torch's own for every other name."""

from collections.abc import Callable

import torch.nn.functional

from torch_bp import ops
from torch_bp._mirror import mirror
from torch_bp.autograd.function import overridden
from torch_bp.ops import (
    batch_norm,
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    dropout,
    half_mse_loss,
    layer_norm,
    linear,
    log_softmax,
    mse_loss,
    nll_loss,
    sigmoid,
    softmax,
    tanh,
)
from torch_bp.ops.pointwise import hardtanh_from_output, leaky_relu_from_output


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.relu`; eq. 14. `inplace=True` writes the result to `input`, which saves no memory here.

    Example:
        >>> relu(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    result = ops.relu(input)
    return input.copy_(result) if inplace else result


def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.leaky_relu`; eq. 15. Being the maximum of z and slope * z holds for slopes up to 1.

    Example:
        >>> leaky_relu(torch.tensor([-1.0, 2.0]), negative_slope=0.5)
        tensor([-0.5000,  2.0000])
    """
    if inplace and negative_slope >= 0:
        return input.copy_(leaky_relu_from_output(input, negative_slope))
    result = ops.leaky_relu(input, negative_slope)
    return input.copy_(result) if inplace else result


def hardtanh(input: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.hardtanh`: the nearest number from `min_val` to `max_val`.

    Raises:
        ValueError: `min_val` is greater than `max_val`.

    Example:
        >>> hardtanh(torch.tensor([-2.0, 0.5]))
        tensor([-1.0000,  0.5000])
    """
    if inplace:
        return input.copy_(hardtanh_from_output(input, min_val, max_val))
    return ops.hardtanh(input, min_val, max_val)


def _may_write(
    function: Callable[..., torch.Tensor], inplace: bool, input: torch.Tensor, *values: float
) -> torch.Tensor:
    """Apply an activation whose derivative needs its input, of which a copy is kept where that is written over."""
    if not inplace:
        return function(input, *values)
    # A trace may be run with gradients afterwards; on a tape there is no graph that says so.
    copied = torch.is_grad_enabled() or torch.jit.is_tracing() or not overridden()
    return input.copy_(function(input.clone() if copied else input, *values))


def elu(input: torch.Tensor, alpha: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.elu`: z, or `alpha` (e^z - 1) for z <= 0. `inplace=True` saves no memory here.

    Example:
        >>> elu(torch.tensor([-1e3, 2.0]), alpha=0.5)
        tensor([-0.5000,  2.0000])
    """
    return _may_write(ops.elu, inplace, input, alpha)


def silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.silu`: z s(z), with the sigmoid s. `inplace=True` saves no memory here.

    Example:
        >>> silu(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7311])
    """
    return _may_write(ops.silu, inplace, input)


def softplus(input: torch.Tensor, beta: float = 1, threshold: float = 20) -> torch.Tensor:
    """As `torch.nn.functional.softplus`: log(1 + e^(beta z)) / beta, and z where beta z passes the threshold.

    Example:
        >>> softplus(torch.tensor([0.0, 30.0]))
        tensor([ 0.6931, 30.0000])
    """
    return ops.softplus(input, beta, threshold)


def gelu(input: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """As `torch.nn.functional.gelu`: z P(z), with the normal distribution P, or its approximation by "tanh".

    Raises:
        RuntimeError: `approximate` is neither "none" nor "tanh".

    Example:
        >>> gelu(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.8413])
    """
    if approximate not in ("none", "tanh"):  # torch's error about it
        return torch.nn.functional.gelu(input, approximate=approximate)
    return ops.gelu_tanh(input) if approximate == "tanh" else ops.gelu(input)


__getattr__, __dir__, __all__ = mirror(globals(), torch.nn.functional)
