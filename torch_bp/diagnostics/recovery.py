"""Where a run goes back to, how often, and with which rate it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from torch_bp.diagnostics.rate import Ramp, cut
from torch_bp.diagnostics.snapshot_ring import Slot, SnapshotRing


class Recovery:
    """Counts healthy steps, takes snapshots, goes back to them, and cuts the rates.

    Args:
        ring: the snapshots.
        optimizers, schedulers: whose rates are cut.
        factor, retries, cooldown: of `DivergenceGuard`.

    Attributes:
        position: steps on the way of the run, without those that were taken back.
    """

    _SAVED = ("position", "_failed", "_used", "_cut", "_begin", "_ago")

    def __init__(
        self,
        ring: SnapshotRing,
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[Any],
        factor: float,
        retries: int,
        cooldown: int,
    ) -> None:
        self._ring, self._optimizers, self._schedulers = ring, optimizers, schedulers
        self._factor, self._retries, self._cooldown = factor, retries, cooldown
        self._ramp = Ramp(optimizers)
        self.position = 0
        self._failed, self._used = -1, 0  # where the run failed last, and how often in a row
        self._last: Slot | None = None  # that it went back to
        self._cut = 1.0  # of the rates, for good
        self._begin, self._ago = 1.0, 0  # the factor after the last return, and how many steps ago that was

    @property
    def factor(self) -> float:
        """By what the rates are multiplied now, in all."""
        return self._ramp.factor if self._cooldown else self._cut

    def start(self, notes: Callable[[], Any]) -> None:
        """Take the first snapshot, if there is none."""
        if not len(self._ring):
            self._take(notes)

    def go_on(self, notes: Callable[[], Any]) -> None:
        """Note a healthy step; `notes` gives what a snapshot should bring back besides."""
        self.position += 1
        self._ring.healthy()
        if self._used and self._ring.good()[0].position > self._failed:
            self._used, self._failed, self._last = 0, -1, None
        if self._ramp.factor != 1:
            self._ago += 1
            self._warm()
        if self._ring.due(self.position):
            self._take(notes)

    def go_back(self, since: int) -> tuple[int, Any, bool]:
        """Restore the newest good snapshot from at least `since` steps ago, or else the oldest; cut the rates.

        One from which the run has failed again before it was past the place of the failure is not taken once more, as
        long as there is an older one.

        Returns:
            The position of the snapshot, the notes that it was taken with, and whether there are no retries left; the
            rates are then not cut.
        """
        good = self._ring.good()
        if self._last is not None and len(good) > 1:
            good = [slot for slot in good if slot.position < self._last.position] or good[-1:]
        slot = next((slot for slot in good if slot.position <= self.position - since), good[-1])
        self._used, self._failed = self._used + 1, max(self._failed, self.position)
        self._ring.go_back(slot)
        self.position, self._last = slot.position, slot
        before, notes = slot.notes  # what the rates were cut to
        gives_up = self._used > self._retries
        if self._cooldown:
            self._begin, self._ago = self._factor**self._used, 0
            self._warm()
        else:
            self._cut *= 1.0 if gives_up else self._factor
            cut(self._optimizers, self._schedulers, self._cut / before)
        if gives_up:
            self._used = 0  # a caller who goes on all the same has the retries again
        return slot.position, notes, gives_up

    def reset(self) -> None:
        """Drop the snapshots; the next one is the first."""
        self._ring.clear()
        self._last, self._used, self._failed = None, 0, -1

    def state_dict(self) -> dict[str, Any]:
        """The numbers, without the snapshots."""
        return {name: getattr(self, name) for name in self._SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the numbers of another; the next snapshot is the first."""
        self._ring.clear()
        self._last = None
        for name in self._SAVED:
            setattr(self, name, state[name])
        self._warm()

    def _take(self, notes: Callable[[], Any]) -> None:
        self._ring.take(self.position, (self._cut, notes()))

    def _warm(self) -> None:
        """Set by what rates are multiplied while they come back."""
        share = self._ago / self._cooldown if self._ago < self._cooldown else 1.0
        self._ramp.factor = self._begin + (1 - self._begin) * share if share < 1 else 1.0
