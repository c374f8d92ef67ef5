"""torch_bp: PyTorch layers, optimizers and schedules with hand-written backward and update rules.

`torch_bp.nn`, `torch_bp.nn.functional`, `torch_bp.optim` and `torch_bp.optim.lr_scheduler` mirror torch's modules of
the same name. Sub-packages load when they are first used: importing `torch_bp` alone imports neither them nor Numba,
Triton, Lightning or TensorBoard.
"""

import importlib
from types import ModuleType

from torch_bp._version import __version__

__all__ = ["__version__", "autograd", "kernels", "nn", "ops", "optim"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"torch_bp.{name}")
    raise AttributeError(f"module 'torch_bp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
