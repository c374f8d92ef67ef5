"""Tensors as stretches of memory: which one a tensor lies in, all of it, and what it held before it was written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def number(tensor: Tensor) -> int:
    """Return the number of the memory that a strided tensor lies in."""
    return tensor.untyped_storage()._cdata


def whole(tensor: Tensor) -> Tensor:
    """Return all of the memory that a tensor lies in, flat; several views may be written to."""
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return flat.set_(storage, 0, (storage.nbytes() // tensor.itemsize,), (1,))  # type: ignore[call-overload]


def stretch(tensor: Tensor) -> Tensor:
    """Return the memory from the first to the last element of a strided tensor, flat.

    Torch does not write to a tensor whose elements share memory, as an expanded one; it does to this.

    Example:
        >>> stretch(torch.ones(1, 3).expand(4, 3)).shape
        torch.Size([3])
    """
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((reach + 1 if tensor.numel() else 0,), (1,))


def copied(tensor: Tensor) -> Tensor:
    """Return a copy of a strided tensor that has its strides, whatever they are."""
    copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    stretch(copy).copy_(stretch(tensor))
    return copy


def memory_of(modules: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    """The strided tensors that are parameters, buffers or other attributes of modules."""
    for m in dict.fromkeys(m for module in modules for m in module.modules()):
        for value in (*m._parameters.values(), *m._buffers.values(), *vars(m).values()):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                yield value


class Overwritten:
    """Memory that is written to, as it was before.

    Example:
        >>> tensor, before = torch.zeros(2), Overwritten()
        >>> before.keep(tensor)
        >>> _ = tensor.add_(1)
        >>> before.restore()
        >>> tensor
        tensor([0., 0.])
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, tensor: Tensor) -> None:
        """Note what the memory of a strided tensor holds, once."""
        if number(tensor) not in self._before:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            self._before[number(tensor)] = flat, flat.clone()

    def restore(self) -> None:
        """Let the memory hold what it did."""
        for flat, before in self._before.values():
            flat.copy_(before)
