"""Watching training: `watch`, what it reads (`Reading`) and what is wrong with it (`Finding`), and `DivergenceGuard`.

All of it is loaded when it is first used.
"""

import importlib
from typing import Any

_MODULES = {  # of each name
    "DeadUnit": "reading",
    "Diagnosis": "diagnosis",
    "DivergenceError": "guard_event",
    "DivergenceGuard": "guard",
    "Event": "guard_event",
    "Examination": "doctor",
    "Finding": "finding",
    "Finiteness": "reading",
    "Histogram": "reading",
    "Labels": "reading",
    "LayerReading": "reading",
    "LossTest": "loss_test",
    "Monitor": "monitor",
    "Reading": "reading",
    "Spread": "reading",
    "Thresholds": "thresholds",
    "Verdicts": "verdicts",
    "diagnose": "diagnosis",
    "examine": "doctor",
    "find_origin": "origin",
    "markdown": "finding",
    "read_readings": "reading_file",
    "watch": "watching",
    "write_readings": "reading_file",
}
__all__ = [
    "DeadUnit",
    "Diagnosis",
    "DivergenceError",
    "DivergenceGuard",
    "Event",
    "Examination",
    "Finding",
    "Finiteness",
    "Histogram",
    "Labels",
    "LayerReading",
    "LossTest",
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


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"torch_bp.diagnostics.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'torch_bp.diagnostics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
