"""A table of addresses for one call over lists of tensors, kept between calls and cheaply checked again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from torch_bp.kernels import plain

_Tensor = torch.Tensor
_dtype_of = _Tensor.dtype.__get__  # type: ignore[attr-defined]
_layout_of, _device_of = _Tensor.layout.__get__, _Tensor.device.__get__  # type: ignore[attr-defined]
_shape_of = _Tensor.shape.__get__  # type: ignore[attr-defined]


class Table:
    """Addresses, sizes and chunks of `rows` lists of equally many tensors: `addresses[r, k]` is tensor k of list r.

    `refresh` is called before each use. Lists that are written are expected to be the same Python lists as last time:
    then their addresses alone are compared. Lists that are only read (gradients, new at each step) are checked whole
    against the dtype, shapes and strides of the others, and are not kept alive.
    """

    def __init__(self) -> None:
        self.lists: list[Sequence[torch.Tensor] | None] = []  # those that are written
        self.addresses = np.empty((0, 0), np.int64)
        self.tensor = self.start = self.length = np.empty(0, np.int64)
        self.elements = 0
        self.dtype = torch.float32
        self.written: list[torch.Tensor] = []
        self.version = 0  # grows whenever an address changes: a device copy of the table knows when it is stale
        self._chunk = 0
        self._inference = False
        self._copied: tuple[int, torch.device] | None = None

    def refresh(self, lists: tuple[Sequence[torch.Tensor], ...], writes: Sequence[bool], chunk: int) -> bool:
        """Bring the table up to date; False if these tensors are not for a kernel."""
        try:
            if self._inference and not torch.is_inference_mode_enabled():
                self.lists = []
            if chunk == self._chunk and any(row is not None for row in self.lists) and self._same(lists):
                return True
            self.lists, self._chunk = [], chunk
            return self._build(lists, writes, chunk)
        except RuntimeError:  # a tensor that has no address
            self.lists = []
            return False

    def _same(self, lists: tuple[Sequence[torch.Tensor], ...]) -> bool:
        """True if nothing but the addresses of lists that are only read has changed; those are updated."""
        if len(lists) != len(self.lists):
            return False
        count = len(self._shapes)
        for row, (now, before) in enumerate(zip(lists, self.lists)):
            if before is None:
                if not self._matches(now):
                    return False
            elif now is not before or (row == 0 and not self._shaped(now)):
                return False  # the first list, of parameters, may have got other shapes at the same addresses
            addresses = np.fromiter(map(_Tensor.data_ptr, now), np.int64, count)
            if not np.array_equal(addresses, self.addresses[row]):
                if before is not None or not self._filled(addresses):
                    return False
                self.addresses[row] = addresses
                self.version += 1
        return True

    def _matches(self, tensors: Sequence[torch.Tensor]) -> bool:
        """True if `tensors` are plain and of the dtype, device, shapes and strides of the first list."""
        return (
            len(tensors) == len(self._shapes)
            and plain.PLAIN_TYPES.issuperset(map(type, tensors))
            and set(map(_dtype_of, tensors)) == {self.dtype}
            and set(map(_layout_of, tensors)) == {torch.strided}
            and set(map(_device_of, tensors)) == {self._device}
            and self._shaped(tensors)
            and not any(map(_Tensor.is_neg, tensors))
        )

    def _shaped(self, tensors: Sequence[torch.Tensor]) -> bool:
        return list(map(_shape_of, tensors)) == self._shapes and list(map(_Tensor.stride, tensors)) == self._strides

    def _filled(self, addresses: np.ndarray) -> bool:
        """True if every tensor with elements has memory (zero tensors and freed storages have none)."""
        return bool(np.all((addresses != 0) | (self._sizes == 0)))

    def _build(self, lists: tuple[Sequence[torch.Tensor], ...], writes: Sequence[bool], chunk: int) -> bool:
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
        self.lists = [row if w else None for row, w in zip(lists, writes)]
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
