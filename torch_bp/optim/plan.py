"""What the list kernel needs of a parameter group, collected once and kept from step to step."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels import Table, formula

Layout = Sequence[str | None]
_version_of = Tensor._version.__get__  # type: ignore[attr-defined]


def _versions(tensors: Iterable[Tensor]) -> int:
    """How often these were written in all; inference tensors do not tell."""
    try:
        return sum(map(_version_of, tensors))
    except RuntimeError:
        return -1


@formula(updates=("step",))
def count(step):
    """One more update of a parameter."""
    return step + 1


def initial_state(optimizer: Any, p: Tensor, group: Mapping[str, Any], layout: Layout) -> tuple[dict, list[str]]:
    """Return the state of a parameter, completed where something is missing, and the names that were missing."""
    if not optimizer.counts_steps and not any(layout):
        return {}, []
    state = optimizer.state[p]
    missing = [n for n in layout if n is not None and state.get(n) is None]
    if optimizer.counts_steps and "step" not in state:
        on_device = group.get("capturable") or group.get("fused")
        double = torch.get_default_dtype() is torch.float64 and not group.get("fused")
        dtype = torch.float64 if double else torch.float32
        state["step"] = torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")
        missing = ["step", *missing]
    for name in missing:
        if name != "step":
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return state, missing


def forget(created: Iterable[tuple[dict[str, Any], list[str]]]) -> None:
    """Take back what `initial_state` made for an update that did not happen."""
    for state, names in created:
        for name in names:
            state.pop(name, None)


class Bucket:
    """Parameters of a group that one call updates: one device, one dtype, one step count."""

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        self.created: list[tuple[dict[str, Any], list[str]]] = []
        self.positions: list[int] = []
        self.params: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.table, self.step_table = Table(), Table()
        self.lists: dict[str, list[Tensor]] = {}
        self.step, self.versions = 0.0, 0

    def add(self, position: int, param: Tensor, state: dict[str, Any]) -> None:
        self.positions.append(position)
        self.params.append(param)
        self.states.append(state)

    def collect(self, names: Iterable[str]) -> None:
        """Gather the state by name, and read the step count that all parameters here share."""
        self.lists = {name: [state[name] for state in self.states] for name in names}
        if "step" in self.lists:
            self.step = float(self.lists["step"][0].item())
            self.versions = _versions(self.lists["step"])

    def sameinitial_state(self) -> bool:
        """True if the state tensors are those collected, and nobody else has written the step counts."""
        for name, tensors in self.lists.items():
            if not all(map(operator.is_, map(operator.itemgetter(name), self.states), tensors)):
                return False
        return _versions(self.lists.get("step", ())) == self.versions

    def update(self, optimizer: Any, group: Mapping[str, Any], layout: Layout, gradients: Sequence[Any]) -> bool:
        """Run the list kernel; False if it may not serve, and then nothing is changed."""
        whole = len(gradients) == len(self.positions)
        grads = gradients if whole else [gradients[i] for i in self.positions]
        steps = self.lists.get("step")
        states = [None if name is None else self.lists[name] for name in layout]
        try:
            scalars = optimizer.scalars(group, self.step + 1 if steps else 0, self.fresh)
            if not optimizer.rule.formula.launch((self.params, grads, *states), self.table, scalars):
                return False
        except BaseException:
            forget(self.created)
            raise
        if steps:
            count.foreach_(steps, table=self.step_table)
            self.step += 1
            self.versions += len(steps)  # each was written once; were it not so, the next step would collect anew
        return True


class Plan:
    """What the list kernel needs of a group, kept from step to step."""

    def __init__(self, optimizer: Any, group: dict[str, Any], gradients: Sequence[Tensor | None]) -> None:
        self.params = list(group["params"])
        self.present = [i for i, g in enumerate(gradients) if g is not None]
        self.layout = list(optimizer.state_layout(group))
        names = [*(["step"] if optimizer.counts_steps else []), *(n for n in self.layout if n is not None)]
        buckets: dict[Any, Bucket] = {}
        for i in self.present:
            p = self.params[i]
            state, created = initial_state(optimizer, p, group, self.layout)
            step = state["step"].item() if optimizer.counts_steps else 0
            key = (p.device, p.dtype, step, bool(created))
            bucket = buckets.setdefault(key, Bucket(bool(created)))
            bucket.add(i, p, state)
            bucket.created.append((state, created))
        self.buckets = list(buckets.values())
        for bucket in self.buckets:
            bucket.collect(names)
        self.container, self.states = optimizer.state, list(optimizer.state.values())

    def fits(self, optimizer: Any, group: dict[str, Any], gradients: Sequence[Tensor | None]) -> bool:
        """True if this plan, made at an earlier step, still tells the truth."""
        params, states = group["params"], optimizer.state
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and states is self.container
            and len(states) == len(self.states)
            and all(map(operator.is_, states.values(), self.states))
            and not any(bucket.fresh for bucket in self.buckets)
            and self.present == [i for i, g in enumerate(gradients) if g is not None]
            and list(optimizer.state_layout(group)) == self.layout
            and all(bucket.sameinitial_state() for bucket in self.buckets)
        )

    def run(self, optimizer: Any, group: dict[str, Any], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Update every bucket that a kernel may serve; return the gradients that are still to be applied."""
        left: list[Tensor | None] = []
        for bucket in self.buckets:
            if not bucket.update(optimizer, group, self.layout, gradients):
                forget(bucket.created)
                left = left or [None] * len(gradients)
                for i in bucket.positions:
                    left[i] = gradients[i]
        return left
