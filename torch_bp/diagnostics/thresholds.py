"""The limits beyond which a number is a finding, all in one place.

Those of numbers that vary from run to run were chosen on one part of some hundred healthy runs (tests/faults: seeds
below 1400, of other widths, depths, activations, optimizers, rates and batch sizes), beyond the most that these showed,
and checked on the other part (seeds from 2000), which had no part in choosing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Limits of the rules.

    Attributes:
        vanishing, exploding: error signal of a layer over that of the last, least and greatest.
        dead: share of a layer's rectifiers that no example of the batch activates.
        saturated: share of a layer's outputs where the derivative of a sigmoid or tanh is below 0.01.
        activation_ratio: between the greatest and least standard deviation of hidden activations at the start.
        weight_factor_low, weight_factor_high: what a layer's weights do to the error signal at the start.
        initial_loss: first loss of a classifier above that of chance, log(classes).
        update_ratio_low: |update| / |weights| in the start of a run, the greatest of all layers.
        update_ratio_high: the same; half of it where the loss rises, too.
        divergence: loss over its first value.
        stuck_steps, stuck_decrease: steps after which the loss must have fallen by this share.
        chance: loss over that of chance, log(classes).
        plateau_steps, plateau_decrease, plateau_level: steps in which the loss must fall by this share, while it is
            above this share of its first value.
        overfitting: validation loss over the least one so far, at three validations in a row.
        overfitting_rise: between these two, as a share of the first training loss.
        input_low, input_high: root of the mean square of the inputs.
        clip_rate, clip_steps: share of clipped steps, after so many steps.
    """

    vanishing: float = 1e-3
    exploding: float = 100.0
    dead: float = 0.85
    saturated: float = 0.6
    activation_ratio: float = 100.0
    weight_factor_low: float = 0.05
    weight_factor_high: float = 10.0
    initial_loss: float = 4.0
    update_ratio_low: float = 1e-4
    update_ratio_high: float = 1.0
    divergence: float = 4.0
    stuck_steps: int = 50
    stuck_decrease: float = 0.02
    chance: float = 0.98
    plateau_steps: int = 200
    plateau_decrease: float = 0.01
    plateau_level: float = 0.7
    overfitting: float = 1.2
    overfitting_rise: float = 0.1
    input_low: float = 0.01
    input_high: float = 4.0
    clip_rate: float = 0.95
    clip_steps: int = 100

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(
                    f"Thresholds: {each.name} must be a number above 0, got {value!r}. Leave it out for the default."
                )


DEFAULT = Thresholds()
