"""A table of addresses for one call over lists of tensors, kept between calls and cheaply checked again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np
import torch

from torch_bp.kernels import native, plain

_Tensor = torch.Tensor
LENT = 2  # among the rows that are written: its tensors are the caller's, to be freed when the call is over


@dataclass
class Seen:
    """What a table saw when it was built, which the next call's tensors are compared with."""

    handles: np.ndarray
    kept: np.ndarray  # 1 for each row that is written, then the size of an element
    kinds: np.ndarray  # layout, dtype, device
    forms: np.ndarray  # per tensor: dimensions, sizes, strides
    written: np.ndarray  # starts in ascending order, and ends
    single: list[int]  # columns of one element
    held: list[tuple[torch.Tensor, ...] | None]  # rows that came as tuples
    references: list[weakref.ref[torch.Tensor]]  # make `swap_tensors` refuse


def _disjoint(addresses: np.ndarray, sizes: np.ndarray, writes: Sequence[int]) -> bool:
    """True if no stretch of memory that is written overlaps another one, but for itself in the same column."""
    if not any(writes):
        return True
    if len(addresses) == 1:
        full = sizes > 0
        starts, sizes = addresses[0, full], sizes[full]
        order = starts.argsort()
        starts = starts[order]
        return bool((starts[:-1] + sizes[order][:-1] <= starts[1:]).all())
    starts = addresses.ravel()
    ends = (addresses + sizes).ravel()
    columns = np.broadcast_to(np.arange(len(sizes)), addresses.shape).ravel()
    written = np.repeat(np.array(writes, bool), len(sizes))
    order = np.lexsort((columns, ends, starts))
    order = order[starts[order] < ends[order]]
    starts, ends, columns, written = starts[order], ends[order], columns[order], written[order]
    if not len(starts):
        return True
    new = np.ones(len(starts), bool)
    new[1:] = (np.diff(starts) != 0) | (np.diff(ends) != 0) | (np.diff(columns) != 0)
    first = np.flatnonzero(new)
    starts, ends, written = starts[first], ends[first], np.logical_or.reduceat(written, first)
    reach = np.maximum.accumulate(ends)
    reach_written = np.maximum.accumulate(np.where(written, ends, -1))
    return not ((starts[1:] < reach_written[:-1]) | (written[1:] & (starts[1:] < reach[:-1]))).any()


