"""Watching training: `DivergenceGuard`, and what it is made of. All of it loads when it is first used."""

import importlib
from typing import Any

_MODULES = {  # of each name
    "DivergenceError": "guard_event",
    "DivergenceGuard": "guard",
    "Event": "guard_event",
    "LossTest": "loss_test",
}
__all__ = ["DivergenceError", "DivergenceGuard", "Event", "LossTest"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"torch_bp.diagnostics.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'torch_bp.diagnostics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
