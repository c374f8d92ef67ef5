"""A few snapshots of a run, of which some are known to be good."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_bp.diagnostics.run_state import RunState, Snapshot

_logger = logging.getLogger("torch_bp")


@dataclass
class Slot:
    """A snapshot and what is known of it.

    Attributes:
        position: after how many steps of the run it was taken.
        notes: what its owner wants back with it.
        healthy: how many healthy steps have followed.
        first: it is where the run began, and there is nothing better to go back to.
    """

    snapshot: Snapshot
    position: int
    notes: Any = None
    first: bool = False
    healthy: int = field(default=0)


class SnapshotRing:
    """Takes snapshots every few steps, each in the memory of the oldest.

    Args:
        state: of the run.
        every: steps from one snapshot to the next.
        keep: how many there are, at least 2.
        trust: how many healthy steps must follow a snapshot before it is good; at most (keep - 1) * every, or none
            would live to be good.
        storage: of `Snapshot`.
    """

    def __init__(self, state: RunState, every: int, keep: int, trust: int, storage: str) -> None:
        self.state, self.every, self.keep, self.trust = state, every, keep, trust
        self._storage = storage
        self._slots: list[Slot] = []  # the oldest first
        self._free: list[Snapshot] = []
        self._said = False  # that there is no memory for more

    def __len__(self) -> int:
        return len(self._slots)

    def clear(self) -> None:
        """Drop all snapshots; their memory stays for the next ones."""
        self._free += [slot.snapshot for slot in self._slots]
        self._slots = []

    def healthy(self) -> None:
        """Note a healthy step."""
        for slot in self._slots:
            slot.healthy += 1

    def doubt(self) -> None:
        """Take back that the last step was healthy."""
        for slot in self._slots:
            slot.healthy -= 1

    def due(self, position: int) -> bool:
        """Whether it is time for the next snapshot."""
        return not self._slots or position - self._slots[-1].position >= self.every

    def take(self, position: int, notes: Any) -> None:
        """Take a snapshot; RuntimeError if parameters were added, removed or replaced since the last.

        Where there is no memory for one more than there are, those that there are stay.
        """
        first = not self._slots
        if not first:
            self._slots[-1].snapshot.check(self.state)
        if len(self._slots) >= self.keep:
            self._free.append(self._slots.pop(0).snapshot)
        snapshot = self._free.pop() if self._free else Snapshot(self._storage)
        try:
            snapshot.take(self.state)
        except (MemoryError, RuntimeError) as error:
            if first or not _no_memory(error):
                raise
            if not self._said:
                self._said = True
                _logger.warning(
                    "DivergenceGuard: there is no memory for another snapshot; the run goes on, and can go back to the "
                    "%d that there are. storage='cpu' keeps them on the host, a lower keep takes fewer. %s",
                    len(self._slots),
                    error,
                )
            return
        self._slots.append(Slot(snapshot, position, notes, first))

    def good(self) -> list[Slot]:
        """Those that can be trusted, the newest first; never none after the first snapshot."""
        return [slot for slot in reversed(self._slots) if slot.first or slot.healthy >= self.trust]

    def go_back(self, slot: Slot) -> None:
        """Restore a snapshot, and forget those that were taken after it."""
        slot.snapshot.restore(self.state)
        for each in [each for each in self._slots if each.position > slot.position]:
            self._slots.remove(each)
            self._free.append(each.snapshot)

    def bytes(self) -> dict[str, int]:
        """Memory of all snapshots, by device."""
        sizes: dict[str, int] = {}
        for snapshot in [*self._free, *(slot.snapshot for slot in self._slots)]:
            for device, size in snapshot.bytes().items():
                sizes[device] = sizes.get(device, 0) + size
        return sizes


def _no_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
