"""The functions a formula may call: of tensors, of numbers and of symbols, with torch's rules for NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from torch_bp.kernels.plain import PLAIN_TYPES
from torch_bp.kernels.symbol import FUNCTION_NAMES, WHERE_OF_NUMBERS, FormulaError, Symbol


def _dispatch(operation: str, of_tensor: Callable[..., Any], of_number: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of tensors, numbers and symbols, with torch's rules for NaN."""

    def function(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                return of_tensor(*arguments)
        for argument in arguments:
            if isinstance(argument, Symbol):
                return argument.trace.operate(operation, *arguments)
        return of_number(*arguments)

    function.__name__ = function.__qualname__ = operation
    function.__doc__ = f"`torch.{operation}` on tensors, numbers and, in a formula being traced, symbols."
    return function


def _as_tensors(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a two-operand torch function take numbers: they become tensors of the other's dtype and device."""

    def call(*arguments: Any) -> torch.Tensor:
        like = next(a for a in arguments if isinstance(a, torch.Tensor))
        return function(*(a if isinstance(a, torch.Tensor) else torch.full_like(like, a) for a in arguments))

    return call


def _where(condition: torch.Tensor | bool, a: Any, b: Any) -> torch.Tensor:
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        raise FormulaError(WHERE_OF_NUMBERS)
    if isinstance(condition, bool):  # a comparison of keywords, the same for all elements
        chosen, other = (a, b) if condition else (b, a)
        return chosen if isinstance(chosen, torch.Tensor) else torch.full_like(other, chosen)
    return torch.where(condition, a, b)


def _nan_aware(choose: Callable[[float, float], float]) -> Callable[[float, float], float]:
    return lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else choose(a, b)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _log(value: float) -> float:
    return math.log(value) if value > 0 else (-math.inf if value == 0 else math.nan)


sqrt = _dispatch("sqrt", torch.sqrt, lambda a: math.sqrt(a) if not a < 0 else math.nan)
exp = _dispatch("exp", torch.exp, _exp)
log = _dispatch("log", torch.log, _log)
tanh = _dispatch("tanh", torch.tanh, math.tanh)
erf = _dispatch("erf", torch.erf, math.erf)
sigmoid = _dispatch("sigmoid", torch.sigmoid, lambda a: 1 / (1 + _exp(-a)))
sign = _dispatch("sign", torch.sign, lambda a: (a > 0) - (a < 0))
where = _dispatch("where", _where, lambda condition, a, b: a if condition else b)
maximum = _dispatch("maximum", _as_tensors(torch.maximum), _nan_aware(max))
minimum = _dispatch("minimum", _as_tensors(torch.minimum), _nan_aware(min))


zeros_like = _dispatch("zeros_like", torch.zeros_like, lambda a: 0)


def _one_hot(label: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # not scatter, which vmap cannot do with a label of its own
    if type(like) in PLAIN_TYPES:
        columns = torch.arange(like.shape[-1], device=like.device)
    else:  # of its own kind: DTensor does not mix with others
        columns = torch.ones_like(like, dtype=torch.long).cumsum(-1) - 1
    return (label == columns).to(like.dtype)


def _of_rows(operation: str, of_tensor: Callable[..., torch.Tensor], text: str) -> Callable[..., Any]:
    function = _dispatch(operation, of_tensor, _no_row)
    function.__doc__ = text
    return function


def _no_row(*arguments: Any) -> Any:
    raise FormulaError(
        "total, row_sum, row_max, column_sum and one_hot take tensors, and in a formula arguments that are tensors."
    )


def _values(x: torch.Tensor) -> torch.Tensor:
    if x.dtype is torch.bool:
        raise FormulaError("sums and maxima take values, not comparisons; write row_sum(where(x > 0, y, 0)).")
    return x


row_sum = _of_rows("row_sum", lambda x: _values(x).sum(-1, keepdim=True), "The sum of each row of (R, C): (R, 1).")
row_max = _of_rows("row_max", lambda x: _values(x).amax(-1, keepdim=True), "The maximum of each row of (R, C): (R, 1).")
column_sum = _of_rows("column_sum", lambda x: _values(x).sum(-2), "The sum of each column of (R, C): (C), a result.")
one_hot = _of_rows("one_hot", _one_hot, "1 in the column that `label` (R, 1) names, else 0: like the second argument.")

as_stored = _dispatch("as_stored", lambda x: x, lambda a: a)
as_stored.__doc__ = "In a kernel, what memory will hold of a value, rounded to the dtype of the tensors."

total = _dispatch("total", lambda x: x.sum(dtype=torch.float64), _no_row)
total.__doc__ = "The sum of all elements of a tensor, in float64: a result of its own, in a formula over lists."

FUNCTIONS: dict[str, Callable[..., Any]] = dict(
    zip(
        FUNCTION_NAMES,
        (sqrt, exp, log, tanh, erf, sigmoid, where, maximum, minimum, abs, sign, zeros_like),
        strict=True,
    )
)
