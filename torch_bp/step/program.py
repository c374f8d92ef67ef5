"""Capture on the CPU, second half: what a pass did (`torch_bp.step.recorder`), run again over memory that never moves.

Nothing else of Python runs then: no model, no module, no Function. Each operation writes to the same buffer every time
(`torch_bp.step.buffers`): no memory is asked for or given back, and large layers do not pay at every step for pages
that the system clears.

- *Views* are made once.
- *Values that are made of nothing* are computed once, unless something writes to them later.
- *Random numbers* come from torch's generator in the same order as in the pass itself.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_bp.kernels import products
from torch_bp.kernels.sequence import Chain, Record, record
from torch_bp.step.buffers import Arena
from torch_bp.step.recorder import EMPTY, Call, NotCapturableError, Place, Recorder, is_random, places_in, tensors_in

_aten = torch.ops.aten
# Torch's bindings of these parse their arguments several times faster than the operations by themselves.
_BINDINGS: dict[Any, Callable[..., Any]] = {
    **{getattr(_aten, name).out: getattr(torch, name) for name in ("addmm", "mm", "mul", "add", "sub", "div", "neg")},
    **{getattr(_aten, name).out: getattr(torch, name) for name in ("sigmoid", "tanh")},
    **{getattr(_aten, name).default: getattr(torch, name) for name in ("relu_", "sigmoid_", "tanh_")},
    _aten.sum.IntList_out: torch.sum,
    _aten.gather.out: torch.gather,
    _aten.where.self_out: torch.where,
    _aten.clamp.out: torch.clamp,
    _aten.relu.out: lambda input, out: torch.clamp_min(input, 0, out=out),  # which is what it is
}
_COPIES = {_aten._to_copy.default, _aten.clone.default}
# Take their result for working memory of the input's shape, and say so on standard error.
_OUTGROWING = {_aten.mse_loss.default, _aten.binary_cross_entropy.default, _aten.soft_margin_loss.default}
# Write to the memory of a result and to nothing else: batch normalisation, run twice, would move its statistics twice.
_WHOLE = {_aten.native_batch_norm.default, _aten.native_layer_norm.default, _aten.nll_loss_forward.default}


class Program:
    """The calls of a pass, bound to memory that stays.

    Args:
        recorder: has noted the pass.
        kept: what is read after the last call: tensors, or their places.

    Attributes:
        calls: functions without arguments.
        arena: the memory of everything between.
        written: tensors from outside that calls write to.
    """

    def __init__(self, recorder: Recorder, kept: Sequence[Any]) -> None:
        memories = recorder.memories
        for place in kept:
            if isinstance(place, Place) and place.memory not in recorder.of_batch:
                memories[place.memory].last = len(recorder.calls)
        self._of_batch = recorder.of_batch
        self._starts = [int(t.storage_offset()) * t.itemsize for t in recorder.batch]
        self._views: list[list[tuple[Tensor, Place]]] = [[] for _ in recorder.batch]
        self._at: list[int] = [-1] * len(recorder.batch)
        # Kept as they were computed: what is made of nothing and never written to.
        self._constants: dict[int, Tensor] = {}
        for call in recorder.calls:
            if call.from_nothing and call.operation not in EMPTY:
                places = places_in(call.results)
                if not any(memories[p.memory].written for p in places):
                    made = tensors_in(
                        tree_leaves(call.operation(*self._solid(call.args), **self._solid(call.keywords)))
                    )
                    self._constants |= {p.memory: t for p, t in zip(places, tensors_in(tree_leaves(made)))}
        wanted = {
            key: (memory.size, memory.first, memory.last)
            for key, memory in memories.items()
            if memory.made and key not in self._constants and key not in recorder.of_batch
        }
        self.arena = Arena(wanted)
        self.written = recorder.written
        self._bound: dict[Place, Tensor] = {}
        self._kept: list[Any] = []  # kernels know only addresses
        self.calls: list[Callable[[], Any]] = []
        runs = [call for call in recorder.calls if self._runs(call)]
        for call in runs:  # all of the batch, before kernels look at them
            tree_map_only(Place, self.tensor, (call.args, call.keywords, call.results))
        for number, given in enumerate(recorder.batch):
            self.point(number, given)
        self.calls = _chained(list(map(self._bind, runs)))

    def run(self, batch: Sequence[Tensor]) -> None:
        """Do again what the pass did, with another batch, of the same shapes and strides; it is not copied."""
        for number, given in enumerate(batch):
            if given.data_ptr() != self._at[number]:
                self.point(number, given)
        for call in self.calls:
            call()

    def point(self, number: int, given: Tensor) -> None:
        """Let what lay in tensor `number` of the batch lie in `given`, which is kept until the next."""
        storage, start = given.untyped_storage(), int(given.storage_offset()) * given.itemsize - self._starts[number]
        for tensor, place in self._views[number]:  # in bytes: a view may be of another dtype
            offset, rest = divmod(start + place.offset * place.dtype.itemsize, place.dtype.itemsize)
            if rest:
                raise NotCapturableError("a batch begins where a view of it in another dtype cannot")
            tensor.set_(storage, offset, place.size, place.stride)  # type: ignore[call-overload]
        self._at[number] = given.data_ptr()

    def tensor(self, place: Any) -> Any:
        """Return the tensor of a place; anything else as it is."""
        if not isinstance(place, Place):
            return place
        found = self._bound.get(place)
        if found is None:
            found = torch.empty(0, dtype=place.dtype, device=place.device)
            self._bound[place] = found
            if place.memory in self._of_batch:  # nowhere, until a batch comes
                self._views[self._of_batch[place.memory]].append((found, place))
                return found
            if place.memory in self._constants:
                base, start = self._constants[place.memory].untyped_storage(), 0
            else:
                base, start = self.arena.storage, self.arena.offsets[place.memory]
            offset = start // place.dtype.itemsize + place.offset
            found.set_(base, offset, place.size, place.stride)  # type: ignore[call-overload]
        return found

    def owns(self, place: Any) -> bool:
        """True if a place is in the arena."""
        return isinstance(place, Place) and place.memory in self.arena.offsets

    def _solid(self, values: Any) -> Any:
        """Tensors of the same form in the place of places, for what looks at nothing else of them."""
        return tree_map_only(Place, lambda p: torch.empty_strided(p.size, p.stride, dtype=p.dtype), values)

    def _runs(self, call: Call) -> bool:
        if call.operation in EMPTY:
            return False
        return not (call.from_nothing and all(p.memory in self._constants for p in places_in(call.results)))

    def _bind(self, call: Call) -> Callable[[], Any] | Record:
        operation = call.operation
        args, keywords = tree_map_only(Place, self.tensor, (call.args, call.keywords))
        results = list(map(self.tensor, call.results))
        if hasattr(operation, "bound"):
            self._kept.append((args, results))
            numbers = {
                name: self.tensor(place).item()
                for name, place in call.keywords.items()
                if isinstance(place, Place) and place.memory in self._constants
            }
            return operation.bound(args, results, keywords | numbers)
        if operation in _COPIES:
            as_record = record(_aten.copy_.default, (results[0], args[0]), {}, None)
        else:
            as_record = record(operation, args, keywords, results[0])
        if as_record is not None:
            return as_record
        if operation._schema.is_mutable:
            there = {p.memory for p in places_in(tree_leaves((call.args, call.keywords)))}
            if any(p.memory not in there for p in places_in(call.results)):  # and gives something new
                return functools.partial(_copied, operation, args, keywords, results)
            return functools.partial(_BINDINGS.get(operation, operation), *args, **keywords)
        if operation in _COPIES:
            return functools.partial(Tensor.copy_, results[0], args[0])
        out = _out_variant(operation)
        if out is None or operation in _OUTGROWING or is_random(operation) or len(tensors_in(results)) != len(results):
            return functools.partial(_copied, operation, args, keywords, results)
        variant, names = out
        if names == ["out"] and variant in _BINDINGS:
            keywords = {name: value for name, value in keywords.items() if value is not None}
            call_it = functools.partial(_BINDINGS[variant], *args, **keywords, out=results[0])
            return _multiplied(operation, args, call_it) if operation in products.OPERATIONS else call_it
        write = functools.partial(variant, *args, **keywords)
        if operation in _WHOLE:
            return functools.partial(write, **dict(zip(names, results)))
        again = functools.partial(_copied, operation, args, keywords, results)
        return _Tried(write, dict(zip(names, results)), again)


class _Tried:
    """A call into given memory that has not been seen to keep to it.

    Some operations take their result for working memory of another shape, and enlarge it: they would write over their
    neighbours. The first call gets memory of its own, and what has enlarged it is computed and copied from then on.
    """

    def __init__(self, write: Callable[..., Any], outputs: dict[str, Any], again: Callable[[], Any]) -> None:
        self._write, self._outputs, self._again = write, outputs, again
        self._call: Callable[[], Any] | None = None

    def __call__(self) -> None:
        if self._call is None:
            own = {name: torch.empty_like(t, memory_format=torch.preserve_format) for name, t in self._outputs.items()}
            before = {name: _form(t) for name, t in own.items()}
            try:
                self._write(**own)
            except Exception:  # not every form for given memory works
                self._call = self._again
                self._again()
                return
            kept = all(_form(own[name]) == form for name, form in before.items())
            self._call = functools.partial(self._write, **self._outputs) if kept else self._again
        self._call()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.untyped_storage().nbytes()


def _chained(calls: Sequence[Callable[[], Any] | Record]) -> list[Callable[[], Any]]:
    """Make one call of records that follow one another."""
    chained: list[Callable[[], Any]] = []
    for is_record, group in itertools.groupby(calls, lambda call: isinstance(call, Record)):
        members: list[Any] = list(group)
        chained += [Chain(members)] if is_record else members
    return chained


def _copied(operation: Any, args: Any, keywords: Any, results: Sequence[Any]) -> None:
    """Run an operation that cannot write to given memory."""
    for target, result in zip(results, tree_leaves(operation(*args, **keywords))):
        if isinstance(target, Tensor):
            target.copy_(result)


def _multiplied(operation: Any, args: Any, product: Callable[[], Any]) -> Callable[[], Any]:
    """Let the threads do a product that do it where the pass itself runs."""
    left, right = products.operands(operation, args)

    def run() -> None:
        with products.on_threads_that_pay(left, right.shape[-1]):
            product()

    return run


@functools.cache
def _out_variant(operation: Any) -> tuple[Any, list[str]] | None:
    """Return the overload that writes to given tensors, and the names of those arguments."""
    wanted = [(a.name, str(a.type)) for a in operation._schema.arguments]
    for name in operation.overloadpacket.overloads():
        overload = getattr(operation.overloadpacket, name)
        arguments = overload._schema.arguments
        if [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted and any(a.is_out for a in arguments):
            return overload, [a.name for a in arguments if a.is_out]
    return None
