"""torch_bp: PyTorch layers, optimizers and schedules with hand-written backward and update rules.

`torch_bp.nn`, `torch_bp.nn.functional`, `torch_bp.optim` and `torch_bp.optim.lr_scheduler` mirror torch's modules of
the same name. `convert` and `to_torch` swap the modules of a model, `conversion` tells whose they are, and `verify`
compares both. All of it loads when it is first used: importing `torch_bp` alone imports neither sub-packages nor Numba,
Triton, Lightning or TensorBoard.
"""

import importlib
from typing import Any

from torch_bp._version import __version__

_FUNCTIONS = {  # and the modules they are in
    "DivergenceError": "diagnostics",
    "DivergenceGuard": "diagnostics",
    "TrainStep": "step",
    "conversion": "nn.convert",
    "convert": "nn.convert",
    "to_torch": "nn.convert",
    "try_cure": "cure",
    "verify": "certificate",
    "watch": "diagnostics",
}
__all__ = [
    "DivergenceError",
    "DivergenceGuard",
    "TrainStep",
    "__version__",
    "autograd",
    "certificate",
    "conversion",
    "convert",
    "diagnostics",
    "kernels",
    "nn",
    "ops",
    "optim",
    "step",
    "to_torch",
    "try_cure",
    "verify",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"torch_bp.{_FUNCTIONS[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"torch_bp.{name}")
    raise AttributeError(f"module 'torch_bp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
