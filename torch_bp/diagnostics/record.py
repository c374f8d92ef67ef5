"""What one step has left on the device, as one vector that is copied to the host without waiting for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_OF_NUMPY = {torch.float32, torch.float64}


@dataclass
class Record:
    """Named tensors of one step on their way to the host.

    Attributes:
        step: optimizer steps before it.
        facts: what is known on the host already.
    """

    step: int
    facts: dict[str, Any] = field(default_factory=dict)
    _shapes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    _vector: Tensor | None = None
    _event: Any = None

    def take(self, named: Mapping[str, Tensor]) -> None:
        """Start the one copy of these tensors."""
        self._shapes = [(name, tuple(t.shape)) for name, t in named.items()]
        tensors = named.values()
        device = next(iter(tensors)).device
        if device.type == "cpu" and all(t.is_cpu and t.dtype in _OF_NUMPY for t in tensors):  # as `cat`, in less time
            room = np.empty(sum(map(Tensor.numel, tensors)))
            at = 0
            for tensor in tensors:
                values = (tensor.detach() if tensor.requires_grad else tensor).numpy()
                room[at : at + values.size] = values.reshape(-1)
                at += values.size
            vector = torch.from_numpy(room)
        else:
            # small, and from memory that is not pinned: staged as it is sent
            vector = torch.cat([t.detach().reshape(-1).to(device, torch.float64, non_blocking=True) for t in tensors])
        if device.type == "cuda":
            host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            host.copy_(vector, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            vector = host
        self._vector = vector

    @property
    def ready(self) -> bool:
        """Whether `numbers` would not wait."""
        return self._event is None or self._event.query()

    @property
    def heard(self) -> bool:
        """Whether there were signals at all; `nonfinite` says where they lie."""
        return bool(self._signals()[:, 0].any())

    @property
    def nonfinite(self) -> bool:
        """Whether a signal holds a NaN or an infinity: the first of the tensors, whose last two columns count them."""
        return bool(self._signals()[:, 3:].any())

    def _signals(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        assert self._vector is not None
        rows, columns = self._shapes[0][1]
        return self._vector.numpy()[: rows * columns].reshape(rows, columns)

    def numbers(self) -> dict[str, Any]:
        """The tensors by name, on the host."""
        if self._event is not None:
            self._event.synchronize()
        assert self._vector is not None
        found: dict[str, Any] = {}
        at = 0
        for name, shape in self._shapes:
            length = math.prod(shape)
            found[name] = self._vector[at : at + length].view(shape).cpu()
            at += length
        return found
