"""Standardised numbers, which batch and layer normalisation share: x^ = (x - m) r with r = 1 / sqrt(v + eps).

m and v are the mean and the biased variance of x over some dimensions, so all three change with x. With <.> the mean
over those dimensions, of n numbers, a change dx makes

    dm = <dx>        dr = -r^2 <x^ dx>        dx^ = r (dx - <dx> - x^ <x^ dx>)

since <x^> = 0 and dv = 2 <(x - m) dx> = 2 <x^ dx> / r. As a matrix dx^/dx is symmetric, so that the last line takes an
error signal at x^ to the one at x as well. Error signals dm and dr at the statistics, which only derivatives of a
derivative have, add (dm - r^2 x^ dr) / n.

Shapes: x, x^ and d alike; m, r and their like have length 1 in the dimensions of the mean.
"""

import torch

from torch_bp.kernels.program import HALF


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32, all else as it is: torch's own kernels compute so too."""
    return tensor.float() if tensor.dtype in HALF else tensor


def narrow(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in this dtype; itself if it has it, since asking for it costs more than looking."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def statistics(x: torch.Tensor, over: tuple[int, ...], eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return m and r, those of half precision in float32, by operations that can be differentiated any number of times.

    For the two cases in which torch's fused kernels do not do: some round the statistics of half precision, and under
    `torch.func` the derivatives of their derivatives are wrong.
    """
    variance, mean = torch.var_mean(wide(x), over, correction=0, keepdim=True)
    return mean, (variance + eps).rsqrt()


def statistics_backward(
    d_mean: torch.Tensor | None, d_inverse: torch.Tensor | None, inverse: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """dm / n and r^2 dr / n, or None where no error signal comes from the statistics."""
    if d_mean is None and d_inverse is None:
        return None
    zero = torch.zeros_like(inverse)
    by_mean = zero if d_mean is None else d_mean / count
    return by_mean, zero if d_inverse is None else inverse.square() * d_inverse / count


def tangents(
    dx: torch.Tensor, standard: torch.Tensor, inverse: torch.Tensor, over: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a change dx makes: dx^, dm and dr."""
    d_mean = dx.mean(over, keepdim=True)
    change = dx - d_mean
    product_mean = (change * standard).mean(over, keepdim=True)
    return (change - standard * product_mean) * inverse, d_mean, -inverse.square() * product_mean


def affine(standard: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    """w x^ + b, of what there is."""
    y = standard if weight is None else standard * wide(weight)
    return y if bias is None else y + wide(bias)


def affine_tangent(
    change: torch.Tensor | None,
    standard: torch.Tensor,
    weight: torch.Tensor | None,
    dw: torch.Tensor | None,
    db: torch.Tensor | None,
) -> torch.Tensor:
    """w dx^ + x^ dw + db, of what there is; `change` is dx^."""
    dy = torch.zeros_like(standard) if change is None else affine(change, weight, None)
    if dw is not None:
        dy = dy + standard * wide(dw)
    return dy if db is None else dy + wide(db)
