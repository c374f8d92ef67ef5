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
from torch_bp.optim.copies import Copies, copies_of
from torch_bp.optim.plan import FLAGS, Bucket, Share, but_step

_is = operator.is_
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
        self._states = [(operator.itemgetter(name), tensors) for name, tensors in bucket.state.items()]

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
        if not PLAIN_TYPES.issuperset(map(type, gradients)) or any(map(_is_neg, gradients)):
            return False
        if tuple(map(group.get, FLAGS)) != share.flags or tuple(optimizer.state_layout(group)) != share.layout:
            return False
        if copies_of(optimizer) is not self._copies or (self._copies and self._copies.generation != self._generation):
            return False
        if engine.forced() != self._engine or any(map(_is_neg, self._single)):
            return False
        try:
            for state_of, tensors in self._states:
                if not all(map(_is, map(state_of, bucket.states), tensors)):
                    return False
        except KeyError:  # deleted
            return False
        table, handles, compiled = bucket.table, self._handles, self._compiled
        seen: Any = table.seen
        handles[1] = native.handles(gradients, self._count)
        verdict = compiled.check(
            handles, seen.handles, seen.kept, seen.kinds, seen.forms, seen.written, table.addresses, table.answer
        )
        if verdict == native.CHANGED or not all(counter.unchanged() for counter in bucket.counters.values()):
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
