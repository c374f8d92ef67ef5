"""A formula as data: calling the function once with symbols records what it computes.

The function is plain arithmetic. Called with `Symbol`s instead of tensors it leaves a graph of operations, from which
`cpu.py` and `cuda.py` make the text of a kernel. No source is read, so functions made by `exec`, in a notebook or by a
closure are as good as any other.

What depends on keyword-only arguments and numbers alone (`1 - beta2`) is a *scalar*: it is computed once per call on
the host in float64 and handed to the kernel, which rounds it to the dtype it computes in, as torch does with the
Python numbers in `tensor * number`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

COMPARE = {"lt", "le", "gt", "ge", "eq", "ne"}
LOGIC = {"and", "or", "not"}


_WHERE_OF_NUMBERS = (
    "where: one of the two values must be a tensor, got two numbers, which have no dtype; "
    "write where(condition, number * x, other * x) or where(condition, x, 0)."
)


class FormulaError(TypeError):
    """A formula uses something that has no kernel; the message names it."""


class Symbol:
    """One node of the graph: an input, a constant or an operation on other nodes.

    `kind` is "tensor" (one value per element), "scalar" (one value per call) or "mask" (true or false per element).
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
        self._refuse("float()", "use the functions of torch_bp.kernels")

    __int__ = __index__ = __complex__ = __float__

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # protocols that Python or numpy probe for
            raise AttributeError(name)
        self._refuse(f"the method or attribute .{name}", f"allowed are operators and {', '.join(FUNCTIONS)}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        symbol = next(a for a in args if isinstance(a, Symbol))
        name = getattr(function, "__name__", str(function))
        symbol._refuse(f"torch.{name}", f"allowed are operators and {', '.join(FUNCTIONS)}")

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
        kinds = [s.kind for s in symbols]
        values = symbols[1:] if operation == "where" else symbols
        if operation in LOGIC or operation == "where":
            logical = symbols if operation in LOGIC else symbols[:1]
            if any(s.kind != "mask" for s in logical):
                symbols[0]._refuse(f"`{operation}` on a number", "compare it first: where(x > 0, a, b)")
        if operation == "where" and all(s.kind == "scalar" for s in values):
            raise FormulaError(_WHERE_OF_NUMBERS)
        if operation not in LOGIC and "mask" in [s.kind for s in values]:
            if not any(s.kind == "tensor" for s in values):
                symbols[0]._refuse("arithmetic on comparisons alone", "write where(condition, x, 0)")
            numbers = [self._enter("number", (s,), "tensor") if s.kind == "mask" else s for s in values]
            symbols = (*symbols[: len(symbols) - len(values)], *numbers)
        if operation in COMPARE or operation in LOGIC:
            return self._enter(operation, symbols, "mask")
        return self._enter(operation, symbols, "scalar" if set(kinds) == {"scalar"} else "tensor")

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


@dataclass(frozen=True)
class Expression:
    """What a formula computes: `outputs[i]` from the tensors `inputs` and from `scalars`, in SSA form.

    `scalars` holds the scalar nodes that tensor nodes use; `host` computes their values from the keyword arguments.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[Symbol, ...]
    scalars: tuple[Symbol, ...]
    host: Callable[..., tuple[Any, ...]]

    def used_inputs(self) -> set[str]:
        """Return the tensor inputs that some output reads."""
        return {n.arguments[0] for n in self._order() if n.operation == "input"}

    def _order(self) -> list[Symbol]:
        order: list[Symbol] = []
        seen: set[int] = set()

        def visit(node: Symbol) -> None:
            if id(node) in seen or node.kind == "scalar":
                return
            seen.add(id(node))
            for argument in node.arguments:
                if isinstance(argument, Symbol):
                    visit(argument)
            order.append(node)

        for output in self.outputs:
            visit(output)
        return order

    def statements(self, spelling: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Spell the computation in a kernel language: assignments in order, and the name of each output.

        `spelling` maps an operation to a format string of its operands, "{0}" and "{1}"; an input tensor `x` is the
        value `in_x`, scalar number i is `s{i}`, a number is spelled by `spelling["constant"]`.
        """
        names = {id(s): f"s{i}" for i, s in enumerate(self.scalars)}

        def operand(node: Symbol) -> str:
            return spelling["constant"].format(_number(node)) if node.operation == "constant" else names[id(node)]

        lines = []
        for node in self._order():
            if node.operation == "input":
                names[id(node)] = f"in_{node.arguments[0]}"
                continue
            operands = [operand(a) for a in node.arguments]
            names[id(node)] = f"t{len(lines)}"
            operation = node.operation
            if operation == "pow" and _is_constant(node.arguments[1], 2):
                operation, operands = "mul", [operands[0], operands[0]]
            lines.append(f"t{len(lines)} = {spelling[operation].format(*operands)}")
        return lines, [names[id(o)] for o in self.outputs]


def _is_constant(node: Symbol, value: float) -> bool:
    return node.operation == "constant" and node.arguments[0] == value


def _number(node: Symbol) -> str:
    value = node.arguments[0]
    return repr(value) if math.isfinite(value) else f"float('{value}')"


def trace(
    function: Callable[..., Any],
    name: str,
    tensors: Sequence[str],
    absent: Iterable[str],
    scalars: Iterable[str],
    static: Mapping[str, Any],
) -> Expression:
    """Call `function` once with symbols. `absent` names tensor arguments that are None, `static` the fixed keywords."""
    record = Trace(name)
    absent = set(absent)
    arguments = [None if n in absent else record.input(n, "tensor") for n in tensors]
    keywords = {n: record.input(n, "scalar") for n in scalars}
    try:
        result = function(*arguments, **keywords, **static)
    except FormulaError:
        raise
    except Exception as error:
        raise FormulaError(
            f"formula {name}: {type(error).__name__} while it was called with symbols: {error}. A formula is plain "
            f"arithmetic with operators and {', '.join(FUNCTIONS)}."
        ) from error
    results = result if isinstance(result, tuple) else (result,)
    outputs = tuple(r for r in results if r is not None)
    for position, output in enumerate(outputs):
        if not isinstance(output, Symbol) or output.kind != "tensor":
            raise FormulaError(
                f"formula {name}: result {position} must be a value per element, got "
                f"{output.kind if isinstance(output, Symbol) else type(output).__name__}; "
                "it has to depend on a positional argument."
            )
    used = _scalars_of(outputs)
    present = tuple(n for n in tensors if n not in absent)
    return Expression(name, present, outputs, used, _host_function(name, used, tuple(keywords)))


def _scalars_of(outputs: Iterable[Symbol]) -> tuple[Symbol, ...]:
    """Return the scalar nodes that tensor nodes use directly, each once."""
    found: dict[int, Symbol] = {}
    seen: set[int] = set()

    def visit(node: Symbol) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        for argument in node.arguments:
            if not isinstance(argument, Symbol):
                continue
            if argument.kind != "scalar":
                visit(argument)
            elif argument.operation != "constant":
                found[id(argument)] = argument

    for output in outputs:
        visit(output)
    return tuple(found.values())


def _host_function(name: str, scalars: Sequence[Symbol], keywords: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
    """Make the Python function that computes the scalars from the keyword arguments."""
    spelled: dict[int, str] = {}

    def spell(node: Symbol) -> str:
        if node.operation == "input":
            return node.arguments[0]
        if node.operation == "constant":
            return _number(node)
        if id(node) not in spelled:
            operands = [spell(a) for a in node.arguments]
            spelled[id(node)] = f"({_PYTHON[node.operation].format(*operands)})"
        return spelled[id(node)]

    body = ", ".join(spell(s) for s in scalars)
    text = f"def host({'*, ' if keywords else ''}{', '.join(keywords)}):\n    return ({body}{',' if scalars else ''})\n"
    namespace: dict[str, Any] = {f"_{name}": function for name, function in FUNCTIONS.items()}
    exec(text, namespace)  # the text is made above, from operations alone
    host = namespace["host"]
    host.__name__ = host.__qualname__ = name  # a forgotten keyword is reported under the formula's name
    return host


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


def _where(condition: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        raise FormulaError(_WHERE_OF_NUMBERS)
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
sign = _dispatch("sign", torch.sign, lambda a: (a > 0) - (a < 0))
where = _dispatch("where", _where, lambda condition, a, b: a if condition else b)
maximum = _dispatch("maximum", _as_tensors(torch.maximum), _nan_aware(max))
minimum = _dispatch("minimum", _as_tensors(torch.minimum), _nan_aware(min))

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": sqrt,
    "exp": exp,
    "log": log,
    "tanh": tanh,
    "erf": erf,
    "where": where,
    "maximum": maximum,
    "minimum": minimum,
    "abs": abs,
    "sign": sign,
}

_PYTHON = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "pow": "{0} ** {1}",
    "neg": "-{0}",
} | {name: f"_{name}({{0}})" for name in ("abs", "sqrt", "exp", "log", "tanh", "erf", "sign")}
_PYTHON |= {name: f"_{name}({{0}}, {{1}})" for name in ("maximum", "minimum")}
