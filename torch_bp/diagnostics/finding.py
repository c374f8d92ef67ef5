"""One thing that is wrong with a training run: where, since when, by which number, why, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch_bp._json import plain

SEVERITIES = ("info", "warning", "error")  # from a remark to a run that cannot succeed


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule found.

    Attributes:
        kind: what it is: "vanishing", "dead units", "rate too high", ...
        layer: module path of the layer to blame; "" where it is the whole model, its data or its optimizer.
        step: optimizer step at which it was first seen.
        value: the number that was measured, at the last step it was seen.
        threshold: the limit which that number is beyond.
        cause: what is to blame, in words.
        cure: the one thing to do, with the flag or line of code that does it.
        severity: "info", "warning" or "error".
        last_step: the last step at which it was seen.
        action: what `torch_bp.try_cure` would try, such as "lr*0.1"; "" if the cure cannot be tried automatically.

    Example:
        >>> found = Finding("rate too low", "", 20, 2e-9, 1e-6, "the step is tiny", "raise lr 10 times", action="lr*10")
        >>> print(found)
        step 20: rate too low (2e-09, threshold 1e-06): the step is tiny - raise lr 10 times
        >>> Finding.from_json(found.to_json()) == found
        True
    """

    kind: str
    layer: str
    step: int
    value: float
    threshold: float
    cause: str
    cure: str
    severity: str = "warning"
    last_step: int = -1
    action: str = ""

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"Finding: severity must be one of {', '.join(SEVERITIES)}, got {self.severity!r}.")
        if self.last_step < self.step:
            object.__setattr__(self, "last_step", self.step)

    def __str__(self) -> str:
        where = f"layer {self.layer}, " if self.layer else ""
        numbers = f"{_short(self.value)}, threshold {_short(self.threshold)}"
        return f"{where}{_since(self)}: {self.kind} ({numbers}): {self.cause} - {self.cure}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers that JSON does not know as the text that `float` reads."""
        return plain(asdict(self))

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Finding:
        """The finding of such a line; names that a later version has added are ignored.

        Raises:
            ValueError: the line holds no finding.
        """
        try:
            values = json.loads(line)
            known = {each.name for each in fields(cls)}
            values = {name: value for name, value in values.items() if name in known}
            values |= {name: float(values[name]) for name in ("value", "threshold")}
            return cls(**values)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"Finding: line must be what Finding.to_json writes, got {line[:80]!r}. Name a file of findings."
            ) from error


def markdown(findings: Iterable[Finding]) -> str:
    """Findings as a list, the gravest first, as TensorBoard's `add_text` shows it: its tables break words.

    Example:
        >>> markdown([])
        'Nothing was found.'
    """
    return "\n\n".join(map(_paragraphs, gravest_first(findings))) or "Nothing was found."


def gravest_first(findings: Iterable[Finding]) -> list[Finding]:
    """By severity, then by step."""
    return sorted(findings, key=lambda found: (-SEVERITIES.index(found.severity), found.step))


def _paragraphs(found: Finding) -> str:
    where = f"layer {found.layer}, {_since(found)}" if found.layer else _since(found)
    head = f"**{found.severity}: {found.kind}** ({where}: {_short(found.value)}, threshold {_short(found.threshold)})"
    return f"{head}\n\n* cause: {found.cause}\n* cure: {found.cure}"


def _since(found: Finding) -> str:
    return f"steps {found.step} to {found.last_step}" if found.last_step > found.step else f"step {found.step}"


def _short(number: float) -> str:
    return f"{number:.3g}"
