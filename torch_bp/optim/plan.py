"""What the list kernels need of an optimizer's groups, collected once and kept from step to step."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels import Table, engine, native, plain
from torch_bp.kernels.program import PLAIN_NUMBERS
from torch_bp.optim import shards
from torch_bp.optim.copies import copies_of
from torch_bp.optim.rule import UNKNOWN, explain

Layout = Sequence[str | None]
Gradients = Sequence[Tensor | None]
_NOTHING = type(None)
_COUNTS = (torch.float32, torch.float64)
FLAGS = ("capturable", "differentiable", "fused")


def initial_state(optimizer: Any, p: Tensor, group: Mapping[str, Any], layout: Layout) -> tuple[dict, list[str]]:
    """Return the state of a parameter, completed where something is missing, and the names that were missing."""
    if not optimizer.counts_steps and not any(layout):
        return {}, []
    state = optimizer.state[p]
    counts = counted(optimizer)
    missing = [n for n in (*counts, *layout) if n is not None and state.get(n) is None]
    for name in missing:
        value = 0 if name == "step" else optimizer.initial(name, group)
        if name in counts:
            state[name] = _count(value, p, group)
        else:
            value = complex(value, value) if p.is_complex() else value
            state[name] = torch.full_like(p, value, memory_format=torch.preserve_format)
    return state, missing


def counted(optimizer: Any) -> tuple[str, ...]:
    """Names of the state that is one number for a whole parameter."""
    return ("step", *getattr(optimizer, "numbers", ())) if optimizer.counts_steps else ()


def _count(value: float, p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A number that is state, where torch keeps it: on the host, but for what must not be read there."""
    on_device = group.get("capturable") or group.get("fused")
    double = torch.get_default_dtype() is torch.float64 and not group.get("fused")
    dtype = torch.float64 if double else torch.float32
    return torch.full((), float(value), dtype=dtype, device=p.device if on_device else "cpu")


def in_turn(optimizer: Any, params: Sequence[Tensor], positions: Iterable[int]) -> set[int]:
    """Positions whose updates follow on each other: of a parameter that is listed again, of counts that are shared."""
    found: dict[Any, list[int]] = {}
    for i in positions:
        found.setdefault(id(params[i]), []).append(i)
        state = optimizer.state.get(params[i], {})
        for count in map(state.get, counted(optimizer)):
            if isinstance(count, Tensor):
                place = count.data_ptr() if type(count) in plain.PLAIN_TYPES else id(count)
                found.setdefault(("count", place), []).append(i)
    return {i for sharing in found.values() if len(sharing) > 1 for i in sharing}


def forget(created: Iterable[tuple[dict[str, Any], list[str]]]) -> None:
    """Take back what `initial_state` made for an update that did not happen."""
    for state, names in created:
        for name in names:
            state.pop(name, None)


def on_device(group: Mapping[str, Any]) -> bool:
    """True where the step count is a tensor that the host must not read, or the update itself is differentiated."""
    if group.get("differentiable") or group.get("capturable"):
        return True
    return bool(group.get("fused")) and any(p.device.type != "cpu" for p in group["params"])


def eligible(p: Tensor, grad: Tensor | None, state: Mapping[str, Any], layout: Layout) -> bool:
    """True if a list kernel may update `p` from `grad`, as far as the two of them tell, and where its state lies."""
    if grad is not None and shards.is_distributed(p):
        if not shards.alike(p, [grad, *(t for name, t in state.items() if name in layout and t is not None)]):
            return False
        p, grad = shards.local(p), shards.local(grad)
    return (
        grad is not None
        and plain.PLAIN_TYPES.issuperset((type(p), type(grad)))
        and p.layout is grad.layout is torch.strided
        and p.dtype is grad.dtype
        and p.device == grad.device
        and p.shape == grad.shape
        and p.stride() == grad.stride()
        and not (p.is_neg() or grad.is_neg())
        and plain.dense(p)
        and engine.serving(p) is not None
    )


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


