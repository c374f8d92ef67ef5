"""From readings to findings: all rules at every reading, each fault named once.

A rule is a function of what has been read so far that yields what it finds *now*. What it found is one finding for as
long as it lasts, from its first step to its last one: it is new once, and a rule that falls silent and speaks again
continues it, so that noise around a threshold does not make a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from torch_bp.diagnostics import (
    data_rules,
    gradient_rules,
    loss_rules,
    nonfinite_rules,
    rate_rules,
    signal_rules,
    unit_rules,
)
from torch_bp.diagnostics.finding import Finding, gravest_first
from torch_bp.diagnostics.history import History
from torch_bp.diagnostics.reading import Reading
from torch_bp.diagnostics.thresholds import DEFAULT, Thresholds

Rule = Callable[[History, Thresholds], Iterator[Finding]]

# Each with the readings in a row in which it must find something before it counts.
RULES: dict[Rule, int] = {
    nonfinite_rules.nonfinite: 1,
    data_rules.unscaled_input: 1,
    data_rules.output_of_loss: 1,
    data_rules.not_shuffled: 1,
    gradient_rules.wrong_gradient: 1,
    gradient_rules.not_zeroed: 1,
    gradient_rules.not_in_optimizer: 1,
    gradient_rules.unused_parameters: 1,
    signal_rules.initialization: 1,
    loss_rules.initial_loss: 1,
    signal_rules.vanishing: 1,
    signal_rules.exploding: 1,
    unit_rules.dead_units: 1,
    unit_rules.saturation: 1,
    gradient_rules.zero_gradient: 2,
    rate_rules.rate_too_high: 1,
    rate_rules.rate_too_low: 1,
    rate_rules.divergence: 1,
    rate_rules.clipped_always: 1,
    loss_rules.not_falling: 3,
    loss_rules.unrelated_labels: 1,
    loss_rules.plateau: 10,
    loss_rules.overfitting: 1,
}

REFUSED: dict[Rule, int] = {nonfinite_rules.nonfinite: 1}  # of a batch that was not taken: the others tell of training

# What follows from a fault is not a fault of its own while that is there.
FOLLOWS: dict[str, tuple[str, ...]] = {
    "NaN or Inf": ("divergence", "rate too high", "loss does not fall", "plateau", "exploding gradient"),
    "bad initialization": ("no gradient", "loss does not fall"),
    "unscaled input": ("bad initialization",),
    "dead units": ("vanishing gradient", "rate too low"),
    "vanishing gradient": ("rate too low", "plateau"),
    "wrong gradient": ("divergence", "plateau"),
    "divergence": ("loss does not fall", "plateau"),
    "labels unrelated to inputs": ("loss does not fall", "plateau"),
}
# These are of the whole model, whichever layer it is that shows them most.
_OF_MODEL = ("vanishing gradient", "exploding gradient", "bad initialization")
# Each of these keeps a loss at that of chance.
_EXPLAINS_CHANCE = (
    "NaN or Inf",
    "bad initialization",
    "dead units",
    "saturation",
    "vanishing gradient",
    "rate too low",
    "rate too high",
    "divergence",
    "no gradient",
    "not in the optimizer",
    "data not shuffled",
    "softmax before its loss",
    "gradient not zeroed",
    "unscaled input",
    "exploding gradient",
    "unused parameters",
    "wrong gradient",
)
_CHANCE = ("labels unrelated to inputs", "loss does not fall")
FOLLOWS |= {kind: (*FOLLOWS.get(kind, ()), *_CHANCE) for kind in _EXPLAINS_CHANCE}


class Diagnosis:
    """Findings of a run that goes on: `update` at every reading.

    Args:
        thresholds: limits of the rules.
        failed: told the name of a rule that has raised, and what; the others go on. Default: it is raised.

    Attributes:
        findings: all so far, in the order in which they were found.

    Example:
        >>> diagnosis = Diagnosis()
        >>> [found.kind for found in diagnosis.update(Reading(0, loss=float("nan")))]
        ['NaN or Inf']
        >>> diagnosis.update(Reading(1, loss=float("nan")))  # nothing new
        []
        >>> diagnosis.findings[0].last_step
        1
    """

    def __init__(
        self, thresholds: Thresholds = DEFAULT, failed: Callable[[str, Exception], object] | None = None
    ) -> None:
        if not isinstance(thresholds, Thresholds):
            raise TypeError(f"Diagnosis: thresholds must be Thresholds, got {type(thresholds).__name__}.")
        self.thresholds, self._failed = thresholds, failed
        self._history = History()
        self._found: dict[tuple[str, str], Finding] = {}
        self._in_a_row: dict[tuple[str, str], int] = {}

    @property
    def findings(self) -> list[Finding]:
        return list(self._found.values())

    def follows(self, step: int) -> bool:
        """Whether a reading of this step may be the next."""
        return self._history.follows(step)

    def update(self, reading: Reading) -> list[Finding]:
        """Take one reading more, and return what is found for the first time.

        Args:
            reading: of a later step than the one before, or the same if that one was refused.

        Raises:
            ValueError: its step is not after that of the reading before.
        """
        if not self._history.follows(reading.step):
            raise ValueError(
                f"Diagnosis: step must be above {self._history.now.step}, that of the reading before, got "
                f"{reading.step}. Use a new Diagnosis for another run."
            )
        self._history.add(reading)
        before, spoken = self._in_a_row, dict[tuple[str, str], int]()
        new = []
        for rule, wanted in (REFUSED if reading.refused else RULES).items():
            for found in self._apply(rule):
                key = (found.kind, "" if found.kind in _OF_MODEL else found.layer)
                spoken[key] = self._in_a_row.get(key, 0) + 1
                if spoken[key] >= wanted and self._take(key, found):
                    new.append(self._found[key])
        self._in_a_row = before if reading.refused else spoken
        return new

    def _apply(self, rule: Rule) -> list[Finding]:
        try:
            return list(rule(self._history, self.thresholds))
        except Exception as error:
            if self._failed is None:
                raise
            self._failed(rule.__name__, error)
            return []

    def _take(self, key: tuple[str, str], found: Finding) -> bool:
        """Keep a finding, or continue the one there is. True if it is new."""
        if key in self._found:
            known = self._found[key]
            self._found[key] = replace(known, last_step=found.last_step)
            if found.layer == known.layer:  # a number and its words belong together
                self._found[key] = replace(self._found[key], value=found.value, cause=found.cause)
            return False
        if any(found.kind in FOLLOWS.get(kind, ()) for kind, _ in self._found if kind != found.kind):
            return False
        self._found[key] = found
        return True


def diagnose(readings: Iterable[Reading], thresholds: Thresholds = DEFAULT) -> list[Finding]:
    """What is wrong with a training run, the gravest first; an empty list if nothing is.

    Args:
        readings: of one run, in the order of their steps.
        thresholds: limits of the rules.

    Raises:
        ValueError: the steps are not in order.

    Example:
        >>> for found in diagnose([Reading(0, loss=2.3), Reading(1, loss=float("nan"))]):
        ...     print(found.step, found.kind, found.cause)
        1 NaN or Inf the loss is not finite while all activations are: its targets, or a logarithm of 0
    """
    diagnosis = Diagnosis(thresholds)
    for reading in readings:
        diagnosis.update(reading)
    return gravest_first(diagnosis.findings)
