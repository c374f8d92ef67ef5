"""What `watch` was asked for, beside which model and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch_bp.diagnostics.reading import Reading


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Arguments of `watch`, by their names there and checked by it.

    Attributes:
        scaler, reduction, write_every, keep, on_reading, diagnose: as there.
        reduce: True or False: what there may be left to the model is settled.
        silent: as there; True in all processes but the first.
    """

    scaler: Any
    reduction: str
    reduce: bool
    write_every: int | None
    keep: int
    on_reading: Callable[[Reading], None] | None
    diagnose: bool
    silent: bool
