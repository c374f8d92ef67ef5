"""The norm N of gradients, and the factor that clips them by it; sec. 9.5, item 2: min(1, max_norm / (N + 1e-6))."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels.decorator import formula
from torch_bp.kernels.functions import total
from torch_bp.kernels.table import Table

ROOM = 1e-6  # beside the norm, as torch has it


@formula
def sum_of_squares(x):
    """The square of each tensor's 2-norm, in float64."""
    return total(x * x)


def ratio(max_norm: float, total_norm: Any) -> Any:
    """What gradients of this norm are multiplied with, where that is below 1: a number, or a tensor of one."""
    return max_norm / (total_norm + ROOM)


def values_of(gradient: Tensor) -> Tensor:
    """The real numbers that a gradient is made of."""
    gradient = gradient.coalesce().values() if gradient.layout is torch.sparse_coo else gradient
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def squares(x: Tensor) -> Tensor:
    """The sum of squares of any tensor there is: sparse, complex, distributed."""
    x = values_of(x.detach()).double().square().sum()
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def total_of_squares(gradients: Sequence[Tensor], tables: dict[Any, Table]) -> Tensor:
    """The sum of squares of all gradients, a tensor () in float64: one call of a list kernel for those of one kind.

    Args:
        gradients: any, on any devices.
        tables: kept by the caller from one call to the next; at first empty.
    """
    kinds: dict[Any, list[Tensor]] = {}
    for gradient in map(values_of, gradients):
        kinds.setdefault((type(gradient), gradient.device, gradient.dtype), []).append(gradient)
    sums = []
    for key, alike in kinds.items():
        if key[0] in (Tensor, torch.nn.Parameter):
            sums.append(sum_of_squares.foreach_(alike, table=tables.setdefault(key, Table())).sum())
        else:
            sums += map(squares, alike)
    if not sums:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([s.to(sums[0].device) for s in sums]).sum()
