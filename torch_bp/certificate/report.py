"""What `verify` returns: one row per check, readable by people (`str`) and by programs (`to_dict`)."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_bp._version import __version__
from torch_bp.nn.convert import Conversion

HOLDS, DIFFERS, TORCH_CANNOT = "holds", "differs", "torch cannot"


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: its name.
        verdict: "holds"; "differs"; or "torch cannot", where torch itself fails with this model.
        deviation: the largest relative deviation of a tensor from torch's. Infinite where there is no number for it:
            other shapes, dtypes or errors. NaN if torch cannot.
        tolerance: the deviation that holds. NaN if torch cannot.
        tensor: the name of the tensor with that deviation.
        detail: the reason for the verdict, where the numbers do not tell it.
    """

    check: str
    verdict: str
    deviation: float = math.nan
    tolerance: float = math.nan
    tensor: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Certificate:
    """What `verify` found; true if it holds.

    Attributes:
        rows: the checks, in the order in which they ran.
        conversion: which modules of the model were torch_bp's, and why others were not.
        dtype: the coarsest dtype of the model and its inputs, which decides the tolerances.
        device: the type of their device.

    Example:
        >>> rows = (Row("outputs", HOLDS, 0.0, 1e-5, "output"), Row("compile", TORCH_CANNOT, detail="graph break"))
        >>> print(Certificate(rows, Conversion({"0": "Linear"}, {}, {"1": "torch_bp has no GELU of its own"})))
        ... # doctest: +ELLIPSIS
        torch_bp ... against torch ...: 1 module is torch_bp's; float32 on cpu
        check    verdict       deviation  tolerance  tensor
        outputs  holds         0.0e+00    1e-05      output
        compile  torch cannot  -          -          graph break
        left alone: torch_bp has no GELU of its own (1)
        It holds.
    """

    rows: tuple[Row, ...]
    conversion: Conversion = field(default_factory=Conversion)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def holds(self) -> bool:
        """True if no check differs."""
        return not any(row.verdict == DIFFERS for row in self.rows)

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        count = len(self.conversion.ours)
        modules = f"{count} module{' is' if count == 1 else 's are'} torch_bp's"
        lines = [f"torch_bp {__version__} against torch {torch.__version__}: {modules}; {self._where}"]
        lines += _table([("check", "verdict", "deviation", "tolerance", "tensor"), *map(_cells, self.rows)])
        if self.conversion.kept:
            lines.append(str(self.conversion).splitlines()[-1])
        differ = [row.check for row in self.rows if row.verdict == DIFFERS]
        if not differ and not self.conversion.ours:
            return "\n".join([*lines, "It holds, and says nothing: no module is torch_bp's."])
        return "\n".join([*lines, f"It does not hold: {', '.join(differ)}." if differ else "It holds."])

    def to_dict(self) -> dict[str, Any]:
        """Return it in what JSON knows; numbers that are not finite are None.

        Example:
            >>> Certificate((Row("outputs", HOLDS, 0.0, 1e-5, "output"),)).to_dict()["rows"][0]["tensor"]
            'output'
        """
        return {
            "holds": self.holds,
            "torch_bp": __version__,
            "torch": str(torch.__version__),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "modules": {"ours": dict(self.conversion.ours), "kept": dict(self.conversion.kept)},
            "rows": [
                {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in vars(row).items()}
                for row in self.rows
            ],
        }

    @property
    def _where(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}"


def _cells(row: Row) -> tuple[str, ...]:
    numbers = ("-" if math.isnan(n) else f"{n:{form}}" for n, form in ((row.deviation, ".1e"), (row.tolerance, ".0e")))
    return (row.check, row.verdict, *numbers, ": ".join(filter(None, (row.tensor, row.detail))))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
