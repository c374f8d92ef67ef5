"""Gradients, weights and updates of a step, measured around `optimizer.step()`.

An optimizer of torch_bp measures them in the pass over memory that its update makes anyway. Around any other one the
gradients and weights are summed before the step, and the weights copied, to be compared with afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.diagnostics.layer import Layer
from torch_bp.diagnostics.quantities import plain, predicted_decrease
from torch_bp.kernels import Table
from torch_bp.kernels.extras import Extras
from torch_bp.kernels.norm import sum_of_squares, total_of_squares

COLUMNS = ("grad", "weight", "update", "product")


def measures_itself(optimizer: torch.optim.Optimizer) -> bool:
    """True for optimizers of torch_bp, which find what is to be measured in `_extras`."""
    return hasattr(getattr(optimizer, "rule", None), "formula") and "_applied_in_backward" not in vars(optimizer)


class ParameterSums:
    """Sums of squares of each parameter's gradient, weight and update, and gradient times update.

    Args:
        layers: whose parameters are measured.
        projected: measure gradient times update too; else that column is NaN.
    """

    def __init__(self, layers: Sequence[Layer], projected: bool) -> None:
        self.params = list({id(p): p for layer in layers for p in layer.params}.values())
        self.rows = {id(p): row for row, p in enumerate(self.params)}
        self._names: dict[int, str] = {}
        for layer in layers:
            for p, name in zip(layer.params, layer.param_names):
                self._names.setdefault(id(p), name)
        self._projected = projected
        self._extras: Extras | None = None
        self._own = False
        self._before: tuple[list[Tensor], Tensor | None, Tensor, list[Tensor] | None, list[Tensor]] | None = None
        self._tables: dict[str, Table] = {}
        self._there: list[tuple[Tensor, Tensor]] = []
        self._carried_tables: dict[Any, Table] = {}

    def before(
        self, optimizer: torch.optim.Optimizer, computes: bool = False, alone: bool = True, beside: bool = False
    ) -> None:
        """The step is about to run.

        Args:
            optimizer: that steps.
            computes: it computes the gradients, as it calls a closure.
            alone: no other one updates parameters, so that those that it does not have are measured, too.
            beside: measure around the step, even of an optimizer that could do so in it.
        """
        self.abandon(optimizer)  # what a step that has raised has left
        inside = vars(optimizer).get("_extras")
        if measures_itself(optimizer) and not beside:
            if inside is None:
                self._extras = optimizer._extras = Extras(measured=True, projected=self._projected)  # type: ignore[attr-defined]
                self._own = True
                return
            if inside.measured and inside.projected >= self._projected:
                self._extras = inside
                return
        params = self._of(optimizer)
        if alone:  # a gradient from before a layer was frozen is nobody's any more, unless the optimizer uses it
            its_own = set(map(id, params))
            params = [p for p in self.params if p.requires_grad or id(p) in its_own]
        params = [p for p in params if (p.requires_grad if computes else p.grad is not None)]
        if params:
            weights = [plain(p) for p in params]
            weight = self._squares("weight", weights)
            gradients: Any = None if computes else [p.grad for p in params]
            grad = None if computes else self._squares("grad", list(map(plain, gradients)))
            kept = gradients if self._projected else None
            self._before = params, grad, weight, kept, [w.clone() for w in weights]

    def after(self, optimizer: torch.optim.Optimizer) -> tuple[list[int], Sequence[Tensor]]:
        """The step has run: rows of `params` that were updated, and `COLUMNS`, (n) in float64, as far as measured."""
        if self._extras is not None:
            extras, self._extras = self._extras, None
            if self._own:
                del optimizer._extras  # type: ignore[attr-defined]
            params = [p for p in extras.params if id(p) in self.rows]
            return [self.rows[id(p)] for p in params], extras.totals(params)
        if self._before is None:
            return [], ()
        (params, grad, weight, gradients, weights), self._before = self._before, None
        if grad is None:
            there = [k for k, p in enumerate(params) if p.grad is not None]
            if not there:
                return [], ()
            params, weights, weight = [params[k] for k in there], [weights[k] for k in there], weight[there]
            gradients = [p.grad for p in params]  # type: ignore[misc]
            grad = self._squares("grad", list(map(plain, gradients)))  # type: ignore[arg-type]
            gradients = gradients if self._projected else None
        updates = [plain(p) - w for p, w in zip(params, weights)]
        update = self._squares("update", updates)
        found = [grad, weight, update]
        if gradients:
            found.append(torch.stack([-predicted_decrease([g], [u]) for g, u in zip(gradients, updates)]))
        return [self.rows[id(p)] for p in params], found

    def without_gradient(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the parameters that are to be trained and have no gradient, and of those that are frozen.

        None are unused where nobody has a gradient: it has been cleared then, as by an update in the backward.
        """
        frozen = tuple(self._names[id(p)] for p in self.params if not p.requires_grad)
        unused = tuple(self._names[id(p)] for p in self.params if p.requires_grad and p.grad is None)
        return (() if len(unused) + len(frozen) == len(self.params) else unused), frozen

    def carried(self, optimizer: torch.optim.Optimizer | None) -> Tensor | None:
        """The norm of the gradients that are there, and that the optimizer would use; None where there are none."""
        params = self.params if optimizer is None else self._of(optimizer)
        self._there = [(p, p.grad) for p in params if p.grad is not None]
        gradients = [gradient for _, gradient in self._there]
        return total_of_squares(gradients, self._carried_tables).sqrt() if gradients else None

    def added_to(self) -> bool:
        """Whether what was `carried` is still there, with more: else it was cleared, after the backward of another."""
        there, self._there = self._there, []
        return all(p.grad is gradient for p, gradient in there)

    def gradients(self) -> tuple[list[int], Sequence[Tensor]]:
        """As `after`, of parameters that nobody is seen to update."""
        params = [p for p in self.params if p.grad is not None and p.requires_grad]
        if not params:
            return [], ()
        gradients: list[Any] = [p.grad for p in params]
        grad = self._squares("grad", list(map(plain, gradients)))
        weight = self._squares("weight", list(map(plain, params)))
        return [self.rows[id(p)] for p in params], [grad, weight]

    def abandon(self, optimizer: Any) -> None:
        """The step has failed, or nobody waits for it any more."""
        if self._own:
            vars(optimizer).pop("_extras", None)
        self._extras, self._before, self._own = None, None, False

    def _of(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in self.rows]

    def _squares(self, what: str, tensors: list[Tensor]) -> Tensor:
        first = tensors[0]
        if all(t.dtype is first.dtype and t.device == first.device for t in tensors):
            return sum_of_squares.foreach_(tensors, table=self._tables.setdefault(what, Table()))
        return torch.stack([t.double().square().sum().to(first.device) for t in tensors])
