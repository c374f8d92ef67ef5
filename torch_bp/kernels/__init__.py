"""How a formula runs: traced once, then as torch operations, Numba (CPU) or Triton (CUDA) kernels.

Public here: `formula`, `use`, `FormulaError`, and the functions a formula may call.
"""

from torch_bp.kernels.expression import (
    FormulaError,
    erf,
    exp,
    log,
    maximum,
    minimum,
    sign,
    sqrt,
    tanh,
    where,
)
from torch_bp.kernels.formula import Formula, formula, use

__all__ = [
    "Formula",
    "FormulaError",
    "abs",
    "erf",
    "exp",
    "formula",
    "log",
    "maximum",
    "minimum",
    "sign",
    "sqrt",
    "tanh",
    "use",
    "where",
]

abs = abs  # noqa: A001, PLW0127: so that all functions of a formula can be imported from one place
