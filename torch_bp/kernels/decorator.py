"""`@formula`, and the plain function that it gives, which Dynamo can trace wherever it is kept."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

import torch

from torch_bp.kernels.formula import Formula
from torch_bp.kernels.program import as_torch
from torch_bp.kernels.row_formula import RowFormula

_is_compiling = torch.compiler.is_dynamo_compiling


class FormulaFunction(Protocol):
    """What `formula` returns, for type checkers: the function itself, `foreach_` for lists, and the `Formula`."""

    formula: Formula
    foreach_: Callable[..., Any]

    def __call__(self, *tensors: Any, **keywords: Any) -> Any: ...


@overload
def formula(function: Callable[..., Any], /) -> FormulaFunction: ...
@overload
def formula(
    *,
    updates: Sequence[str] = ...,
    static: Sequence[str] = ...,
    per_row: Sequence[str] | None = ...,
    per_column: Sequence[str] = ...,
    labels: Sequence[str] = ...,
) -> Callable[[Callable[..., Any]], FormulaFunction]: ...
def formula(
    function: Callable[..., Any] | None = None,
    /,
    *,
    updates: Sequence[str] = (),
    static: Sequence[str] = (),
    per_row: Sequence[str] | None = None,
    per_column: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Any:
    """Make a function of plain arithmetic run as torch operations, as a Numba kernel and as a Triton kernel.

    Positional arguments are tensors of one shape (or None, if the function can do without). Keyword-only arguments are
    numbers, or one-element tensors. The body may use, on tensors and on numbers:

    - `+ - * / **`, comparisons, and `& | ~` between comparisons;
    - from `torch_bp.kernels`, with torch's rules for NaN and Inf: `sqrt exp log tanh erf sigmoid abs sign`, of one
      value; `maximum minimum`, of two; `where(condition, a, b)`; `zeros_like(x)`, a result that is 0 everywhere;
    - in a formula over lists, `total(x)`: a result that is one number per tensor, the sum of its elements;
    - in a formula over rows, `row_sum row_max column_sum one_hot`.

    Functions of `math` take Python numbers alone, and those of `torch` and NumPy have no kernel.

    Args:
        updates: names of positional arguments that the results, in this order, are written to in place. Default: the
            results are returned as new tensors.
        static: names of keyword-only arguments that a plain Python `if` in the body may ask; each combination of
            their values becomes a kernel of its own.
        per_row: makes it a formula over rows: tensors are then matrices (R, C), but for the positional arguments named
            here, columns (R, 1). `row_sum(x)` and `row_max(x)` give one value per row; a result may be per element or
            per row. `()` if all are matrices. Goes without `updates`.
        per_column: names of positional arguments of a formula over rows that are (C), one value per column.
        labels: names of positional arguments of a formula over rows that are class indices, int64 (R, 1): for
            `one_hot(label, x)` and comparisons.

    Raises:
        TypeError: the signature has `*args` or `**kwargs`, or `updates` or `static` name no argument. When a kernel
            is first needed, `FormulaError` names the construct that a kernel cannot compute, with file and line.

    Example:
        >>> import torch
        >>> from torch_bp.kernels import formula, row_sum
        >>> @formula
        ... def sigmoid_backward(dy, y):
        ...     return dy * y * (1 - y)
        >>> sigmoid_backward(torch.ones(2), torch.tensor([0.5, 1.0]))
        tensor([0.2500, 0.0000])
        >>> @formula(updates=("param",), static=("maximize",))
        ... def gradient_descent(param, grad, *, lr, maximize=False):
        ...     return param + lr * grad if maximize else param - lr * grad
        >>> weight = torch.ones(2)
        >>> gradient_descent(weight, torch.ones(2), lr=0.25)
        >>> weight
        tensor([0.7500, 0.7500])
        >>> @formula(per_row=())
        ... def softmax_backward(dy, y):
        ...     return y * (dy - row_sum(dy * y))
        >>> softmax_backward(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
        tensor([[ 0.2500, -0.2500]])
    """
    if function is None:
        if per_row is None and not labels and not per_column:
            return lambda function: formula_function(Formula(function, updates, static))
        if updates:
            raise TypeError("formula: per_row, per_column and labels go without updates.")
        return lambda function: formula_function(RowFormula(function, per_row or (), per_column, labels, static))
    return formula_function(Formula(function))


_CALLS: dict[int, Callable[..., Any]] = {}


def formula_function(formula: Formula) -> Any:
    """Return the function that users hold: as callable as `formula`, and traceable by Dynamo wherever it is kept.

    Dynamo builds what a closure of an autograd Function holds without knowing where it comes from, which it can do for
    functions and numbers alone; so the formula is looked up by number, in a branch that Dynamo never takes.
    """
    number, function = id(formula), formula.function
    updates, tensors_of = formula.updates, formula.tensors

    @functools.wraps(function)
    def call(*tensors: Any, **keywords: Any) -> Any:
        if _is_compiling():
            return as_torch(function, updates, tensors_of, tensors, keywords)
        return _CALLS[number](*tensors, **keywords)

    _CALLS[number] = formula.__call__
    weakref.finalize(call, _CALLS.pop, number).atexit = False  # still there for what runs at exit
    call.foreach_, call.formula = formula.foreach_, formula  # type: ignore[attr-defined]
    return call
