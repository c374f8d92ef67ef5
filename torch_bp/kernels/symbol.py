"""Symbols: what a formula is called with while it is traced. Each operation on one enters a node in the `Trace`."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch

from torch_bp.kernels.place import converter

FUNCTION_NAMES = (
    "sqrt",
    "exp",
    "log",
    "tanh",
    "erf",
    "sigmoid",
    "where",
    "maximum",
    "minimum",
    "abs",
    "sign",
    "zeros_like",
)
REDUCTIONS = ("row_sum", "row_max")
RETURNED = {"total": "total", "column_sum": "column sum"}  # sums that are known after the whole kernel, by kind
COMPARE = {"lt", "le", "gt", "ge", "eq", "ne"}
LOGIC = {"and", "or", "not"}


WHERE_OF_NUMBERS = (
    "where: one of the two values must be a tensor, got two numbers, which have no dtype; "
    "write where(condition, number * x, other * x) or where(condition, x, 0)."
)


def _instead(name: str) -> str:
    """Say what to write for a function of this name."""
    if name in FUNCTION_NAMES:
        return f"torch_bp.kernels.{name} is meant"
    return f"allowed are operators and {', '.join(FUNCTION_NAMES)} of torch_bp.kernels"


class FormulaError(TypeError):
    """A formula uses something that has no kernel; the message names it."""


class Symbol:
    """One node of the graph: an input, a constant or an operation on other nodes.

    `kind` is "tensor" (one value per element), "scalar" (one value per call), "mask" (true or false per element) or
    "total" (one value per tensor, which can only be returned). In a formula over rows there are also "row" (one value
    per row), "row mask", "label" (a class index per row), "column" (one value per column, which is one per element
    that every row shares) and "column sum" (which can only be returned).
    """

    __slots__ = ("arguments", "kind", "operation", "trace")
    __array_ufunc__ = None  # numpy scalars leave `numpy_number * symbol` to us
    __hash__ = object.__hash__

    def __init__(self, trace: Trace, operation: str, arguments: tuple[Any, ...], kind: str) -> None:
        self.trace, self.operation, self.arguments, self.kind = trace, operation, arguments, kind

    def _refuse(self, construct: str, remedy: str) -> NoReturn:
        raise FormulaError(f"formula {self.trace.name}: {construct} has no kernel; {remedy}.")

    def __bool__(self) -> NoReturn:
        self._refuse(
            "a condition on a value (`if`, `and`, `or`, `not`, `while`, `a < b < c`)",
            "use where(condition, a, b), or name the keyword in @formula(static=...)",
        )

    def __iter__(self) -> NoReturn:
        self._refuse("iteration over a tensor", "a formula is one line of arithmetic per element")

    def __len__(self) -> NoReturn:
        self._refuse("len()", "a formula does not know the size of its tensors")

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse("indexing", "a formula sees one element at a time")

    def __float__(self) -> NoReturn:
        called = converter(sys._getframe(1))
        self._refuse(f"{called}()", _instead(called.removeprefix("math.").replace("fabs", "abs")))

    def __int__(self) -> NoReturn:
        self._refuse("int()", _instead("int"))

    def __complex__(self) -> NoReturn:
        self._refuse("complex()", _instead("complex"))

    __index__ = __int__

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # protocols that Python or numpy probe for
            raise AttributeError(name)
        self._refuse(f"the method or attribute .{name}", _instead(name))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        symbol = next(a for a in args if isinstance(a, Symbol))
        name = getattr(function, "__name__", str(function))
        symbol._refuse(f"torch.{name}", _instead(name))

    def __add__(self, other: Any) -> Symbol:
        return self.trace.operate("add", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return self.trace.operate("add", other, self)

    def __sub__(self, other: Any) -> Symbol:
        return self.trace.operate("sub", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return self.trace.operate("sub", other, self)

    def __mul__(self, other: Any) -> Symbol:
        return self.trace.operate("mul", self, other)

    def __rmul__(self, other: Any) -> Symbol:
        return self.trace.operate("mul", other, self)

    def __truediv__(self, other: Any) -> Symbol:
        return self.trace.operate("div", self, other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self.trace.operate("div", other, self)

    def __pow__(self, other: Any) -> Symbol:
        return self.trace.operate("pow", self, other)

    def __rpow__(self, other: Any) -> Symbol:
        return self.trace.operate("pow", other, self)

    def __neg__(self) -> Symbol:
        return self.trace.operate("neg", self)

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return self.trace.operate("abs", self)

    def __lt__(self, other: Any) -> Symbol:
        return self.trace.operate("lt", self, other)

    def __le__(self, other: Any) -> Symbol:
        return self.trace.operate("le", self, other)

    def __gt__(self, other: Any) -> Symbol:
        return self.trace.operate("gt", self, other)

    def __ge__(self, other: Any) -> Symbol:
        return self.trace.operate("ge", self, other)

    def __eq__(self, other: Any) -> Symbol:  # type: ignore[override]
        return self.trace.operate("eq", self, other)

    def __ne__(self, other: Any) -> Symbol:  # type: ignore[override]
        return self.trace.operate("ne", self, other)

    def __and__(self, other: Any) -> Symbol:
        return self.trace.operate("and", self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Symbol:
        return self.trace.operate("or", self, other)

    __ror__ = __or__

    def __invert__(self) -> Symbol:
        return self.trace.operate("not", self)


class Trace:
    """The nodes of one formula in the order of computation, equal ones entered once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: dict[tuple[Any, ...], Symbol] = {}

    def _enter(self, operation: str, arguments: tuple[Any, ...], kind: str) -> Symbol:
        key = (operation, *(id(a) if isinstance(a, Symbol) else repr(a) for a in arguments))
        if key not in self.nodes:
            self.nodes[key] = Symbol(self, operation, arguments, kind)
        return self.nodes[key]

    def input(self, name: str, kind: str) -> Symbol:
        return self._enter("input", (name,), kind)

    def operate(self, operation: str, *arguments: Any) -> Symbol:
        """Enter `operation` on symbols and numbers, and say which kind of value it gives."""
        symbols = tuple(self._symbol(a) for a in arguments)
        for symbol in symbols:
            if symbol.kind in RETURNED.values():
                symbol._refuse(f"arithmetic on a {symbol.kind}", "return it, and compute with what the call returns")
        if operation in RETURNED:
            if symbols[0].kind != "tensor":
                symbols[0]._refuse(f"{operation} of a {symbols[0].kind}", "it takes one value per element")
            return self._enter(operation, symbols, RETURNED[operation])
        if operation in REDUCTIONS:
            return self._reduce(operation, symbols[0])
        if operation == "one_hot":
            if symbols[0].kind != "label":
                symbols[0]._refuse(f"one_hot of a {symbols[0].kind}", "name its argument in @formula(labels=...)")
            return self._enter(operation, symbols[:1], "tensor")
        values = symbols[1:] if operation == "where" else symbols
        if operation in LOGIC or operation == "where":
            logical = symbols if operation in LOGIC else symbols[:1]
            if not all("mask" in s.kind for s in logical):
                symbols[0]._refuse(f"`{operation}` on a number", "compare it first: where(x > 0, a, b)")
        if operation == "where" and all(s.kind == "scalar" for s in values):
            raise FormulaError(WHERE_OF_NUMBERS)
        if operation not in COMPARE and any(s.kind == "label" for s in symbols):
            symbols[0]._refuse("arithmetic on class indices", "compare them, or use one_hot(label, x)")
        if operation not in LOGIC and any("mask" in s.kind for s in values):
            if not any(s.kind in ("tensor", "column", "row") for s in values):
                symbols[0]._refuse("arithmetic on comparisons alone", "write where(condition, x, 0)")
            numbers = [self._number(s) if "mask" in s.kind else s for s in values]
            symbols = (*symbols[: len(symbols) - len(values)], *numbers)
        kinds = {s.kind for s in symbols}
        per_row = not kinds & {"tensor", "column", "mask"} and kinds != {"scalar"}
        if operation in COMPARE or operation in LOGIC:
            return self._enter(operation, symbols, "row mask" if per_row else "mask")
        if kinds <= {"scalar", "column"}:
            return self._enter(operation, symbols, "column" if "column" in kinds else "scalar")
        return self._enter(operation, symbols, "row" if per_row else "tensor")

    def _number(self, mask: Symbol) -> Symbol:
        return self._enter("number", (mask,), "row" if mask.kind == "row mask" else "tensor")

    def _reduce(self, operation: str, value: Symbol) -> Symbol:
        if value.kind != "tensor":
            value._refuse(f"{operation} of a {value.kind}", "it takes one value per element")
        return self._enter(operation, (value,), "row")

    def _symbol(self, value: Any) -> Symbol:
        if isinstance(value, Symbol):
            return value
        if isinstance(value, int | float):
            return self._enter("constant", (float(value) if isinstance(value, float) else int(value),), "scalar")
        if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 and not isinstance(value, torch.Tensor):
            return self._symbol(value.item())  # a numpy scalar
        raise FormulaError(
            f"formula {self.name}: a {type(value).__name__} cannot be part of a kernel; pass tensors as positional "
            "and numbers as keyword-only arguments."
        )
