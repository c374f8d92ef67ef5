"""Numbers on a CUDA device that the host reads a step later, when they are there without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def asynchronous(loss: Tensor) -> bool:
    """Whether reading this loss at once would make the host wait."""
    return loss.is_cuda


class Late:
    """A few numbers on their way to the host.

    Args:
        numbers: tensors of one element on one device.

    Example:
        >>> Late([torch.tensor(1.0), torch.tensor(True)]).read()
        [1.0, 1.0]
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        packed = torch.stack([number.detach().reshape(()).double() for number in numbers])
        self._arrived: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = packed

    def read(self) -> list[float]:
        """The numbers; a step later the device has long passed this place."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()
