"""Which steps are recorded: as many as were asked for, unless that costs more than it may."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque

_logger = logging.getLogger(__name__)
_WINDOW = 20  # steps of each sort that are compared
_ENOUGH = 3  # of each sort, for a first comparison
_START = 3  # steps that are not compared: they compile and allocate
_MARGIN = 1.5  # how far the distance must be from what is wanted to be changed


class Cadence:
    """Which steps are recorded: every n-th, and rarer while that costs more than the budget.

    The share of the monitor is what steps that are recorded take longer than the others, and what writing takes, over
    the steps from one record to the next. To have others, every second step at most is recorded as long as the share is
    not known, which is so for the first three records. From one record to the next the distance at most doubles: a
    disturbance in those three does not hide the run, and a short run is seen to its end, for a few records more.

    Args:
        every: distance of records in steps.
        budget: largest share of the time of training, 0.02 for 2 %; None records every n-th step whatever it costs.
    """

    def __init__(self, every: int, budget: float | None) -> None:
        self.every, self.budget = every, budget
        self.share: float | None = None
        self._asked = every
        self._recorded: deque[float] = deque(maxlen=_WINDOW)
        self._plain: deque[float] = deque(maxlen=_WINDOW)
        self._writing: deque[float] = deque(maxlen=_WINDOW)
        self._told = 0
        self._said = False
        self._growing = False  # towards a distance that has not been reached

    def records(self, step: int) -> bool:
        """Whether this step is recorded: a function of the step alone, as long as the distance stays."""
        every = self.every
        if self.budget is not None and self.share is None:
            every = max(every, 2)
        return step % every == 0

    @property
    def seconds(self) -> float | None:
        """How long a step takes that is not recorded."""
        return statistics.median(self._plain) if self._plain else None

    def tell(self, recorded: bool, seconds: float, writing: float) -> None:
        """How long a step has taken without writing, and writing besides, be it of an earlier record."""
        self._told += 1
        if self._told <= _START:
            return
        (self._recorded if recorded else self._plain).append(seconds)
        if recorded:
            self._writing.append(0.0)
        if self._writing:
            self._writing[-1] += writing
        if len(self._recorded) < _ENOUGH or len(self._plain) < _ENOUGH:
            return
        plain = statistics.median(self._plain)
        extra = statistics.median(self._recorded) - plain + statistics.fmean(self._writing)
        share = max(extra, 0.0) / plain if plain else 0.0  # of one record
        if self.budget is not None:
            self._adapt(max(self._asked, math.ceil(round(share / self.budget, 6))), share, recorded)
        self.share = share / self.every

    def _adapt(self, wanted: int, share: float, recorded: bool) -> None:
        margin = 1 if self.share is None or self._growing else _MARGIN
        rarer = wanted > self.every * margin
        if not rarer and wanted * _MARGIN >= self.every:
            self._growing = False
            return
        if not rarer:
            self.every, self._growing = wanted, False
            return
        if not self._said:
            self._said = True
            _logger.warning(
                "watch: a recorded step takes %.3g times as long as others: records get rarer, towards one step in %d "
                "instead of one in %d, to stay within %.3g %% of the time; budget=None records as told, a lower level "
                "costs less.",
                1 + share,
                wanted,
                self.every,
                100 * self.budget,  # type: ignore[operator]
            )
        self._growing = True
        if recorded:
            self.every = min(wanted, 2 * self.every)
