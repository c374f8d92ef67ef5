"""Watching training: what a step says (`Reading`), measured and written at next to no cost."""

from torch_bp.diagnostics.reading import (
    DeadUnit,
    Finiteness,
    Histogram,
    Labels,
    LayerReading,
    Reading,
    Spread,
    read_readings,
    write_readings,
)
from torch_bp.diagnostics.watch import Monitor, watch

__all__ = [
    "DeadUnit",
    "Finiteness",
    "Histogram",
    "Labels",
    "LayerReading",
    "Monitor",
    "Reading",
    "Spread",
    "read_readings",
    "watch",
    "write_readings",
]
