"""Capture on the CPU, first half: what one explicit pass did is noted (`torch_bp.step.program` runs it again).

A CUDA graph notes kernels as they are launched; this notes torch's operations as they are dispatched, and our kernels
as they are called. What was noted are operations, their arguments and places in memory, and no memory itself.

- *Values that are made of nothing* (`zeros`, `arange`) are told apart.
- *Values read on the host*, and results whose size depends on values, cannot be noted: `NotCapturableError`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_bp.kernels import capture
from torch_bp.step.memory import Overwritten, number, whole

_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_READS |= {_aten.mkldnn_rnn_layer.default}  # which returns less where no gradients are recorded
# Where truth values are the index, places are counted; where values are written to them, on a device alone.
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_LIFTS = {_aten.lift_fresh.default, _aten.lift.default, _aten.lift_fresh_copy.default}
EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
# Write to running statistics, the fourth and the fifth argument, without saying so.
_HIDDEN_WRITES = {_aten.native_batch_norm.default, _aten.cudnn_batch_norm.default, _aten.miopen_batch_norm.default}
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


class Recorder(TorchDispatchMode):
    """Notes what is dispatched while it is active, and runs it. It keeps no memory of the pass alive.

    Attributes:
        calls: in the order in which they ran.
        memories: by their number.
        written: memory from outside that calls write to, but for the batch, each as one tensor.
        touched: tensors of that memory.
        outside: by their identity, tensors that were there before and that calls read or write, but for the batch.
        overwritten: memory that was there before, as it was.

    Args:
        batch: tensors in memory of their own, for which others of the same form stand in when the pass runs again.
    """

    def __init__(self, batch: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.batch = list(batch)
        self.of_batch = {number(t): k for k, t in enumerate(batch)}
        self.calls: list[Call] = []
        self.memories: dict[int, Memory] = {}
        self.written: list[Tensor] = []
        self.touched: list[Tensor] = []
        self.outside: dict[int, Tensor] = {}
        self._lifted: set[int] = set()
        self._drawn: list[tuple[torch.Generator, Tensor]] = []  # generators of the model's own, as they were
        self.overwritten = Overwritten()

    def rewind(self) -> None:
        """Take back what the pass did to memory that was there before, and to generators but for torch's own."""
        for generator, state in self._drawn:
            generator.set_state(state)
        self.overwritten.restore()

    def _keep(self, tensor: Tensor) -> None:
        """Note what memory holds that is written to, if the pass has not made it."""
        if tensor.layout is torch.strided:
            known = self.memories.get(number(tensor))
            if known is None or not known.made:
                self.overwritten.keep(tensor)

    def __enter__(self) -> Any:
        capture.recorders[threading.get_ident()] = self
        return super().__enter__()

    def __exit__(self, *details: Any) -> Any:
        del capture.recorders[threading.get_ident()]
        return super().__exit__(*details)

    @property
    def generators(self) -> list[torch.Generator]:
        """Those that the pass was given to draw from."""
        return [generator for generator, _ in self._drawn]

    @property
    def writes_to_batch(self) -> bool:
        """True if a call writes to a tensor of the batch."""
        return any(self.memories[key].written for key in self.of_batch if key in self.memories)

    def place(self, value: Any) -> Any:
        """Return the place of a tensor in memory that was made or is of the batch; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        memory = self.memories.get(number(value))
        if (memory is None or not memory.made) and number(value) not in self.of_batch:
            return value
        form = tuple(value.shape), value.stride(), int(value.storage_offset())
        return Place(number(value), value.dtype, value.device, *form)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS or torch.Tag.data_dependent_output in func.tags or _sized_by_values(func, args):
            raise NotCapturableError(f"{func} reads values, or makes a tensor whose size depends on them")
        for value in kwargs.values():
            if isinstance(value, torch.Generator) and all(value is not known for known, _ in self._drawn):
                self._drawn.append((value, value.get_state()))
        for tensor in _written(func, args, kwargs):
            self._keep(tensor)
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
        here = len(self.calls)
        given = tensors_in(tree_leaves((args, keywords)))
        if any(t.layout is not torch.strided for t in (*given, *tensors_in(tree_leaves(results)))):
            raise NotCapturableError(f"{operation} has a tensor that is not strided memory")
        if operation in _LIFTS:  # from a list of numbers: of this pass alone, but for its values
            self._lifted.update(map(number, tensors_in(tree_leaves(results))))
        for tensor in given:
            memory = self._use(tensor, here)
            if not memory.made and number(tensor) not in self.of_batch:
                self.outside[id(tensor)] = tensor
        made = tree_leaves(results)
        fresh = False
        for tensor in tensors_in(made):
            known = number(tensor) in self.memories
            memory = self._use(tensor, here)
            if not known:
                memory.made = fresh = True
        written = _written(operation, args, keywords)
        for tensor in written:
            memory = self._use(tensor, here)
            if number(tensor) in self._lifted:
                raise NotCapturableError(f"{operation} writes to a tensor that was made of numbers on the host")
            if not memory.made and not memory.written and number(tensor) not in self.of_batch:
                self.written.append(whole(tensor))
                self.touched.append(tensor)
            memory.written = True
        if fresh or written:  # else a view, or nothing that is kept
            from_nothing = not written and not is_random(operation) and (not given or operation in _FILLS)
            args, keywords = tree_map_only(Tensor, self.place, (args, keywords))
            self.calls.append(Call(operation, args, keywords, list(map(self.place, made)), from_nothing))

    def _use(self, tensor: Tensor, call: int) -> Memory:
        storage = tensor.untyped_storage()
        memory = self.memories.get(storage._cdata)
        if memory is None:
            memory = Memory(storage.nbytes(), call, call, StorageWeakRef(storage))
            self.memories[storage._cdata] = memory
        memory.last = call
        return memory


def _sized_by_values(operation: Any, args: tuple[Any, ...]) -> bool:
    """True if how large a result is depends on the values in a tensor."""
    if operation in _INDEXED and args[0].is_cuda | (operation is _aten.index.Tensor):  # by truth values
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return torch.Tag.dynamic_output_shape in operation.tags


def is_random(operation: Any) -> bool:
    """True if an operation draws random numbers."""
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


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among values."""
    return [value for value in values if isinstance(value, Tensor)]


def places_in(values: Sequence[Any]) -> list[Place]:
    """Return the places among values."""
    return [value for value in values if isinstance(value, Place)]
