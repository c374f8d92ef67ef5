"""A table of addresses for one call over lists of tensors, kept between calls and cheaply checked again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from torch_bp.kernels import native, plain

_Tensor = torch.Tensor
_dtype_of = _Tensor.dtype.__get__  # type: ignore[attr-defined]
_layout_of, _device_of = _Tensor.layout.__get__, _Tensor.device.__get__  # type: ignore[attr-defined]
_shape_of = _Tensor.shape.__get__  # type: ignore[attr-defined]


@dataclass
class _Seen:
    """What a table saw when it was built, which the next call's tensors are compared with."""

    handles: np.ndarray
    kept: np.ndarray  # 1 for each row that is written, then the size of an element
    kinds: np.ndarray  # layout, dtype, device
    forms: np.ndarray  # per tensor: dimensions, sizes, strides
    written: np.ndarray  # starts in ascending order, and ends
    single: list[int]  # columns of one element
    held: list[tuple[torch.Tensor, ...] | None]  # rows that came as tuples
    references: list[weakref.ref[torch.Tensor]]  # make `swap_tensors` refuse


class Table:
    """Addresses, sizes and chunks of `rows` lists of equally many tensors: `addresses[r, k]` is tensor k of list r.

    `refresh` is called before each use. Tensors that are written are expected to be the same ones as last time, at the
    same addresses; those that are only read (gradients, new at each step) may be others, of the same dtype, shapes and
    strides, and are not kept alive. One compiled look at all of them tells; after any other change, and where no
    compiled code can be had, the table is built anew.

    A row that is the same *tuple* as last time holds the same tensors, which saves asking each for its handle. Against
    `torch.utils.swap_tensors`, the one way to change what is behind a tensor, they have weak references, which make
    it refuse.
    """

    def __init__(self) -> None:
        self.addresses = np.empty((0, 0), np.int64)
        self.tensor = self.start = self.length = np.empty(0, np.int64)
        self.elements = 0
        self.dtype = torch.float32
        self.written: list[torch.Tensor] = []
        self.version = 0  # grows whenever an address changes: a device copy of the table knows when it is stale
        self._writes: Sequence[bool] = ()
        self._chunk = 0
        self._inference = False
        self._seen: _Seen | None = None
        self._answer = np.zeros(8, np.int64)
        self._copied: tuple[int, torch.device] | None = None

    def refresh(self, lists: Sequence[Sequence[torch.Tensor]], writes: Sequence[bool], chunk: int) -> bool:
        """Bring the table up to date; False if these tensors are not for a kernel.

        Args:
            lists: the tensors of each row.
            writes: which rows the kernel writes to.
            chunk: how many elements a thread takes at a time.
        """
        if writes == self._writes and chunk == self._chunk and self._same(lists):
            return True
        self._writes, self._chunk = (), chunk
        try:
            if not self._build(lists, writes, chunk):
                return False
        except RuntimeError:  # a tensor that has no address
            return False
        self._writes = list(writes)
        self._remember(lists)
        return True

    def _same(self, lists: Sequence[Sequence[torch.Tensor]]) -> bool:
        """True if nothing but the addresses of lists that are only read has changed; those are updated."""
        compiled, seen = native.functions(), self._seen
        rows, columns = self.addresses.shape
        if compiled is None or seen is None or len(lists) != rows:
            return False
        if self._inference and not torch.is_inference_mode_enabled():
            return False
        handles = seen.handles.copy()
        try:
            for number, (row, held) in enumerate(zip(lists, seen.held)):
                if row is held:
                    continue
                if len(row) != columns or not self._seen_whole(row, seen.single if self._writes[number] else None):
                    return False
                handles[number] = native.handles(row, columns)
        except TypeError:  # not a tensor
            return False
        verdict = compiled.check(
            handles, seen.handles, seen.kept, seen.kinds, seen.forms, seen.written, self.addresses, self._answer
        )
        self.version += verdict == native.MOVED
        return verdict != native.CHANGED

    @staticmethod
    def _seen_whole(row: Sequence[torch.Tensor], single: Sequence[int] | None) -> bool:
        """True if `check`, which sees no more than memory, sees all there is to these tensors.

        It does not see a pending sign. That a written tensor got one, at the same address and strides, is ruled out but
        for single elements (their columns are given for a row that is written): `x.conj().imag` is every other number
        of x.
        """
        if single is not None:
            return not any(row[k].is_neg() for k in single)
        return plain.PLAIN_TYPES.issuperset(map(type, row)) and not any(map(_Tensor.is_neg, row))

    def _remember(self, lists: Sequence[Sequence[torch.Tensor]]) -> None:
        """Note what `_same` compares."""
        self._seen = None
        compiled = native.functions()
        if compiled is None:
            return
        handles = native.handles(chain.from_iterable(lists), self.addresses.size).reshape(self.addresses.shape)
        if not compiled.kind(handles, self._answer):
            return
        starts = self.addresses[np.array(self._writes, bool)]
        stretches = np.stack([starts.ravel(), (starts + self._sizes * self.dtype.itemsize).ravel()])
        stretches = stretches[:, stretches[1] > stretches[0]]
        held = [row if isinstance(row, tuple) else None for row in lists]
        forms = (n for shape, stride in zip(self._shapes, self._strides) for n in (len(shape), *shape, *stride))
        self._seen = _Seen(
            handles,
            kept=np.array([*self._writes, self.dtype.itemsize], np.int64),
            kinds=self._answer[:4].copy(),
            forms=np.fromiter(forms, np.int64),
            written=np.ascontiguousarray(stretches[:, np.argsort(stretches[0])]),
            single=np.flatnonzero(self._sizes == 1).tolist(),
            held=held,
            references=[weakref.ref(t) for row in held if row is not None for t in row],
        )

    def _matches(self, tensors: Sequence[torch.Tensor]) -> bool:
        """True if `tensors` are plain and of the dtype, device, shapes and strides of the first list."""
        return (
            len(tensors) == len(self._shapes)
            and plain.PLAIN_TYPES.issuperset(map(type, tensors))
            and set(map(_dtype_of, tensors)) == {self.dtype}
            and set(map(_layout_of, tensors)) == {torch.strided}
            and set(map(_device_of, tensors)) == {self._device}
            and list(map(_shape_of, tensors)) == self._shapes
            and list(map(_Tensor.stride, tensors)) == self._strides
            and not any(map(_Tensor.is_neg, tensors))
        )

    def _filled(self, addresses: np.ndarray) -> bool:
        """True if every tensor with elements has memory (zero tensors and freed storages have none)."""
        return bool(np.all((addresses != 0) | (self._sizes == 0)))

    def _build(self, lists: Sequence[Sequence[torch.Tensor]], writes: Sequence[bool], chunk: int) -> bool:
        first = lists[0]
        if not first or not plain.PLAIN_TYPES.issuperset(map(type, first)):
            return False
        self.dtype, self._device = first[0].dtype, first[0].device
        if any(t.layout is not torch.strided or not plain.dense(t) for t in first):
            return False
        self._shapes, self._strides = [t.shape for t in first], [t.stride() for t in first]
        self._sizes = np.array([t.numel() for t in first], np.int64)
        if not all(map(self._matches, lists)):
            return False
        addresses = np.array([[t.data_ptr() for t in row] for row in lists], np.int64)
        if not all(map(self._filled, addresses)):
            return False
        sizes = (self._sizes * self.dtype.itemsize).tolist()
        if not plain.disjoint(
            (start, size, k, written)
            for row, written in zip(addresses.tolist(), writes)
            for k, (start, size) in enumerate(zip(row, sizes))
        ):
            return False
        self.written = [t for row, w in zip(lists, writes) if w for t in row]
        self._inference = any(map(_Tensor.is_inference, self.written))
        if self._inference and not torch.is_inference_mode_enabled():
            return False  # torch refuses this, in its own words
        self.addresses, self.version = addresses, self.version + 1
        self.elements = int(self._sizes.sum())
        self._cut(chunk)
        return True

    def on_device(self, device: torch.device) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the addresses and the three columns of chunks as tensors on `device`, copied when they changed."""
        if self._copied != (self.version, device):
            addresses = torch.from_numpy(self.addresses.copy())
            chunks = [torch.from_numpy(column) for column in (self.tensor, self.start, self.length)]
            if device.type == "cuda":
                addresses, *chunks = (t.pin_memory().to(device, non_blocking=True) for t in (addresses, *chunks))
            self._copies = addresses, tuple(chunks)
            self._copied = (self.version, device)
        return self._copies

    def _cut(self, chunk: int) -> None:
        """Cut the tensors into chunks of at most `chunk` elements, in the order of the list."""
        counts = -(-self._sizes // chunk)
        self.tensor = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        within = np.arange(len(self.tensor), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        self.start = within * chunk
        self.length = np.minimum(chunk, self._sizes[self.tensor] - self.start)
