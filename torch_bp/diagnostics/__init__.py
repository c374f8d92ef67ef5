"""Watching training: `watch`, what it reads (`Reading`), and `DivergenceGuard`; loaded when they are first used."""

import importlib
from typing import Any

_MODULES = {  # of each name
    "DeadUnit": "reading",
    "DivergenceError": "guard_event",
    "DivergenceGuard": "guard",
    "Event": "guard_event",
    "Finiteness": "reading",
    "Histogram": "reading",
    "Labels": "reading",
    "LayerReading": "reading",
    "LossTest": "loss_test",
    "Monitor": "monitor",
    "Reading": "reading",
    "Spread": "reading",
    "read_readings": "reading_file",
    "watch": "watching",
    "write_readings": "reading_file",
}
__all__ = [
    "DeadUnit",
    "DivergenceError",
    "DivergenceGuard",
    "Event",
    "Finiteness",
    "Histogram",
    "Labels",
    "LayerReading",
    "LossTest",
    "Monitor",
    "Reading",
    "Spread",
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
