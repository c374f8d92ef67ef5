"""What a gradient check found: a row for each tensor, and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch_bp._json import plain


@dataclass(frozen=True)
class GradcheckRow:
    """One tensor, "input 0" or "parameter 0.weight".

    `analytic` and `numeric` are the two values of the worst entry, at `index`, where entries were compared; else of the
    slope along a random direction, and `index` is None. `kinks` counts the directions that were dropped since the
    function is not differentiable along them.
    """

    name: str
    shape: tuple[int, ...]
    error: float = 0.0
    index: tuple[int, ...] | None = None
    analytic: float = 0.0
    numeric: float = 0.0
    failure: str = ""
    kinks: int = 0

    def __str__(self) -> str:
        where = "along a direction" if self.index is None else f"at {self.index}"
        kinks = f"  {self.kinks} at a kink" if self.kinks else ""
        entry = f"analytic {self.analytic:12.5g}  numeric {self.numeric:12.5g}  {where} of {self.shape}"
        return f"{self.name:24} {self.error:.1e}  {entry}{kinks}{'  failed' if self.failure else ''}"


@dataclass(frozen=True)
class GradcheckReport:
    """What `gradcheck` found; true if it passed. There are no rows if it failed before gradients were compared."""

    rows: tuple[GradcheckRow, ...] = ()
    eps: float = float("nan")
    rtol: float = float("nan")
    failure: str = ""
    notes: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        return not self.failure

    def __str__(self) -> str:
        passed = f"passed: relative errors are below {self.rtol:.0e}, with eps {self.eps:.0e}."
        lines = [f"gradcheck {'failed: ' + self.failure if self.failure else passed}"]
        return "\n".join([*lines, *map(str, self.rows), *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict of what JSON knows: NaN and infinities are the text that `float` reads."""
        return plain({"passed": bool(self)} | asdict(self))
