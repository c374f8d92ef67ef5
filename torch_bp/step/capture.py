"""Capture on the CPU: what one explicit pass did, noted to be run again over memory that never moves.

A CUDA graph notes kernels as they are launched; this notes torch's operations as they are dispatched, and our kernels
as they are called. Nothing of Python runs when they are run again: no model, no module, no Function. Each operation
writes to the same buffer every time (`torch_bp.step.buffers`), so that no memory is asked for, none is cleared by the
system, and large layers do not pay for it at every step.

- *Views* are made once.
- *Values that are made of nothing* (`zeros`, `arange`) are computed once, unless something writes to them later.
- *Values read on the host* cannot be noted: the pass then runs as it is at every step.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from torch_bp.kernels import capture

_aten = torch.ops.aten
# Torch's bindings of these parse their arguments several times faster than the operations by themselves.
_BINDINGS: dict[Any, Callable[..., Any]] = {
    _aten.addmm.out: torch.addmm,
    _aten.mm.out: torch.mm,
    _aten.sum.IntList_out: torch.sum,
    _aten.mul.out: torch.mul,
    _aten.add.out: torch.add,
    _aten.sub.out: torch.sub,
    _aten.div.out: torch.div,
    _aten.sigmoid.out: torch.sigmoid,
    _aten.tanh.out: torch.tanh,
    _aten.neg.out: torch.neg,
    _aten.gather.out: torch.gather,
    _aten.where.self_out: torch.where,
    _aten.relu_.default: torch.relu_,
    _aten.sigmoid_.default: torch.sigmoid_,
    _aten.tanh_.default: torch.tanh_,
}
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.is_nonzero.default}
_EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


class NotCapturable(RuntimeError):
    """The pass depends on values that the host reads."""


@dataclass
class Memory:
    """A stretch of memory that the pass has met.

    Attributes:
        storage: as it was in the pass.
        first, last: numbers of the calls that use it first and last, if it was made by one; else -1.
        made: True if a call made it.
        written: True if a later call writes to it.
    """

    storage: torch.UntypedStorage
    first: int = -1
    last: int = -1
    made: bool = False
    written: bool = False
    tensors: list[Tensor] = field(default_factory=list)


@dataclass
class Call:
    """One operation of the pass: an aten operation with its arguments, or a formula; results and their places."""

    operation: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    results: list[Any]
    constant: bool = False


class Recorder(TorchDispatchMode):
    """Notes what is dispatched while it is active, and runs it."""

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
        if func in _READS:
            raise NotCapturable(f"{func} reads values on the host")
        results = func(*args, **kwargs)
        self._note(func, args, kwargs, results)
        return results

    def formula(self, formula: Any, tensors: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """Run a formula by its kernel and note it; NotImplemented, and nothing done, where none serves."""
        with _disable_current_modes():
            results = formula.by_kernel(tensors, keywords)
        if results is NotImplemented or formula.updates:
            return results
        self._note(formula, tuple(tensors), dict(keywords), results)
        return results

    def _note(self, operation: Any, args: tuple[Any, ...], keywords: dict[str, Any], results: Any) -> None:
        number = len(self.calls)
        given = [t for t in tree_leaves((args, keywords)) if isinstance(t, Tensor)]
        for tensor in given:
            self._use(tensor, number)
        made = list(tree_leaves(results))
        fresh = False
        for tensor in made:
            if isinstance(tensor, Tensor):
                known = self._key(tensor) in self.memories
                memory = self._use(tensor, number)
                if not known:
                    memory.made, memory.first, fresh = True, number, True
        schema = getattr(operation, "_schema", None)
        mutable = schema is not None and schema.is_mutable
        if mutable:
            written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
            by_name = dict(zip((a.name for a in schema.arguments), args)) | keywords
            for name in written:
                for tensor in tree_leaves(by_name.get(name)):
                    if isinstance(tensor, Tensor):
                        self._use(tensor, number).written = True
        if not fresh and not mutable:
            return  # a view, or nothing at all
        constant = not given or (schema is not None and str(operation).endswith(("s_like.default", "full_like.default")))
        self.calls.append(Call(operation, args, keywords, made, constant and not mutable))

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _use(self, tensor: Tensor, number: int) -> Memory:
        key = self._key(tensor)
        memory = self.memories.get(key)
        if memory is None:
            memory = self.memories[key] = Memory(tensor.untyped_storage())
        memory.last = number
        memory.tensors.append(tensor)  # keeps addresses from being given to others
        return memory


class Program:
    """Calls bound to buffers.

    Args:
        recorder: what was noted.
        outside: storages (by their number) of tensors that stay where they are: parameters, inputs.
        placed: by the number of a storage, the tensor whose memory takes its place.
        kept: tensors of the pass whose memory must last to the end of the step.
    """

    def __init__(self, recorder: Recorder, placed: dict[int, Tensor], kept: Sequence[Tensor]) -> None:
        from torch_bp.step.buffers import Arena

        last = len(recorder.calls)
        for tensor in kept:
            memory = recorder.memories.get(Recorder._key(tensor))
            if memory is not None:
                memory.last = last
        skipped = set()
        for number, call in enumerate(recorder.calls):
            fixed = call.constant and not any(
                recorder.memories[Recorder._key(t)].written for t in call.results if isinstance(t, Tensor)
            )
            if call.operation in _EMPTY or fixed:
                skipped.add(number)
        constants = {
            Recorder._key(t)
            for number in skipped
            if recorder.calls[number].operation not in _EMPTY
            for t in recorder.calls[number].results
            if isinstance(t, Tensor)
        }
        self.placed = placed
        managed = {
            key: memory
            for key, memory in recorder.memories.items()
            if memory.made and key not in constants and key not in placed
        }
        self.arena = Arena({key: (m.storage.nbytes(), m.first, m.last) for key, m in managed.items()})
        self._tensors: dict[int, Tensor] = {}
        self._managed = managed
        self.calls = [self._bind(call) for n, call in enumerate(recorder.calls) if n not in skipped]
        self.count = len(self.calls)

    def tensor(self, tensor: Tensor) -> Tensor:
        """The tensor of this program that has the place of one of the pass."""
        found = self._tensors.get(id(tensor))
        if found is None:
            key = Recorder._key(tensor)
            if key in self.placed:
                base = self.placed[key].untyped_storage()
                offset = self.placed[key].storage_offset()
            elif key in self._managed:
                base, start = self.arena.storage, self.arena.offsets[key]
                offset = start // tensor.element_size()
            else:
                self._tensors[id(tensor)] = tensor
                return tensor
            found = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            found.set_(base, offset + tensor.storage_offset(), tensor.size(), tensor.stride())
            self._tensors[id(tensor)] = found
        return found

    def _bind(self, call: Call) -> Callable[[], Any]:
        args, keywords = tree_map_only(Tensor, self.tensor, (call.args, call.keywords))
        results = [self.tensor(t) if isinstance(t, Tensor) else t for t in call.results]
        operation = call.operation
        if hasattr(operation, "bound"):
            return operation.bound(args, results, keywords)
        if operation._schema.is_mutable:
            return functools.partial(_BINDINGS.get(operation, operation), *args, **keywords)
        out = _out_variant(operation)
        tensors = [r for r in results if isinstance(r, Tensor)]
        if out is None or len(tensors) != len(results):
            return functools.partial(_copied, operation, args, keywords, results)
        variant, names = out
        targets = dict(zip(names, results))
        if list(targets) == ["out"] and variant in _BINDINGS:
            keywords = {n: v for n, v in keywords.items() if v is not None}
            return functools.partial(_BINDINGS[variant], *args, **keywords, out=results[0])
        return functools.partial(variant, *args, **keywords, **targets)

    def run(self) -> None:
        """Do everything again."""
        for call in self.calls:
            call()


def _copied(operation: Any, args: Any, keywords: Any, results: Sequence[Any]) -> None:
    made = tree_leaves(operation(*args, **keywords))
    for target, result in zip(results, made):
        if isinstance(target, Tensor):
            target.copy_(result)


@functools.cache
def _out_variant(operation: Any) -> tuple[Any, list[str]] | None:
    """Return the overload that writes to given tensors, and the names of those arguments."""
    wanted = [(a.name, str(a.type)) for a in operation._schema.arguments]
    packet = operation.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        arguments = overload._schema.arguments
        outs = [a.name for a in arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in arguments if not a.is_out]
        if outs and rest == wanted:
            return overload, outs
    return None
