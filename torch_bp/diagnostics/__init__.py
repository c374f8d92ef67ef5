"""Watching training: what a step says (`Reading`), measured and written at next to no cost."""

from torch_bp.diagnostics.diagnosis import Diagnosis, diagnose
from torch_bp.diagnostics.finding import Finding, markdown
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
from torch_bp.diagnostics.thresholds import Thresholds

__all__ = [
    "DeadUnit",
    "Diagnosis",
    "Finding",
    "Finiteness",
    "Histogram",
    "Labels",
    "LayerReading",
    "Reading",
    "Spread",
    "Thresholds",
    "diagnose",
    "markdown",
    "read_readings",
    "write_readings",
]
