"""What follows the gradients: nothing that is not finite gets through, clipping, and the optimizer's own step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels.norm import ratio, sum_of_squares, values_of
from torch_bp.step.watched import Monitor

_place_of = Tensor.data_ptr


class Norm:
    """The norm of gradients that lie where they lie, all together, as one number on the host.

    It is not finite if any of them is not: one pass over the gradients answers both questions. A sum in float64 has
    room for the square of every number in float32.
    """

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        self._given = list(gradients)
        self._values = list(map(values_of, gradients))  # kept: kernels know only where they are
        self._places = list(map(_place_of, self._values))
        kinds: dict[Any, list[Tensor]] = {}
        for values in self._values:
            kinds.setdefault((values.dtype, values.device), []).append(values)
        self._parts = [_sum_of_squares(alike) for alike in kinds.values()]

    def __call__(self) -> float:
        if list(map(_place_of, self._values)) != self._places:  # `p.grad.data = ...`
            self.__init__(self._given)  # type: ignore[misc]
        return self.unmoved()

    def unmoved(self) -> float:
        """As a call, of gradients that are known to lie where they did."""
        return math.sqrt(sum(part() for part in self._parts))


def _sum_of_squares(gradients: list[Tensor]) -> Callable[[], float]:
    bound = sum_of_squares.formula.bound_total(gradients)
    if bound is not None:
        return bound

    def by_torch() -> float:
        norms = torch._foreach_norm(gradients, 2, torch.float64)  # type: ignore[call-overload]
        return float(torch.stack(norms).square().sum())

    return by_torch


class Update:
    """Clips and steps.

    Args:
        optimizer: any.
        max_norm, max_value: as `clip_grad_norm` and `clip_grad_value` of `TrainStep`.

    Attributes:
        monitor: told of what happens; None for none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float | None, max_value: float | None) -> None:
        self.optimizer, self.max_norm, self.max_value = optimizer, max_norm, max_value
        self.monitor: Monitor | None = None

    def __call__(self, gradients: list[Tensor], norm: float) -> None:
        """Update the parameters; `norm` is that of all gradients."""
        if self.max_value is not None:
            torch._foreach_clamp_max_(gradients, self.max_value)
            torch._foreach_clamp_min_(gradients, -self.max_value)
            if self.max_norm is not None:
                norm = Norm(gradients)()
        if self.max_norm is not None:
            factor = ratio(self.max_norm, norm)
            if factor < 1:
                torch._foreach_mul_(gradients, factor)
        if self.monitor is None:
            self.optimizer.step()
            return
        if self.max_norm is not None:
            self.monitor.clipped(norm, self.max_norm)
        self.monitor.updating()
        self.optimizer.step()
        self.monitor.updated()
