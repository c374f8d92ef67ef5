"""A step like the one before: the same parameters, state and flags, of which nothing but numbers and gradients is new.

`Share` and `Bucket` can do it too, for every case there is. On few parameters most of a step is the Python between them
and the kernel; here the same questions are asked in one place, in the order of what they cost. Whatever is not as it
was is left to them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels import engine, native
from torch_bp.kernels.plain import PLAIN_TYPES
from torch_bp.kernels.program import PLAIN_NUMBERS
from torch_bp.optim.bucket import Bucket, but_step
from torch_bp.optim.copies import Copies, copies_of
from torch_bp.optim.plan import FLAGS, Share

_is = operator.is_
_get = operator.getitem
_grad_of = operator.attrgetter("grad")
_is_neg = Tensor.is_neg
_increment = torch._C._increment_version


class Again:
    """One group whose parameters are one bucket; `of` makes it."""

    def __init__(
        self, share: Share, bucket: Bucket, program: Any, static: Mapping[str, Any], copies: Copies | None
    ) -> None:
        self._share, self._bucket, self._program = share, bucket, program
        self._names, self._static = tuple(static), tuple(static.values())
        self._engine, self._copies = engine.forced(), copies
        self._generation = 0 if copies is None else copies.generation
        self._compiled: Any = native.functions()
        table = bucket.table
        self._handles = table.seen.handles.copy()  # type: ignore[union-attr]
        self._count = len(bucket.params)
        self._chunks = table.tensor, table.start, table.length
        rows = [bucket.params, *(bucket.state[name] for name in share.layout if name is not None)]
        self._single = [row[k] for row in rows for k in table.seen.single]  # type: ignore[union-attr]
        self._gradients: list[int] = []  # of which the handles are those of the second row
        entries = [(state, name, t) for name, row in bucket.state.items() for state, t in zip(bucket.states, row)]
        self._states, self._state_names = [state for state, _, _ in entries], [name for _, name, _ in entries]
        self._state_tensors = [tensor for *_, tensor in entries]
        self._counters = list(bucket.counters.values())

    @classmethod
    def of(cls, optimizer: Any, group: Mapping[str, Any], share: Share) -> Again | None:
        """Return what can repeat the step that `share` has just done, or None where that is not simple enough."""
        if share.others or not share.whole or len(share.buckets) != 1 or "_extras" in vars(optimizer):
            return None
        bucket, rule = share.buckets[0], optimizer.rule.formula
        program, seen = bucket.table.program, bucket.table.seen
        if not bucket.plain or bucket.fresh or bucket.distributed or bucket.table.inference or rule.outer:
            return None
        if seen is None or program is None or not program.numba or program.totals:
            return None
        # The gradients are the second row, the only one that may change.
        if seen.kept[1] or not all(counter.fast for counter in bucket.counters.values()):
            return None
        return cls(share, bucket, program, bucket.static, copies_of(optimizer))

    def step(self, optimizer: Any, group: Mapping[str, Any]) -> bool:
        """Update the group; False, and nothing is done, where anything is not as it was."""
        share, bucket, params = self._share, self._bucket, group["params"]
        if len(params) != self._count or not all(map(_is, params, bucket.params)):
            return False
        gradients = list(map(_grad_of, params))
        if tuple(map(group.get, FLAGS)) != share.flags or tuple(optimizer.state_layout(group)) != share.layout:
            return False
        if copies_of(optimizer) is not self._copies or (self._copies and self._copies.generation != self._generation):
            return False
        if engine.forced() != self._engine or any(map(_is_neg, self._single)):
            return False
        try:
            if not all(map(_is, map(_get, self._states, self._state_names), self._state_tensors)):
                return False
            if not self._takes(gradients):
                return False
        except (KeyError, TypeError):  # deleted; no gradient
            return False
        table, handles, compiled = bucket.table, self._handles, self._compiled
        seen: Any = table.seen
        verdict = compiled.check(
            handles, seen.handles, seen.kept, seen.kinds, seen.forms, seen.written, table.addresses, table.answer
        )
        if verdict == native.CHANGED:
            return False
        for counter in self._counters:
            if not counter.unchanged():
                return False
        try:
            counts = bucket.advanced(optimizer, group)
            scalars = optimizer.scalars(group, counts.get("step", 0), False, **but_step(counts))
            if not PLAIN_NUMBERS.issuperset(map(type, scalars.values())):
                return False
            if not all(map(_is, map(scalars.get, self._names), self._static)):
                return False
            values = self._program.expression.host(**scalars)
        except Exception:  # told of by those who do it at length
            return False
        _increment(table.written)
        if table.copies is None:
            self._program.list.run(table.elements, table.addresses, *self._chunks, *values)
        else:
            self._program.run_list(table, values)
            self._copies.written(params)  # type: ignore[union-attr]
        for name, value in counts.items():
            bucket.counters[name].set(bucket.state[name], value)
        return True

    def _takes(self, gradients: list[Any]) -> bool:
        """Point the second row at these gradients; False where a kernel cannot read them for another reason than form.

        Raises:
            TypeError: something else is among them.
        """
        seen = list(map(native.handle_of, gradients))
        if seen != self._gradients:  # as a rule they are the same tensors in a captured step, and others elsewhere
            self._handles[1] = self._gradients = seen
        return PLAIN_TYPES.issuperset(map(type, gradients)) and not any(map(_is_neg, gradients))
