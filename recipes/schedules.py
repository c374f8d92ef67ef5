"""Factors of one's own for `LambdaLR` and `MultiplicativeLR`: objects, which a YAML can name and a state can hold."""

import math


class Wave:
    """cos(pi t / period)^2."""

    def __init__(self, period: float) -> None:
        self.period = period

    def __call__(self, t: int) -> float:
        return math.cos(math.pi * t / self.period) ** 2


class Shrink:
    """0.98 before step `at`, 0.9 from then on."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, t: int) -> float:
        return 0.98 if t < self.at else 0.9
