"""The readings that rules look at: the first ones, and as many of the latest as any rule needs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from torch_bp.diagnostics.reading import LayerReading, Reading

FIRST, LATEST = 16, 512  # readings that are kept of the start and of the end
EARLY = 5  # steps
UNFOLDING = 50  # steps in which what began as 0 takes part

# Activations that are flat at both ends; all others that can be flat are rectifiers.
SATURATING = ("Sigmoid", "Tanh", "Softsign", "Hardtanh", "Hardsigmoid", "LogSigmoid", "Tanhshrink")
NORMALIZING = ("Softmax", "LogSoftmax", "Softmin")


class History:
    """Readings in the order of their steps. `now` is the latest; one of a batch that was refused is gone after that.

    Example:
        >>> history = History()
        >>> for step in range(40):
        ...     history.add(Reading(step, loss=1 / (1 + step)))
        >>> history.first.step, history.now.step, history.span, history.median_loss(-3)
        (0, 39, 39, 0.02564102564102564)
    """

    def __init__(self, readings: Sequence[Reading] = ()) -> None:
        self.start: list[Reading] = []
        self.latest: list[Reading] = []
        self.best_loss = math.inf  # least median of three losses in a row
        self.validations: list[tuple[int, float]] = []
        self.top_lr = 0.0
        for reading in readings:
            self.add(reading)

    def add(self, reading: Reading) -> None:
        """Take one more."""
        if self.latest and self.now.refused:
            refused = self.latest.pop()
            if self.start[-1] is refused:
                self.start.pop()
        if len(self.start) < FIRST:
            self.start.append(reading)
        self.latest.append(reading)
        if len(self.latest) > 2 * LATEST:
            del self.latest[:LATEST]
        if reading.validation_loss is not None:
            self.validations = [*self.validations, (reading.step, reading.validation_loss)][-LATEST:]
        if len(self.losses(-3)) == 3:
            self.best_loss = min(self.best_loss, self.median_loss(-3))
        self.top_lr = max(self.top_lr, *reading.lr, 0.0)

    @property
    def now(self) -> Reading:
        return self.latest[-1]

    @property
    def first(self) -> Reading:
        return self.start[0]

    @property
    def span(self) -> int:
        """Steps since the first reading."""
        return self.now.step - self.first.step

    @property
    def early(self) -> bool:
        """True in the first steps, in which it is how the run began that is to blame, not what it has done since."""
        return self.span < EARLY

    @property
    def at_start(self) -> bool:
        """True at the first reading, if it is of the first step of the run."""
        return len(self.latest) == 1 and self.now.step == 0

    def losses(self, count: int) -> list[float]:
        """Finite losses of the first `count` readings, or of the latest -`count`."""
        chosen = self.start[:count] if count > 0 else self.latest[count:]
        return [r.loss for r in chosen if r.loss is not None and math.isfinite(r.loss)]

    def follows(self, step: int) -> bool:
        """Whether a reading of this step may be the next."""
        return not self.latest or step > self.now.step or (bool(self.now.refused) and step == self.now.step)

    def losses_since(self, step: int) -> list[float]:
        """Finite losses of the kept readings at `step` or later."""
        return [r.loss for r in self.latest if r.step >= step and r.loss is not None and math.isfinite(r.loss)]

    def median_loss(self, count: int) -> float:
        """Median of these losses; NaN without any."""
        return statistics.median(self.losses(count) or [math.nan])


def signals(reading: Reading) -> list[LayerReading]:
    """Layers whose error signal was measured and is finite, in the order of the forward pass."""
    return [x for x in reading.layers.values() if x.signal_norm is not None and math.isfinite(x.signal_norm)]


def unfolding(history: History) -> bool:
    """Whether weights that began as 0, as those of a head or at the end of a residual branch do, have just left it."""
    if history.first.step or history.span > UNFOLDING:
        return False
    return any(x.weight_norm == 0 and x.grad_norm for x in history.first.layers.values())


def hidden(reading: Reading) -> Iterator[LayerReading]:
    """All layers with an activation that is not the softmax of the output."""
    layers = list(reading.layers.values())
    return (x for x in layers if x.activation is not None and x.activation not in NORMALIZING)


def classes(reading: Reading) -> int | None:
    """How many classes a classifier tells apart: the width of the last layer, where labels are class indices."""
    if reading.labels is None or not reading.layers:
        return None
    units = list(reading.layers.values())[-1].units
    return units if units is not None and units > 1 else None


def update_ratios(reading: Reading) -> dict[str, float]:
    """Those that are measured and finite, by layer."""
    ratios = {name: layer.update_ratio for name, layer in reading.layers.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None and math.isfinite(ratio)}
