"""How a formula runs: traced once, then as torch operations, Numba (CPU) or Triton (CUDA) kernels.

Public here: `formula`, `use`, `FormulaError`, and the functions a formula may call.
"""

from torch_bp.kernels.decorator import formula
from torch_bp.kernels.engine import use
from torch_bp.kernels.formula import Formula
from torch_bp.kernels.functions import (
    column_sum,
    erf,
    exp,
    log,
    maximum,
    minimum,
    one_hot,
    row_max,
    row_sum,
    sigmoid,
    sign,
    sqrt,
    tanh,
    total,
    where,
    zeros_like,
)
from torch_bp.kernels.symbol import FormulaError
from torch_bp.kernels.table import Table

__all__ = [
    "Formula",
    "FormulaError",
    "Table",
    "abs",
    "column_sum",
    "erf",
    "exp",
    "formula",
    "log",
    "maximum",
    "minimum",
    "one_hot",
    "row_max",
    "row_sum",
    "sigmoid",
    "sign",
    "sqrt",
    "tanh",
    "total",
    "use",
    "where",
    "zeros_like",
]

abs = abs  # so that all functions of a formula can be imported from one place
