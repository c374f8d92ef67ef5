"""Watching training: what a step says (`Reading`) at next to no cost, and what is wrong with it (`Finding`)."""

from torch_bp.diagnostics.circumstances import Circumstances
from torch_bp.diagnostics.diagnosis import Diagnosis, diagnose
from torch_bp.diagnostics.doctor import Examination, examine
from torch_bp.diagnostics.finding import Finding, markdown
from torch_bp.diagnostics.origin import find_origin
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
from torch_bp.diagnostics.verdicts import Verdicts
from torch_bp.diagnostics.watch import Monitor, watch

__all__ = [
    "Circumstances",
    "DeadUnit",
    "Diagnosis",
    "Examination",
    "Finding",
    "Finiteness",
    "Histogram",
    "Labels",
    "LayerReading",
    "Monitor",
    "Reading",
    "Spread",
    "Thresholds",
    "Verdicts",
    "diagnose",
    "examine",
    "find_origin",
    "markdown",
    "read_readings",
    "watch",
    "write_readings",
]
