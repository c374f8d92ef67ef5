"""Capture on the CPU: what one explicit pass did, noted to be run again over memory that never moves.

A CUDA graph notes kernels as they are launched; this notes torch's operations as they are dispatched, and our kernels
as they are called. When they are run again nothing else of Python runs: no model, no module, no Function. Each
operation writes to the same buffer every time (`torch_bp.step.buffers`): no memory is asked for or given back, and
large layers do not pay at every step for pages that the system clears.

- *Views* are made once.
- *Values that are made of nothing* (`zeros`, `arange`) are computed once, unless something writes to them later.
- *Random numbers* come from torch's generator in the same order as in the pass itself.
- *Values read on the host* cannot be noted: `NotCapturableError`.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_bp.kernels import capture
from torch_bp.kernels.sequence import Chain, Record, record
from torch_bp.step.buffers import Arena

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
_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_READS |= {_aten.mkldnn_rnn_layer.default}  # which returns less where no gradients are recorded
_LIFTS = {_aten.lift_fresh.default, _aten.lift.default, _aten.lift_fresh_copy.default}
_EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
# Write to running statistics, the fourth and the fifth argument, without saying so.
_HIDDEN_WRITES = {_aten.native_batch_norm.default, _aten.cudnn_batch_norm.default, _aten.miopen_batch_norm.default}
# Write to the memory of a result and to nothing else: batch normalisation, run twice, would move its statistics twice.
# Take their result for working memory of the input's shape, and say so on standard error.
_OUTGROWING = {_aten.mse_loss.default, _aten.binary_cross_entropy.default, _aten.soft_margin_loss.default}
_WHOLE = {_aten.native_batch_norm.default, _aten.native_layer_norm.default, _aten.nll_loss_forward.default}
_FILLS = {_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default, _aten.new_zeros.default}
_FILLS |= {_aten.new_ones.default, _aten.new_full.default}


class NotCapturableError(RuntimeError):
    """What a pass does depends on values that the host has read."""


@dataclass
class Memory:
    """A stretch of memory that the pass has met.

    Attributes:
        size: in bytes.
        first, last: numbers of the first and the last call that use it.
        made: True if a call made it; what was there before stays where it is.
        written: True if a call writes to what another one has made, or was there.
        reference: keeps the number of this memory from being given to another, and not the memory itself.
    """

    size: int
    first: int
    last: int
    reference: Any
    made: bool = False
    written: bool = False


@dataclass(frozen=True)
class Place:
    """Where a tensor of the pass lay, in memory that a call made or that is of the batch."""

    memory: int
    dtype: torch.dtype
    device: torch.device
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass
class Call:
    """One operation of the pass: of aten, or a formula. Tensors in memory that was made are `Place`s."""

    operation: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    results: list[Any]
    from_nothing: bool


def _number(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    """Notes what is dispatched while it is active, and runs it. It keeps no memory of the pass alive.

    Attributes:
        calls: in the order in which they ran.
        memories: by their number.
        written: tensors from outside that calls write to.

    Args:
        batch: tensors in memory of their own, for which others of the same form stand in when the pass runs again.
    """

    def __init__(self, batch: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.batch = list(batch)
        self.of_batch = {_number(t): k for k, t in enumerate(batch)}
        self.calls: list[Call] = []
        self.memories: dict[int, Memory] = {}
        self.written: list[Tensor] = []
        self._lifted: set[int] = set()

    def __enter__(self) -> Any:
        capture.recorders[threading.get_ident()] = self
        return super().__enter__()

    def __exit__(self, *details: Any) -> Any:
        del capture.recorders[threading.get_ident()]
        return super().__exit__(*details)

    def place(self, value: Any) -> Any:
        """Return the place of a tensor in memory that was made or is of the batch; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        memory = self.memories.get(_number(value))
        if (memory is None or not memory.made) and _number(value) not in self.of_batch:
            return value
        form = tuple(value.shape), value.stride(), int(value.storage_offset())
        return Place(_number(value), value.dtype, value.device, *form)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS or torch.Tag.data_dependent_output in func.tags or _sized_by_values(func, args):
            raise NotCapturableError(f"{func} reads values, or makes a tensor whose size depends on them")
        results = func(*args, **kwargs)
        self._note(func, args, kwargs, results)
        return results

    def formula(self, formula: Any, tensors: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """Run a formula by its kernel and note it; NotImplemented, and nothing done, where none serves."""
        if formula.updates:
            return NotImplemented
        with _disable_current_modes():
            results = formula.by_kernel(tensors, keywords)
        if results is not NotImplemented:
            self._note(formula, tuple(tensors), dict(keywords), results)
        return results

    def _note(self, operation: Any, args: tuple[Any, ...], keywords: dict[str, Any], results: Any) -> None:
        number = len(self.calls)
        given = _tensors(tree_leaves((args, keywords)))
        if any(t.layout is not torch.strided for t in (*given, *_tensors(tree_leaves(results)))):
            raise NotCapturableError(f"{operation} has a tensor that is not strided memory")
        if operation in _LIFTS:  # from a list of numbers: of this pass alone, but for its values
            self._lifted.update(map(_number, _tensors(tree_leaves(results))))
        for tensor in given:
            self._use(tensor, number)
        made = tree_leaves(results)
        fresh = False
        for tensor in _tensors(made):
            known = _number(tensor) in self.memories
            memory = self._use(tensor, number)
            if not known:
                memory.made = fresh = True
        written = _written(operation, args, keywords)
        for tensor in written:
            memory = self._use(tensor, number)
            if _number(tensor) in self._lifted:
                raise NotCapturableError(f"{operation} writes to a tensor that was made of numbers on the host")
            if not memory.made and not memory.written:
                self.written.append(tensor)
            memory.written = True
        if fresh or written:  # else a view, or nothing that is kept
            from_nothing = not written and not _random(operation) and (not given or operation in _FILLS)
            args, keywords = tree_map_only(Tensor, self.place, (args, keywords))
            self.calls.append(Call(operation, args, keywords, list(map(self.place, made)), from_nothing))

    def _use(self, tensor: Tensor, number: int) -> Memory:
        storage = tensor.untyped_storage()
        memory = self.memories.get(storage._cdata)
        if memory is None:
            memory = Memory(storage.nbytes(), number, number, StorageWeakRef(storage))
            self.memories[storage._cdata] = memory
        memory.last = number
        return memory


def _sized_by_values(operation: Any, args: tuple[Any, ...]) -> bool:
    """True if how large a result is depends on the values in a tensor."""
    if operation is _aten.index.Tensor:  # by truth values, unlike by numbers
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return torch.Tag.dynamic_output_shape in operation.tags


def _random(operation: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ())


def _written(operation: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation writes to."""
    if operation in _HIDDEN_WRITES:
        return [t for t in args[3:5] if isinstance(t, Tensor)]
    schema = getattr(operation, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    by_name = dict(zip((a.name for a in schema.arguments), args)) | dict(keywords)
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for name in names for t in tree_leaves(by_name.get(name)) if isinstance(t, Tensor)]


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
            if call.from_nothing and call.operation not in _EMPTY:
                places = _places(call.results)
                if not any(memories[p.memory].written for p in places):
                    made = _tensors(tree_leaves(call.operation(*self._solid(call.args), **self._solid(call.keywords))))
                    self._constants |= {p.memory: t for p, t in zip(places, made)}
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
        if call.operation in _EMPTY:
            return False
        return not (call.from_nothing and all(p.memory in self._constants for p in _places(call.results)))

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
            there = {p.memory for p in _places(tree_leaves((call.args, call.keywords)))}
            if any(p.memory not in there for p in _places(call.results)):  # and gives something new
                return functools.partial(_copied, operation, args, keywords, results)
            return functools.partial(_BINDINGS.get(operation, operation), *args, **keywords)
        if operation in _COPIES:
            return functools.partial(Tensor.copy_, results[0], args[0])
        out = _out_variant(operation)
        if out is None or operation in _OUTGROWING or _random(operation) or len(_tensors(results)) != len(results):
            return functools.partial(_copied, operation, args, keywords, results)
        variant, names = out
        if names == ["out"] and variant in _BINDINGS:
            keywords = {name: value for name, value in keywords.items() if value is not None}
            return functools.partial(_BINDINGS[variant], *args, **keywords, out=results[0])
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


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _places(values: Sequence[Any]) -> list[Place]:
    return [value for value in values if isinstance(value, Place)]


def _copied(operation: Any, args: Any, keywords: Any, results: Sequence[Any]) -> None:
    """Run an operation that cannot write to given memory."""
    for target, result in zip(results, tree_leaves(operation(*args, **keywords))):
        if isinstance(target, Tensor):
            target.copy_(result)


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
