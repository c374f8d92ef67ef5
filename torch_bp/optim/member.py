"""One parameter of an optimizer, updated by itself, when its gradient is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torch_bp.optim.plan import Plan
from torch_bp.optim.step import lists_may_serve, repeated, update_group


class Member:
    """A parameter in its group, updated by itself through the optimizer's rule and state."""

    def __init__(self, optimizer: Any, p: Tensor, name: str) -> None:
        self.optimizer, self.p, self.name = optimizer, p, name
        self.plan = Plan()
        self.state: Mapping[str, Any] | None = None
        self.number = self.position = 0

    def update(self) -> None:
        """Update from `p.grad`, as its group says now: rates change, and loading puts other dicts in its place."""
        group = {**self._found(), "params": [self.p]}
        if self.state is not self.optimizer.state.get(self.p):
            self.plan.forget()
        plan = self.plan if lists_may_serve() else None
        if plan is None or not repeated(self.optimizer, plan, 0, group):
            update_group(self.optimizer, plan, 0, group)
        self.state = self.optimizer.state.get(self.p)

    def _found(self) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        if self.number < len(groups):
            params = groups[self.number]["params"]
            if self.position < len(params) and params[self.position] is self.p:
                return groups[self.number]
        for self.number, group in enumerate(groups):
            for self.position, p in enumerate(group["params"]):
                if p is self.p:
                    return group
        raise RuntimeError(
            f"apply_in_backward: {self.name} must stay in the optimizer, got a gradient and no group that has "
            "it; remove() the handle first."
        )
