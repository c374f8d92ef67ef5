"""Findings while a run goes on: said once, when they are first found, and shown as a list."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch_bp.diagnostics.diagnosis import Diagnosis
from torch_bp.diagnostics.finding import Finding, gravest_first, markdown
from torch_bp.diagnostics.reading import Reading
from torch_bp.diagnostics.thresholds import DEFAULT, Thresholds

TAG = "verdicts"
_logger = logging.getLogger("torch_bp")


class Verdicts:
    """Called with each reading: logs each finding once, as a warning of the logger "torch_bp".

    `watch(..., diagnose=True)` has one. Nothing that goes wrong here stops a training: a rule
    that raises is named once.

    Args:
        write: called with a tag, the list of all findings in Markdown, and the step, when there is a new one, as
            `SummaryWriter.add_text` is. Default: none.
        silent: do not log.
        thresholds: limits of the rules.

    Example:
        >>> verdicts = Verdicts(silent=True)
        >>> verdicts(Reading(0, loss=2.3))
        >>> verdicts(Reading(1, loss=float("nan")))
        >>> [(found.step, found.kind) for found in verdicts.findings]
        [(1, 'NaN or Inf')]
    """

    def __init__(
        self,
        write: Callable[[str, str, int], object] | None = None,
        *,
        silent: bool = False,
        thresholds: Thresholds = DEFAULT,
    ) -> None:
        if write is not None and not callable(write):
            raise TypeError(f"Verdicts: write must be callable, got {type(write).__name__}. Pass writer.add_text.")
        self._write, self._silent, self._thresholds = write, silent, thresholds
        self._broken: set[str] = set()  # rules that have failed
        self._diagnosis, self._step = Diagnosis(thresholds, self._failed), -1

    @property
    def findings(self) -> list[Finding]:
        """All so far, the gravest first."""
        return gravest_first(self._diagnosis.findings)

    def __call__(self, reading: Reading) -> None:
        if not self._diagnosis.follows(reading.step):  # the run went back to a checkpoint: another run begins
            self._diagnosis = Diagnosis(self._thresholds, self._failed)
        self._step = reading.step
        new = self._diagnosis.update(reading)
        for found in new if not self._silent else ():
            _logger.warning("%s", found)
        if new and self._write is not None:
            self._write(TAG, markdown(self.findings), reading.step)

    def close(self) -> None:
        """Write all findings as they stand at the end."""
        if self._step >= 0 and self._write is not None:
            self._write(TAG, markdown(self.findings), self._step)

    def _failed(self, rule: str, error: Exception) -> None:
        if rule not in self._broken:
            self._broken.add(rule)
            _logger.warning(
                "diagnosis: the rule %s has failed at step %d and finds nothing there; training and the other rules go "
                "on. %s: %s",
                rule,
                self._step,
                type(error).__name__,
                error,
                exc_info=error,
            )