class Share:
    """What a plan knows of one group: its buckets, and which parameters are no matter of a kernel."""

    def __init__(self, optimizer: Any, group: dict[str, Any], gradients: Gradients) -> None:
        self.params = list(group["params"])
        self.present = [i for i, g in enumerate(gradients) if g is not None]
        self.whole = len(self.present) == len(self.params)
        self.layout = tuple(optimizer.state_layout(group))
        self.flags = tuple(map(group.get, FLAGS))
        for i in self.present:
            if gradients[i].layout is not torch.strided:  # type: ignore[union-attr]
                optimizer.sparse(group)  # may refuse, before anything is changed
        listed = not on_device(group)
        self.in_turn = in_turn(optimizer, self.params, self.present)
        self.others = [i for i in self.present if not (listed and self._eligible(optimizer, i, gradients))]
        buckets: dict[Any, Bucket] = {}
        try:
            for i in sorted({*self.present}.difference(self.others)):
                p = self.params[i]
                state, created = initial_state(optimizer, p, group, self.layout)
                counts = {name: state[name].item() for name in counted(optimizer)}
                distributed = shards.is_distributed(p)
                key = (p.device, p.dtype, *counts.values(), bool(created), distributed)
                bucket = buckets.setdefault(key, Bucket(self.layout, counts, bool(created), distributed))
                bucket.add(i, p, state)
                bucket.created.append((state, created))
        except BaseException:
            forget(chain.from_iterable(bucket.created for bucket in buckets.values()))
            raise
        self.buckets = list(buckets.values())
        for bucket in self.buckets:
            bucket.collect()

    def _eligible(self, optimizer: Any, i: int, gradients: Gradients) -> bool:
        p = self.params[i]
        return i not in self.in_turn and eligible(p, gradients[i], optimizer.state.get(p, {}), self.layout)

    def fits(self, optimizer: Any, group: dict[str, Any], gradients: Gradients) -> bool:
        """True if this share, made at an earlier step, still tells the truth."""
        params = group["params"]
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        if self.whole:
            if _NOTHING in map(type, gradients):
                return False
        elif self.present != [i for i, g in enumerate(gradients) if g is not None]:
            return False
        flags = tuple(map(group.get, FLAGS))
        if tuple(optimizer.state_layout(group)) != self.layout or flags != self.flags:
            return False
        if self.others and not on_device(group) and any(self._eligible(optimizer, i, gradients) for i in self.others):
            return False
        return all(map(Bucket.holds, self.buckets))

    def run(self, optimizer: Any, group: Mapping[str, Any], gradients: Gradients) -> Gradients:
        """Update every bucket that a kernel may serve; return the gradients that are still to be applied."""
        left = self.others
        try:
            for bucket in self.buckets:
                if not bucket.update(optimizer, group, gradients):
                    left = left + bucket.positions
        finally:  # what an update that did not happen was given
            forget(chain.from_iterable(bucket.created for bucket in self.buckets))
        if not left:
            return ()
        return [g if i in {*left} else None for i, g in enumerate(gradients)]


class Plan:
    """What the list kernels need of an optimizer, kept from step to step, group by group."""

    def __init__(self) -> None:
        self.shares: dict[int, Share] = {}
        self.again: dict[int, Any] = {}  # what repeats a step (`torch_bp.optim.again`)
        self.lock = threading.Lock()  # the tables hold one thread's gradients at a time
        self._container: Any = None
        self._states: list[dict[str, Any]] = []

    def look(self, optimizer: Any) -> None:
        """Drop what was collected if the states are not the same objects."""
        states = optimizer.state
        if (
            states is not self._container
            or len(states) != len(self._states)
            or not all(map(operator.is_, states.values(), self._states))
        ):
            self.forget()

    def forget(self) -> None:
        """Look at everything anew at the next step."""
        self.shares, self.again = {}, {}

    def update(self, optimizer: Any, index: int, group: dict[str, Any], gradients: Gradients) -> Gradients:
        """Update a group by list kernels; return the gradients that are still to be applied."""
        share = self.shares.pop(index, None)
        if share is None or not share.fits(optimizer, group, gradients):
            share = Share(optimizer, group, gradients)
            self._container = None  # until the step has gone well
        left = share.run(optimizer, group, gradients)
        if sum(g is not None for g in left) == len(share.others):  # else some tensor is not what it was: look anew
            self.shares[index] = share
        return left

    def remember(self, optimizer: Any) -> None:
        """Note the states that belong to what was collected."""
        if self._container is None:
            self._container, self._states = optimizer.state, list(optimizer.state.values())
