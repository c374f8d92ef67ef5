"""Findings while a run goes on: said once, when they are first found, and shown as a table."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch_bp.diagnostics.circumstances import Circumstances
from torch_bp.diagnostics.diagnosis import Diagnosis
from torch_bp.diagnostics.finding import Finding, gravest_first, markdown
from torch_bp.diagnostics.reading import Reading
from torch_bp.diagnostics.thresholds import DEFAULT, Thresholds

TAG = "verdicts"
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_log = logging.getLogger("torch_bp")


class Verdicts:
    """Called with each reading, as `on_reading` of `watch`: logs each finding once, to the logger "torch_bp".

    Args:
        write: called with a tag and a Markdown table of all findings when there is a new one, such as `monitor.text`
            or what calls `SummaryWriter.add_text`. Default: none.
        circumstances: what listens to the first steps, for faults of the loop itself: gradients that are not zeroed,
            parameters that are not used, a loss that does not fit the output.
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
        write: Callable[[str, str], object] | None = None,
        *,
        circumstances: Circumstances | None = None,
        silent: bool = False,
        thresholds: Thresholds = DEFAULT,
    ) -> None:
        if write is not None and not callable(write):
            raise TypeError(f"Verdicts: write must be callable, got {type(write).__name__}. Pass monitor.text.")
        self._write, self._silent, self._thresholds = write, silent, thresholds
        self._facts = circumstances.facts if circumstances is not None else {}
        self._diagnosis, self._step = Diagnosis(thresholds), -1

    @property
    def findings(self) -> list[Finding]:
        """All so far, the gravest first."""
        return gravest_first(self._diagnosis.findings)

    def __call__(self, reading: Reading) -> None:
        if reading.step <= self._step:  # the run went back to a checkpoint: another run begins
            self._diagnosis = Diagnosis(self._thresholds)
        self._step = reading.step
        new = self._diagnosis.update(reading, self._facts.get(reading.step))
        for found in new if not self._silent else ():
            _log.log(_LEVELS[found.severity], "%s", found)
        if new and self._write is not None:
            self._write(TAG, markdown(self.findings))
