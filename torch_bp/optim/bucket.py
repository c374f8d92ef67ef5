"""Parameters that one call of a list kernel updates: their tensors, and the numbers that they all have alike."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels import Table, native
from torch_bp.kernels.program import PLAIN_NUMBERS
from torch_bp.optim import shards
from torch_bp.optim.copies import copies_of
from torch_bp.optim.rule import UNKNOWN, explain
from torch_bp.optim.state import Layout

Gradients = Sequence[Tensor | None]
_COUNTS = (torch.float32, torch.float64)


class Counter:
    """One number of each of the parameters that are updated together, as their step counts: all the same."""

    def __init__(self, value: float) -> None:
        self.value = value
        self._table = Table()
        self._write: Callable[..., None] | None = None  # writes the counts in memory, where `holds` has found them
        self._double = False

    def holds(self, counts: tuple[Tensor, ...]) -> bool:
        """True if every one is `value` still."""
        compiled, first = native.functions(), counts[0]
        self._write = None
        if compiled and first.is_cpu and first.dtype in _COUNTS and self._table.refresh([counts], [True], 1):
            self._write, self._double = compiled.write, first.dtype is torch.float64
            return compiled.holds(self._table.addresses[0], self.value, self._double)
        return all(count.item() == self.value for count in counts)

    @property
    def fast(self) -> bool:
        """True if `unchanged` can answer."""
        return self._write is not None and self._table.seen is not None

    def unchanged(self) -> bool:
        """As `holds`, for the tensors that it was last asked about."""
        table, compiled = self._table, native.functions()
        seen: Any = table.seen
        verdict = compiled.check(  # type: ignore[union-attr]
            seen.handles, seen.handles, seen.kept, seen.kinds, seen.forms, seen.written, table.addresses, table.answer
        )
        return verdict == native.SAME and compiled.holds(table.addresses[0], self.value, self._double)  # type: ignore[union-attr]

    def set(self, counts: tuple[Tensor, ...], value: float) -> None:
        """Make all of them `value`."""
        self.value = value
        if self._write is None:
            torch._foreach_zero_(counts)
            torch._foreach_add_(counts, value)
        else:
            self._write(self._table.addresses[0], value, self._double)
            torch._C._increment_version(counts)


class Bucket:
    """Parameters of a group that one call updates: one device, one dtype, one step count; all DTensors, or none."""

    def __init__(self, layout: Layout, counts: Mapping[str, float], fresh: bool, distributed: bool) -> None:
        self.layout, self.fresh, self.distributed = layout, fresh, distributed
        self.created: list[tuple[dict[str, Any], list[str]]] = []
        self.positions: list[int] = []
        self.params: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.table = Table()
        self.static: dict[str, Any] = {}  # the choices of the rule that ran last
        self.plain = False  # whether all else that it was given was numbers
        self.counters = {name: Counter(value) for name, value in counts.items()}

    def add(self, position: int, param: Tensor, state: dict[str, Any]) -> None:
        self.positions.append(position)
        self.params.append(param)
        self.states.append(state)

    def collect(self) -> None:
        """Look up the state of the parameters."""
        names = [*(n for n in self.layout if n is not None), *self.counters]
        self.state = {name: tuple(state[name] for state in self.states) for name in names}

    def holds(self) -> bool:
        """True if the state is what was collected, the step counts are those known, and nothing is to be created."""
        if self.fresh:
            return False
        try:
            for name, tensors in self.state.items():
                if not all(map(operator.is_, map(operator.itemgetter(name), self.states), tensors)):
                    return False
        except KeyError:  # deleted
            return False
        return all(counter.holds(self.state[name]) for name, counter in self.counters.items())

    def catch_up(self) -> None:
        """Take up what the counts are by now, after steps that somebody else has done; `holds` sees if all agree."""
        for name, counter in self.counters.items():
            counter.value = self.state[name][0].item()

    def update(self, optimizer: Any, group: Mapping[str, Any], gradients: Gradients) -> bool:
        """Run the list kernel; False if it may not serve, and then nothing is changed."""
        grads = gradients if len(gradients) == len(self.positions) else [gradients[i] for i in self.positions]
        counts = self.advanced(optimizer, group)
        rows = [None if name is None else self.state[name] for name in self.layout]
        lists: Sequence[Any] = (self.params, grads, *rows)
        rule, extras = optimizer.rule.formula, optimizer.__dict__.get("_extras")
        if self.distributed:
            # sums over this rank's parts alone would be no norms
            if extras is not None or not all(shards.alike(p, [g]) for p, g in zip(self.params, grads)):
                return False
            lists = [None if row is None else shards.locals_of(row) for row in lists]
        scalars = UNKNOWN
        try:
            given = scalars = optimizer.scalars(group, counts.get("step", 0), self.fresh, **but_step(counts))
            if extras is not None:
                rule, given = extras.extend(rule, given, self.params[0].device)
            copies = None if self.distributed else copies_of(optimizer)
            if copies is None:
                self.table.copies = None
            else:
                copies.tell(self.table, self.params)
            totals = rule.launch(lists, self.table, given)
        except Exception as error:
            explain(optimizer, scalars, error)
            raise
        if totals is None:
            return False
        self.static = {name: given.get(name) for name in rule.static}
        self.plain = PLAIN_NUMBERS.issuperset(map(type, given.values()))
        if self.table.copies is not None:
            copies.written(self.params)  # type: ignore[union-attr]
        if self.distributed:  # each DTensor counts its versions apart from its part
            for row in (self.params, *rows):
                torch._C._increment_version(row or ())
        if extras is not None:
            extras.ran(self.params, totals)
        for name, value in counts.items():
            self.counters[name].set(self.state[name], value)
        self.created = []
        return True

    def advanced(self, optimizer: Any, group: Mapping[str, Any]) -> dict[str, float]:
        """What the counts are after one more update."""
        if not self.counters:
            return {}
        step = self.counters["step"].value + 1
        after = {"step": step}
        for name in self.counters:
            if name != "step":  # by a tensor, which rounds as its dtype does
                after[name] = optimizer.advance(group, step, name, self.state[name][0]).item()
        return after


def but_step(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of an optimizer that are not its step count."""
    return {name: value for name, value in counts.items() if name != "step"} if len(counts) > 1 else {}