class Table:
    """Addresses, sizes and chunks of `rows` lists of equally many tensors: `addresses[r, k]` is tensor k of list r.

    `refresh` is called before each use. Tensors that are written are expected to be the same ones as last time, at the
    same addresses; those that are only read (gradients, new at each step) may be others, of the same dtype, shapes and
    strides, and are not kept alive. One compiled look at all of them tells; after any other change, and where no
    compiled code can be had, the table is built anew. A written row may be LENT: it is not kept alive either.

    A row that is the same *tuple* as last time holds the same tensors, which saves asking each for its handle. Against
    `torch.utils.swap_tensors`, the one way to change what is behind a tensor, they have weak references, which make
    it refuse.

    Args:
        lasting: False for a table that is used once. Default: True.
    """

    def __init__(self, lasting: bool = True) -> None:
        self._lasting = lasting
        self.addresses = np.empty((0, 0), np.int64)
        self.tensor = self.start = self.length = self.counts = np.empty(0, np.int64)
        self.elements = 0
        self.dtype = torch.float32
        self.written: list[torch.Tensor] = []
        self.version = 0  # grows whenever an address changes: a device copy of the table knows when it is stale
        self._writes: Sequence[int] = ()
        self._chunk = 0
        self.inference = False
        self.seen: Seen | None = None
        self.program: Any = None  # that has run over it last
        self.answer = np.zeros(8, np.int64)
        self.copies: np.ndarray | None = None  # where copies of the first written row go, 0 for none
        self.copied: torch.dtype | None = None  # their dtype
        self._copies_sent: tuple[Any, torch.Tensor] | None = None
        self.built = 0  # how often: a device copy of another one is of no use
        self._copied: tuple[int, int, torch.device] | None = None

    def refresh(self, lists: Sequence[Sequence[torch.Tensor]], writes: Sequence[int], chunk: int) -> bool:
        """Bring the table up to date; False if these tensors are not for a kernel.

        Args:
            lists: the tensors of each row.
            writes: which rows the kernel writes to; LENT for one that it writes to and must not keep.
            chunk: how many elements a thread takes at a time.
        """
        if writes == self._writes and chunk == self._chunk and self._same(lists):
            return True
        self._writes, self._chunk = (), chunk
        try:
            return self._build(lists, writes, chunk)
        except (RuntimeError, TypeError):  # a tensor that has no address, something that is no tensor
            return False

    def _same(self, lists: Sequence[Sequence[torch.Tensor]]) -> bool:
        """True if nothing but the addresses of lists that are only read has changed; those are updated."""
        compiled, seen = native.functions(), self.seen
        rows, columns = self.addresses.shape
        if compiled is None or seen is None or len(lists) != rows:
            return False
        if self.inference and not torch.is_inference_mode_enabled():
            return False
        handles = seen.handles.copy()
        try:
            for number, (row, held) in enumerate(zip(lists, seen.held)):
                if row is held:
                    continue
                kept = self._writes[number] == 1
                if len(row) != columns or not self._seen_whole(row, seen.single if kept else None):
                    return False
                handles[number] = native.handles(row, columns)
        except TypeError:  # not a tensor
            return False
        verdict = compiled.check(
            handles, seen.handles, seen.kept, seen.kinds, seen.forms, seen.written, self.addresses, self.answer
        )
        self.version += verdict == native.MOVED
        return verdict != native.CHANGED

    @staticmethod
    def _seen_whole(row: Sequence[torch.Tensor], single: Sequence[int] | None) -> bool:
        """True if `check`, which sees no more than memory, sees all there is to these tensors.

        It does not see a pending sign. That a tensor got one which was kept, at the same address and strides, is ruled
        out but for single elements (their columns are given for a row that is kept): `x.conj().imag` is every other
        number of x.
        """
        if single is not None:
            return not any(row[k].is_neg() for k in single)
        return plain.PLAIN_TYPES.issuperset(map(type, row)) and not any(map(_Tensor.is_neg, row))

    def _remember(self, lists: Sequence[Sequence[torch.Tensor]], handles: np.ndarray) -> None:
        """Note what `_same` compares."""
        starts = self.addresses[np.array(self._writes, bool)]
        stretches = np.stack([starts.ravel(), (starts + self._sizes * self.dtype.itemsize).ravel()])
        stretches = stretches[:, stretches[1] > stretches[0]]
        held = [row if isinstance(row, tuple) else None for row in lists]
        self.seen = Seen(
            handles,
            kept=np.array([*self._writes, self.dtype.itemsize], np.int64),
            kinds=self._kinds,
            forms=self._forms,
            written=np.ascontiguousarray(stretches[:, np.argsort(stretches[0])]),
            single=np.flatnonzero(self._sizes == 1).tolist(),
            held=held,
            references=[weakref.ref(t) for row in held if row is not None for t in row],
        )

    def _build(self, lists: Sequence[Sequence[torch.Tensor]], writes: Sequence[int], chunk: int) -> bool:
        count, everything = len(lists[0]), list(chain.from_iterable(lists))
        if not everything or any(len(row) != count for row in lists):
            return False
        if not plain.PLAIN_TYPES.issuperset(map(type, everything)) or any(map(_Tensor.is_neg, everything)):
            return False
        self.seen, compiled, handles = None, native.functions(), None
        if compiled is None:
            described = self._described_by_torch(lists)
        else:
            handles = native.handles(everything, len(everything)).reshape(len(lists), count)
            described = self._described(compiled, handles)
        if not described:
            return False
        self.dtype = everything[0].dtype
        if not _disjoint(self.addresses, self._sizes * self.dtype.itemsize, writes):
            return False
        self.written = [t for row, w in zip(lists, writes) if w == 1 for t in row]
        self.inference = any(t.is_inference() for row, w in zip(lists, writes) if w for t in row)
        if self.inference and not torch.is_inference_mode_enabled():
            return False  # torch refuses this, in its own words
        self.version += 1
        self.built += 1
        self.elements = int(self._sizes.sum())
        self._cut(chunk)
        self._writes = list(writes)
        if self._lasting and handles is not None:
            self._remember(lists, handles)
        return True

    def _described(self, compiled: ModuleType, handles: np.ndarray) -> bool:
        """Ask all tensors where they are and of what form; False if they are not alike."""
        addresses, sizes = np.empty_like(handles), np.empty(handles.shape[1], np.int64)
        kinds, forms = np.zeros(4, np.int64), np.empty(5 * handles.shape[1], np.int64)
        needed = compiled.describe(handles, kinds, forms, sizes, addresses, self.answer)
        if needed > len(forms):  # more than two dimensions
            forms = np.empty(needed, np.int64)
            needed = compiled.describe(handles, kinds, forms, sizes, addresses, self.answer)
        self._kinds, self._forms, self._sizes, self.addresses = kinds, forms, sizes, addresses
        return needed != native.UNFIT and kinds[0] == 0  # strided

    def _described_by_torch(self, lists: Sequence[Sequence[torch.Tensor]]) -> bool:
        """As `_described`, where there is no compiled code."""
        alike = [{(t.dtype, t.layout, t.device, t.shape, t.stride()) for t in column} for column in zip(*lists)]
        if any(len(kinds) > 1 for kinds in alike) or len({next(iter(kinds))[:3] for kinds in alike}) > 1:
            return False
        if lists[0][0].layout is not torch.strided or not all(map(plain.dense, lists[0])):
            return False
        self._sizes = np.array([t.numel() for t in lists[0]], np.int64)
        self.addresses = np.array([[t.data_ptr() for t in row] for row in lists], np.int64)
        return bool(np.all((self.addresses != 0) | (self._sizes == 0)))  # zero tensors and freed storages have none

    def on_device(self, device: torch.device) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        """Return addresses, the three columns of chunks, and `counts`, as tensors on `device`, copied when changed.

        Addresses of the same tensors elsewhere are written over the old ones: a captured graph reads them from there.
        """
        if self._copied is None or self._copied[1:] != (self.built, device):
            columns = (self.addresses.copy(), self.tensor, self.start, self.length, self.counts)
            addresses, *others = (_sent(column, device) for column in columns)
            self._copies = addresses, tuple(others[:3]), others[3]
        elif self._copied[0] != self.version:
            self._copies[0].copy_(_pinned(self.addresses.copy(), device), non_blocking=True)
        self._copied = self.version, self.built, device
        return self._copies

    def copies_on(self, device: torch.device) -> torch.Tensor:
        """Return `copies` as a tensor on `device`, copied when it is another array."""
        if self._copies_sent is None or self._copies_sent[0] is not self.copies:
            self._copies_sent = self.copies, _sent(self.copies, device)  # type: ignore[arg-type]
        return self._copies_sent[1]

    def _cut(self, chunk: int) -> None:
        """Cut the tensors into chunks of at most `chunk` elements, in the order of the list."""
        self.counts = counts = -(-self._sizes // chunk)
        self.tensor = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        within = np.arange(len(self.tensor), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        self.start = within * chunk
        self.length = np.minimum(chunk, self._sizes[self.tensor] - self.start)


def _pinned(column: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(column)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _sent(column: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = _pinned(column, device)
    return tensor.to(device, non_blocking=True) if device.type == "cuda" else tensor
