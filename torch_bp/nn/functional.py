"""As `torch.nn.functional`: the functions that torch_bp writes by hand, and torch's own for every other name."""

import torch.nn.functional

from torch_bp import ops
from torch_bp._mirror import mirror
from torch_bp.ops import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    half_mse_loss,
    linear,
    log_softmax,
    mse_loss,
    nll_loss,
    sigmoid,
    softmax,
    tanh,
)
from torch_bp.ops.pointwise import leaky_relu_from_output


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


__getattr__, __dir__, __all__ = mirror(globals(), torch.nn.functional)
