"""A formula with more to do on the way: the same function, wrapped, so that its kernel reads memory once for all."""

from __future__ import annotations

import inspect
from typing import Any

from torch_bp.kernels.decorator import FormulaFunction, formula_function
from torch_bp.kernels.formula import Formula
from torch_bp.kernels.functions import as_stored, column_sum, total, zeros_like
from torch_bp.kernels.row_formula import RowFormula

SCALE = "_scale"


def extended(rule: Formula, *, scaled: bool, cleared: bool, measured: bool, projected: bool = False) -> Formula:
    """Return the formula of an update rule that also scales, clears or measures; made once for a rule.

    Args:
        rule: its first two arguments are the parameter, which it updates, and the gradient, which it does not.
        scaled: the gradient is multiplied by the keyword `_scale` as it is read.
        cleared: the gradient is set to zero, in memory.
        measured: the last results are three totals, the sums of squares of the gradient as it is in memory, of the
            parameter before the update, and of what the update changes in memory; in half precision that is so in a
            kernel alone, as torch operations do not see what becomes of a result.
        projected: a fourth total follows, the sum of gradient times change.
    """
    made: dict[Any, Formula] = rule.__dict__.setdefault("_extended", {})
    key = scaled, cleared, measured, projected
    if key not in made:
        made[key] = _extend(rule, *key)
    return made[key]


def _extend(rule: Formula, scaled: bool, cleared: bool, measured: bool, projected: bool) -> Formula:
    param_name, grad_name = rule.tensors[:2]
    count, position = len(rule.updates), rule.updates.index(param_name)

    def function(param: Any, grad: Any, *state: Any, **keywords: Any) -> tuple[Any, ...]:
        read = grad * keywords.pop(SCALE) if scaled else grad
        results = rule.function(param, read, *state, **keywords)
        results = results if isinstance(results, tuple) else (results,)
        updated, totals = results[:count], results[count:]
        if cleared:
            updated = (*updated, zeros_like(grad))
        if measured:
            change = as_stored(updated[position]) - param
            totals = (*totals, total(grad * grad), total(param * param), total(change * change))
            totals = (*totals, total(grad * change)) if projected else totals
        return (*updated, *totals)

    parameters = [*inspect.signature(rule.function).parameters.values()]
    parameters += [inspect.Parameter(SCALE, inspect.Parameter.KEYWORD_ONLY)] * scaled
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = rule.name
    function.__wrapped__ = rule.function  # type: ignore[attr-defined]  # whose lines errors name
    result = Formula(function, (*rule.updates, grad_name) if cleared else rule.updates, rule.static)
    result.lent = (grad_name,) if cleared else ()  # users free gradients when they like
    result.outer = rule.outer  # the numbers that a trace would freeze are the rule's
    return result


def with_column_sum(of: FormulaFunction) -> FormulaFunction:
    """Return a formula that gives, beside the result of another one on matrices, what that adds up to per column.

    Args:
        of: a formula of matrices, with one result.

    Example:
        >>> import torch
        >>> from torch_bp.kernels import formula
        >>> @formula
        ... def tanh_backward(dy, y):
        ...     return dy * (1 - y * y)
        >>> with_column_sum(tanh_backward)(torch.ones(2, 1), torch.tensor([[0.0], [0.5]]))
        (tensor([[1.0000],
                [0.7500]]), tensor([1.7500]))
    """
    formula = of.formula
    if "_with_column_sum" not in formula.__dict__:

        def function(*tensors: Any, **keywords: Any) -> tuple[Any, Any]:
            result = formula.function(*tensors, **keywords)
            return result, column_sum(result)

        function.__signature__ = inspect.signature(formula.function)  # type: ignore[attr-defined]
        function.__name__ = function.__qualname__ = formula.name
        function.__wrapped__ = formula.function  # type: ignore[attr-defined]
        made = RowFormula(function, (), (), (), formula.static)
        made.outer = formula.outer
        formula.__dict__["_with_column_sum"] = formula_function(made)
    return formula.__dict__["_with_column_sum"]
