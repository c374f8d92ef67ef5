"""A run or a checkpoint, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_bp.diagnostics.checkpoint import inspect_checkpoint, read_checkpoint
from torch_bp.diagnostics.diagnosis import diagnose
from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.run_directory import SUFFIX, read_run
from torch_bp.diagnostics.thresholds import DEFAULT, Thresholds


@dataclass(frozen=True)
class Examination:
    """What `examine` says: print it, or ask for `findings`.

    Attributes:
        path: what was examined.
        subject: what it is, in words.
        findings: the gravest first.
    """

    path: str
    subject: str
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        """True if nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        lines = [f"{found.severity}: {found}" for found in self.findings] or ["Nothing was found."]
        return "\n".join([f"{self.path}: {self.subject}", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        findings = [found.to_dict() for found in self.findings]
        return {"path": self.path, "subject": self.subject, "findings": findings}


def examine(path: str | Path, trust: bool = False, thresholds: Thresholds = DEFAULT) -> Examination:
    """Examine what a run has written, or a checkpoint.

    Args:
        path: a folder with readings or TensorBoard events, a `.jsonl` file of readings, or a file of `torch.save`.
        trust: load Python objects of a checkpoint too, which runs code that it names.
        thresholds: limits of the rules for runs.

    Raises:
        ValueError: it is neither, or not whole, or holds nothing.
        OSError: it cannot be read.
        ImportError: it has event files alone, and TensorBoard is not installed.

    Example:
        >>> import tempfile
        >>> from torch_bp.diagnostics import Reading, write_readings
        >>> folder = tempfile.TemporaryDirectory()
        >>> write_readings(f"{folder.name}/readings.jsonl", [Reading(0, loss=2.3), Reading(1, loss=float("inf"))])
        >>> found = examine(folder.name).findings
        >>> found[0].step, found[0].kind
        (1, 'NaN or Inf')
        >>> folder.cleanup()
    """
    place = Path(path)
    if place.is_file() and place.suffix != SUFFIX:
        checkpoint = read_checkpoint(place, trust)
        subject = f"checkpoint of step {checkpoint.step}, {len(checkpoint.weights)} tensors, "
        count = len(checkpoint.optimizers)
        subject += f"{count} optimizer{'s' * (count != 1)}"
        return Examination(str(path), subject, tuple(inspect_checkpoint(checkpoint)))
    readings = read_run(place)
    subject = f"run of {len(readings)} readings, steps {readings[0].step} to {readings[-1].step}"
    return Examination(str(path), subject, tuple(diagnose(readings, thresholds)))
