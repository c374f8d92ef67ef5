"""Capture on the CPU: what one explicit pass did, noted to be run again over memory that never moves.

A CUDA graph notes kernels as they are launched; this notes torch's operations as they are dispatched, and our kernels
as they are called. When they are run again nothing else of Python runs: no model, no module, no Function. Each
operation writes to the same buffer every time (`torch_bp.step.buffers`): no memory is asked for or given back, and large
layers do not pay at every step for pages that the system clears.

- *Views* are made once.
- *Values that are made of nothing* (`zeros`, `arange`) are computed once, unless something writes to them later.
- *Random numbers* come from torch's generator in the same order as in the pass itself.
- *Values read on the host* cannot be noted: `NotCapturable`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_bp.kernels import capture
from torch_bp.step.buffers import Arena

_aten = torch.ops.aten
# Torch's bindings of these parse their arguments several times faster than the operations by themselves.
_BINDINGS: dict[Any, Callable[..., Any]] = {
    **{getattr(_aten, name).out: getattr(torch, name) for name in "addmm mm mul add sub div sigmoid tanh neg".split()},
    **{getattr(_aten, name).default: getattr(torch, name) for name in "relu_ sigmoid_ tanh_".split()},
    _aten.sum.IntList_out: torch.sum,
    _aten.gather.out: torch.gather,
    _aten.where.self_out: torch.where,
    _aten.clamp.out: torch.clamp,
    _aten.relu.out: lambda input, out: torch.clamp_min(input, 0, out=out),  # which is what it is
}
_COPIES = {_aten._to_copy.default, _aten.clone.default}
_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_FILLS = {_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default, _aten.new_zeros.default}
_FILLS |= {_aten.new_ones.default, _aten.new_full.default}


class NotCapturable(RuntimeError):
    """What a pass does depends on values that the host has read."""


@dataclass
class Memory:
    """A stretch of memory that the pass has met.

    Attributes:
        storage: as it was in the pass.
        first, last: numbers of the first and the last call that use it.
        made: True if a call made it; what was there before stays where it is.
        written: True if a call writes to what another one has made.
    """

    storage: torch.UntypedStorage
    first: int
    last: int
    made: bool = False
    written: bool = False


@dataclass
class Call:
    """One operation of the pass: of aten, or a formula."""

    operation: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    results: list[Any]
    from_nothing: bool


def memory_of(tensor: Tensor) -> int:
    """Return the number of the stretch of memory that a tensor lies in."""
    return tensor.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    """Notes what is dispatched while it is active, and runs it.

    Attributes:
        calls: in the order in which they ran.
        memories: by their number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.memories: dict[int, Memory] = {}
        self._thread = threading.get_ident()

    def __enter__(self) -> Any:
        capture.recorder = self
        return super().__enter__()

    def __exit__(self, *details: Any) -> Any:
        capture.recorder = None
        return super().__exit__(*details)

    def here(self) -> bool:
        """True in the thread whose operations are noted."""
        return threading.get_ident() == self._thread

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS or torch.Tag.data_dependent_output in func.tags:
            raise NotCapturable(f"{func} reads values on the host, or makes a tensor of a size that depends on values")
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
        given = [t for t in tree_leaves((args, keywords)) if isinstance(t, Tensor)]
        for tensor in given:
            self._use(tensor, number)
        made = tree_leaves(results)
        fresh = False
        for tensor in made:
            if isinstance(tensor, Tensor):
                known = memory_of(tensor) in self.memories
                memory = self._use(tensor, number)
                if not known:
                    memory.made = fresh = True
        written = _written(operation, args, keywords)
        for tensor in written:
            self._use(tensor, number).written = True
        if fresh or written:  # else a view, or nothing that is kept
            from_nothing = not written and (not given or operation in _FILLS)
            self.calls.append(Call(operation, args, keywords, made, from_nothing))

    def _use(self, tensor: Tensor, number: int) -> Memory:
        key = memory_of(tensor)
        memory = self.memories.get(key)
        if memory is None:
            memory = self.memories[key] = Memory(tensor.untyped_storage(), number, number)
        memory.last = number
        return memory


def _written(operation: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation writes to."""
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
        placed: by the number of memory, the tensor whose memory takes its place.
        kept: tensors of the pass that are read after the last call.

    Attributes:
        calls: functions without arguments.
        arena: the memory of everything between.
    """

    def __init__(self, recorder: Recorder, placed: Mapping[int, Tensor], kept: Sequence[Tensor]) -> None:
        memories = recorder.memories
        for tensor in kept:
            if memory_of(tensor) in memories:
                memories[memory_of(tensor)].last = len(recorder.calls)
        self._constants = {
            key
            for call in recorder.calls
            if call.from_nothing and call.operation not in _EMPTY
            for key in map(memory_of, _tensors(call.results))
            if not memories[key].written and key not in placed
        }
        self._placed = placed
        wanted = {
            key: (memory.storage.nbytes(), memory.first, memory.last)
            for key, memory in memories.items()
            if memory.made and key not in self._constants and key not in placed
        }
        self.arena = Arena(wanted)
        self._bound: dict[int, Tensor] = {}
        self._seen: list[Tensor] = []  # an address names a tensor while the tensor is there
        self.calls: list[Callable[[], Any]] = [self._bind(call) for call in recorder.calls if self._runs(call)]

    def run(self) -> None:
        """Do again what the pass did."""
        for call in self.calls:
            call()

    def tensor(self, tensor: Tensor) -> Tensor:
        """Return what takes the place of a tensor of the pass."""
        found = self._bound.get(id(tensor))
        if found is not None:
            return found
        key = memory_of(tensor)
        if key in self._placed:
            home = self._placed[key]
            base, offset = home.untyped_storage(), home.storage_offset()
        elif key in self.arena.offsets:
            base, offset = self.arena.storage, self.arena.offsets[key] // tensor.element_size()
        else:  # outside: it stays, and must be kept
            base, found = None, tensor
        if base is not None:
            found = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            place = offset + tensor.storage_offset()
            found.set_(base, place, tensor.size(), tensor.stride())  # type: ignore[call-overload]
        self._bound[id(tensor)] = found
        self._seen.append(tensor)
        return found

    def _runs(self, call: Call) -> bool:
        if call.operation in _EMPTY:
            return False
        return not (call.from_nothing and all(memory_of(t) in self._constants for t in _tensors(call.results)))

    def _bind(self, call: Call) -> Callable[[], Any]:
        operation = call.operation
        args, keywords = tree_map_only(Tensor, self.tensor, (call.args, call.keywords))
        results = [self.tensor(t) if isinstance(t, Tensor) else t for t in call.results]
        if hasattr(operation, "bound"):
            numbers = {
                name: value.item()
                for name, value in keywords.items()
                if isinstance(value, Tensor) and memory_of(value) in self._constants
            }
            return operation.bound(args, results, keywords | numbers)
        if operation._schema.is_mutable:
            return functools.partial(_BINDINGS.get(operation, operation), *args, **keywords)
        if operation in _COPIES:
            return functools.partial(Tensor.copy_, results[0], args[0])
        out = _out_variant(operation)
        if out is None or len(_tensors(results)) != len(results):
            return functools.partial(_copied, operation, args, keywords, results)
        variant, names = out
        if names == ["out"] and variant in _BINDINGS:
            keywords = {name: value for name, value in keywords.items() if value is not None}
            return functools.partial(_BINDINGS[variant], *args, **keywords, out=results[0])
        return functools.partial(variant, *args, **keywords, **dict(zip(names, results)))


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


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
