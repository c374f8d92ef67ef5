"""What became of steps that a device does while the host goes on: told when the host next looks, without waiting."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor

TAKEN, NOT_FINITE, OVERFLOWED = 0, 1, 2  # what became of a step; the last for the scale of its loss alone


class Outcomes:
    """Whether steps on a device were finite, read once the device has got there.

    Args:
        device: where the steps run.
        room: how many may be on their way before the host waits.
        held: bytes of what is said about them, beyond which the host waits for all but the last.
    """

    def __init__(self, device: torch.device, room: int = 32, held: int = 2**28) -> None:
        self._held, self._bytes = held, 0
        self._cuda = device.type == "cuda"
        self._slots = [torch.zeros((), dtype=torch.int32, pin_memory=self._cuda) for _ in range(room)]
        self._waiting: collections.deque[tuple[Any, Tensor, Any, int]] = collections.deque()

    def note(self, bad: Tensor, about: Any, size: int = 0) -> None:
        """Send for `bad`, an int32 on the device: TAKEN, NOT_FINITE or OVERFLOWED.

        Where there is no room, `found` waits for the oldest: call it before.

        Args:
            bad: on the device.
            about: what `found` is to return.
            size: bytes of memory that `about` keeps.
        """
        slot = self._slots.pop()
        slot.copy_(bad, non_blocking=True)
        event = None
        if self._cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(bad.device))
        self._waiting.append((event, slot, about, size))
        self._bytes += size

    def found(self, wait: bool = False) -> list[tuple[int, Any]]:
        """Return what became of steps that were not taken and what was said about them, where the device is done.

        Args:
            wait: for all of them.
        """
        bad = []
        while self._waiting:
            event, slot, about, size = self._waiting[0]
            if event is not None and not event.query():
                crowded = not self._slots or (self._bytes > self._held and len(self._waiting) > 1)
                if not (wait or crowded):
                    break
                event.synchronize()
            self._waiting.popleft()
            self._bytes -= size
            self._slots.append(slot)
            if int(slot) != TAKEN:
                bad.append((int(slot), about))
        return bad
