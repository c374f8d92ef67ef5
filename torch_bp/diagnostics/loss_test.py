"""When a loss tells that a run diverges: it is not finite, it has jumped, or it rises steadily.

All is judged by order statistics, which a few odd losses do not move. Let m be the median of the last `window` losses,
s = 1.4826 median |loss - m| their spread (the standard deviation, if they are normal), M the largest of them, and
P = max(0, first - lowest) what the run has gained so far, between medians of `BLOCK` losses.

- *A spike* is a loss above

      m + max(spike * s, 3/2 (M - m), P / 2, |first| / 10),

  that is: far out by the spread, by the largest that was seen lately, and by what there is to lose. One batch may be
  odd, so it takes `patience` spikes in a row to be a divergence; a single one joins the window afterwards, so that what
  comes again and again, such as a hard batch among many easy ones, is no spike for long.
- *What was gained is lost*: the median of the last `BLOCK` losses is above the lowest ever by more than 4 `rise` times
  G = max(P, 4 s, |first| / 10), where s is now the spread of losses within their blocks.
- *A steady rise*: the medians of the last `BLOCKS` blocks of `BLOCK` losses rise by the test of Mann (1945) and
  Kendall: S = sum_{i<j} sign(x_j - x_i) is so large that an order by chance has it with a probability of at most 1e-5
  (the exact distribution, no normal one); they have risen by more than 2 s; and the last is above the lowest ever by
  more than `rise` times G.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCK, BLOCKS = 20, 10
_FEW = 16  # losses with which a spread begins to mean something
_NORMAL = 1.4826  # standard deviations in a median absolute deviation
_CHANCE = 1e-5
_ALL_LOST = 4  # times `rise`


@dataclass(frozen=True)
class Anomaly:
    """What is wrong with a step.

    Attributes:
        reason: of a loss "loss" (not finite), "spike" or "rise"; a `DivergenceGuard` has others, see `Event`.
        number: what was found: of a loss itself, or the median of the last block.
        threshold: what it should not have passed.
        certain: False for a spike that may be a single one.
        since: how many losses ago it may have begun.
    """

    reason: str
    number: float
    threshold: float
    certain: bool = True
    since: int = 0


class LossTest:
    """Judges losses one by one, in about 10 microseconds each.

    Args:
        spike: how many spreads above the median is far, > 0; None: not tested. Default 10.
        patience: how many spikes in a row are a divergence, at least 1. Default 2.
        rise: what part of the gain must be lost, > 0; None: not tested. Default 0.5.
        window: of the median and the spread, in losses, at least 16. Default 64.

    Example:
        >>> test = LossTest()
        >>> [test.judge(1.0 + 0.01 * (n % 7)) for n in range(100)] == [None] * 100
        True
        >>> test.judge(3.0).certain, test.judge(3.0).certain
        (False, True)
        >>> test.judge(float("nan")).reason
        'loss'
    """

    def __init__(
        self, spike: float | None = 10.0, patience: int = 2, rise: float | None = 0.5, window: int = 64
    ) -> None:
        self.spike, self.patience, self.rise, self.window = spike, patience, rise, window
        self._losses: deque[float] = deque(maxlen=window)
        self._held: list[float] = []  # spikes of which the next loss tells whether they are single
        self._block: list[float] = []
        self._blocks: deque[tuple[float, float]] = deque(maxlen=BLOCKS)  # median and spread of each
        self._first: float | None = None
        self._scale = math.inf  # what losses are compared with when they rise
        self._lowest, self._since = math.inf, 0  # the lowest median of a block, and how many losses ago it was

    def threshold(self) -> float:
        """Above which the next loss is a spike; infinite while there are too few, or none is tested."""
        if self.spike is None or len(self._losses) < _FEW:
            return math.inf
        median = statistics.median(self._losses)
        first = median if self._first is None else self._first
        gained = max(0.0, first - min(self._lowest, first))
        above = 1.5 * (max(self._losses) - median)
        room = max(self.spike * _spread(self._losses, median), above, gained / 2, abs(first) / 10)
        return median + room if room > 0 else math.inf

    def judge(self, loss: float, threshold: float | None = None) -> Anomaly | None:
        """Take a loss; return what is wrong with it, or None.

        Args:
            loss: the next one.
            threshold: what `threshold()` was before it, if that is known.
        """
        if not math.isfinite(loss):
            return Anomaly("loss", loss, math.inf)
        if len(self._losses) >= _FEW and loss > max(self._losses):  # else it is no spike
            threshold = self.threshold() if threshold is None else threshold
            if loss > threshold:
                self._held.append(loss)
                count = len(self._held)
                return Anomaly("spike", loss, threshold, count >= self.patience, count)
        for each in (*self._held, loss):
            self._losses.append(each)
            self._block.append(each)
        self._held.clear()
        self._since += 1
        if len(self._block) >= BLOCK:
            self._close_block()
            return self._rising()
        return self._lost(loss)

    def _close_block(self) -> None:
        median = statistics.median(self._block)
        self._blocks.append((median, _spread(self._block, median)))
        self._block.clear()
        if self._first is None:
            self._first = median
        if median <= self._lowest:
            self._lowest, self._since = median, 0
        gained = self._first - self._lowest
        self._scale = max(gained, 4 * statistics.median(each for _, each in self._blocks), abs(self._first) / 10)

    def _lost(self, loss: float) -> Anomaly | None:
        if self.rise is None or loss <= (threshold := self._lowest + _ALL_LOST * self.rise * self._scale):
            return None
        median = statistics.median(list(self._losses)[-BLOCK:])
        return Anomaly("rise", median, threshold, since=self._since) if median > threshold else None

    def _rising(self) -> Anomaly | None:
        medians = [median for median, _ in self._blocks]
        if self.rise is None or len(medians) < BLOCKS or concordance(medians) < _SIGNIFICANT:
            return None
        spread = statistics.median(each for _, each in self._blocks)
        threshold = self._lowest + self.rise * self._scale
        if medians[-1] <= threshold or medians[-1] - medians[0] <= 2 * spread:
            return None
        return Anomaly("rise", medians[-1], threshold, since=self._since)

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, in numbers."""
        return {
            "losses": list(self._losses),
            "held": list(self._held),
            "block": list(self._block),
            "blocks": list(self._blocks),
            "first": self._first,
            "scale": self._scale,
            "lowest": self._lowest,
            "since": self._since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` has returned."""
        self._losses = deque(state["losses"], maxlen=self.window)
        self._held, self._block = list(state["held"]), list(state["block"])
        self._blocks = deque(map(tuple, state["blocks"]), maxlen=BLOCKS)  # type: ignore[arg-type]
        self._first, self._scale = state["first"], state["scale"]
        self._lowest, self._since = state["lowest"], state["since"]


def _spread(losses: Sequence[float] | deque[float], median: float) -> float:
    return _NORMAL * statistics.median(abs(loss - median) for loss in losses)


def concordance(values: Sequence[float]) -> int:
    """Kendall's S: of all pairs, how many more rise than fall.

    Example:
        >>> concordance([1.0, 2.0, 3.0]), concordance([3.0, 2.0, 2.0])
        (3, -2)
    """
    pairs = ((a, b) for number, a in enumerate(values) for b in values[number + 1 :])
    return sum((b > a) - (b < a) for a, b in pairs)


def chance(count: int, at_least: int) -> float:
    """The probability that S of `count` values in an order by chance is at least this.

    A permutation with k inversions has S = count (count - 1) / 2 - 2 k; how many have k inversions are the coefficients
    of prod_{i=1}^{count} (1 + x + ... + x^(i - 1)).

    Example:
        >>> chance(3, 3) == 1 / 6, chance(3, 1) == 3 / 6
        (True, True)
    """
    inversions = [1]
    for i in range(2, count + 1):
        longer = [0] * (len(inversions) + i - 1)
        for k, ways in enumerate(inversions):
            for more in range(i):
                longer[k + more] += ways
        inversions = longer
    most = count * (count - 1) // 2
    return sum(ways for k, ways in enumerate(inversions) if most - 2 * k >= at_least) / math.factorial(count)


_SIGNIFICANT = next(s for s in range(BLOCKS * BLOCKS) if chance(BLOCKS, s) <= _CHANCE)
