"""The norm N of gradients, and the factor that clips them by it; sec. 9.5, item 2: min(1, max_norm / (N + 1e-6))."""

from __future__ import annotations

from typing import Any

from torch_bp.kernels.decorator import formula
from torch_bp.kernels.functions import total

ROOM = 1e-6  # beside the norm, as torch has it


@formula
def sum_of_squares(x):
    """The square of each tensor's 2-norm, in float64."""
    return total(x * x)


def ratio(max_norm: float, total_norm: Any) -> Any:
    """What gradients of this norm are multiplied with, where that is below 1: a number, or a tensor of one."""
    return max_norm / (total_norm + ROOM)
