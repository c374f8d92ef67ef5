"""What one step of an optimizer does besides its update, in the same pass over memory where a list kernel may serve.

`torch_bp.optim` looks for an `Extras` in the optimizer, under `_extras`, while the step lasts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels.extension import SCALE, extended
from torch_bp.kernels.formula import Formula
from torch_bp.kernels.norm import squares

Totals = tuple[Tensor, ...]


class Extras:
    """What one step of an optimizer does besides: `step` finds it in the optimizer while the step lasts."""

    def __init__(
        self,
        scale: float | Tensor | None = None,
        cleared: bool = False,
        measured: bool = False,
        projected: bool = False,
    ) -> None:
        self.scale = scale
        self.cleared, self.measured, self.projected = cleared, measured or projected, projected
        self.params: list[Tensor] = []
        self.clean: set[int] = set()  # parameters whose gradient a kernel has cleared
        self._totals: list[Totals] = []  # of stretches of `params`

    def extend(self, rule: Formula, keywords: Mapping[str, Any], device: torch.device) -> tuple[Formula, Any]:
        """The rule of a list kernel and its keywords, with what there is to do."""
        scaled = self.scale is not None
        rule = extended(rule, scaled=scaled, cleared=self.cleared, measured=self.measured, projected=self.projected)
        return rule, {**keywords, SCALE: self._scale_on(device)} if scaled else keywords

    def ran(self, params: Sequence[Tensor], totals: Totals) -> None:
        """Note what a list kernel has done."""
        self.params += params
        if self.cleared:
            self.clean.update(map(id, params))
        if self.measured:
            self._totals.append(totals[-3 - self.projected :])

    def prepare(self, p: Tensor, grad: Tensor) -> tuple[Tensor, Any]:
        """By operations of their own, before one parameter is updated: the scaled gradient, and what was measured."""
        before = None
        if self.measured:
            before = squares(grad), squares(p), p.detach().clone(), grad
        if self.scale is not None:  # a tensor () takes the dtype of a wider one
            grad = (grad * self._scale_on(grad.device)).to(grad.dtype)
        return grad, before

    def finish(self, p: Tensor, before: Any) -> None:
        """Note what has become of one parameter."""
        self.params.append(p)
        if before is not None:
            of_grad, of_weight, weight, grad = before
            wide = torch.promote_types(p.dtype, torch.float32)  # a difference of two halves may have more digits
            change = p.detach().to(wide) - weight.to(wide)
            found = [of_grad, of_weight, squares(change)]
            if self.projected:
                found.append(product(grad, change))
            self._totals.append(tuple(t.reshape(1) for t in found))

    def _scale_on(self, device: torch.device) -> float | Tensor:
        return self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale  # type: ignore[return-value]

    def totals(self, order: Sequence[Tensor]) -> Totals:
        """Of each parameter the sums of squares of gradient, weight and update; if projected, gradient times update."""
        if not self._totals:
            return (torch.zeros(0, dtype=torch.float64),) * (3 + self.projected)
        device = self._totals[0][0].device
        found = [
            torch.cat([t.to(device) for t in of_one]) if len(of_one) > 1 else of_one[0] for of_one in zip(*self._totals)
        ]
        if len(order) == len(self.params) and all(a is b for a, b in zip(order, self.params)):
            return tuple(found)
        place = {id(p): number for number, p in enumerate(self.params)}
        index = torch.tensor([place[id(p)] for p in order], dtype=torch.int64, device=device)
        return tuple(of_one[index] for of_one in found)

    def norms(self, order: Sequence[Tensor]) -> Totals:
        """The three norms of each parameter, in this order."""
        return tuple(of_one.sqrt() for of_one in self.totals(order)[:3])


def product(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of any two tensors of one shape; conjugated where they are complex."""
    a, b = (t.detach().to_dense() if t.layout is not torch.strided else t.detach() for t in (a, b))
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a, b))
    found = (a.double() * b.double()).sum()
    return found.full_tensor() if hasattr(found, "full_tensor") else found
