"""A formula as data: calling the function once with symbols records what it computes.

The function is plain arithmetic. Called with `Symbol`s instead of tensors it leaves a graph of operations, from which
`cpu.py` and `cuda.py` make the text of a kernel. No source is read, so functions made by `exec`, in a notebook or by a
closure are as good as any other.

What depends on keyword-only arguments and numbers alone (`1 - beta2`) is a *scalar*: it is computed once per call on
the host in float64 and handed to the kernel, which rounds it to the dtype it computes in, as torch does with the
Python numbers in `tensor * number`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch_bp.kernels.functions import FUNCTIONS
from torch_bp.kernels.place import place
from torch_bp.kernels.symbol import RETURNED, FormulaError, Symbol, Trace


@dataclass(frozen=True)
class Expression:
    """What a formula computes: `outputs[i]` from the tensors `inputs` and from `scalars`, in SSA form.

    `kinds` says which kind of `Symbol` each of the inputs is, those among them that no output reads included.
    `scalars` holds the scalar nodes that tensor nodes use; `host` computes their values from the keyword arguments.
    `arithmetic` is the text of that, if it is nothing but operators, else "".
    """

    name: str
    given: tuple[bool, ...]  # which of the function's results are not None
    kinds: Mapping[str, str]
    outputs: tuple[Symbol, ...]
    scalars: tuple[Symbol, ...]
    host: Callable[..., tuple[Any, ...]]
    arithmetic: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that a call brings."""
        return tuple(self.kinds)

    def operands(self, targets: Sequence[str]) -> list[str]:
        """Return the names of all memory a kernel touches: the inputs, then targets that are not inputs."""
        return [*self.inputs, *(t for t in targets if t not in self.inputs)]

    @functools.cached_property
    def order(self) -> list[Symbol]:
        """The nodes that outputs need, but for scalars, each after what it is computed from."""
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

    @property
    def operations(self) -> set[str]:
        """What the kernel computes."""
        return {node.operation for node in self.order}

    @property
    def by_rows(self) -> bool:
        """True if something is computed per row."""
        return any(node.kind in ("row", "label", "column sum") for node in self.order)

    @property
    def totals(self) -> list[Symbol]:
        """The results that are one value per tensor; they come last."""
        return [output for output in self.outputs if output.kind == "total"]

    def used_inputs(self) -> set[str]:
        """Return the inputs that some output reads."""
        return {n.arguments[0] for n in self.order if n.operation == "input"}


class Speller:
    """The nodes of an expression in a kernel language.

    `spelling` maps an operation to a format string of its operands, "{0}" and "{1}"; an input `x` is the value `in_x`,
    scalar number i is `s{i}`, a number is spelled by `spelling["constant"]`. Node number k of the order is `t{k}`.
    """

    def __init__(self, expression: Expression, spelling: Mapping[str, str]) -> None:
        self._spelling = spelling
        self._names = {id(s): f"s{i}" for i, s in enumerate(expression.scalars)}
        for k, node in enumerate(expression.order):
            self._names[id(node)] = f"in_{node.arguments[0]}" if node.operation == "input" else f"t{k}"

    def name(self, node: Symbol) -> str:
        """Return the name of a node's value."""
        return (
            self._spelling["constant"].format(_number(node)) if node.operation == "constant" else self._names[id(node)]
        )

    def line(self, node: Symbol) -> str:
        """Return the assignment that computes a node."""
        operands = [self.name(a) for a in node.arguments]
        operation = node.operation
        if operation == "pow" and _is_constant(node.arguments[1], 2):
            operation, operands = "mul", [operands[0], operands[0]]
        return f"{self.name(node)} = {self._spelling[operation].format(*operands)}"


def _is_constant(node: Symbol, value: float) -> bool:
    return node.operation == "constant" and node.arguments[0] == value


def _number(node: Symbol) -> str:
    value = node.arguments[0]
    return repr(value) if math.isfinite(value) else f"float('{value}')"


def trace(
    function: Callable[..., Any],
    name: str,
    tensors: Mapping[str, str],
    absent: Iterable[str],
    scalars: Iterable[str],
    static: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> Expression:
    """Call `function` once with symbols.

    Args:
        tensors: names of the tensor arguments, and which kind of `Symbol` each is.
        absent: tensor arguments that are None.
        scalars: keyword arguments that become numbers of the kernel.
        static: keyword arguments that are fixed, and their values.
        defaults: values of scalars that a call may leave out.
    """
    record = Trace(name)
    absent = set(absent)
    arguments = [None if n in absent else record.input(n, kind) for n, kind in tensors.items()]
    keywords = {n: record.input(n, "scalar") for n in scalars}
    code = inspect.unwrap(function).__code__  # type: ignore[attr-defined]
    try:
        result = function(*arguments, **keywords, **static)
    except FormulaError as error:
        error.args = (f"{place(error.__traceback__, code)}: {error}",)
        raise
    except Exception as error:
        raise FormulaError(
            f"{place(error.__traceback__, code)}: formula {name}: {type(error).__name__} while it was called with "
            f"symbols: {error}. A formula is plain arithmetic with operators and {', '.join(FUNCTIONS)} of "
            "torch_bp.kernels."
        ) from error
    formula = f"{place(None, code)}: formula {name}"
    results = result if isinstance(result, tuple) else (result,)
    outputs = tuple(r for r in results if r is not None)
    if not outputs:
        raise FormulaError(f"{formula}: it must return a value per element, got None.")
    for position, output in enumerate(outputs):
        if not isinstance(output, Symbol) or output.kind not in ("tensor", "row", *RETURNED.values()):
            raise FormulaError(
                f"{formula}: result {position} must be a value per element, got "
                f"{output.kind if isinstance(output, Symbol) else type(output).__name__}; "
                "it has to depend on a positional argument."
            )
    kinds = ["total" if output.kind == "total" else "" for output in outputs]
    if kinds != sorted(kinds):
        raise FormulaError(f"{formula}: totals must be the last of the results.")
    used = _scalars_of(outputs)
    present = {n: kind for n, kind in tensors.items() if n not in absent}
    given = tuple(r is not None for r in results)
    host, arithmetic = _host_function(name, used, keywords, static, defaults)
    return Expression(name, given, present, outputs, used, host, arithmetic)


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


def _host_function(
    name: str,
    scalars: Sequence[Symbol],
    keywords: Iterable[str],
    static: Iterable[str],
    defaults: Mapping[str, Any],
) -> tuple[Callable[..., tuple[Any, ...]], str]:
    """Make the Python function that computes the scalars from the keyword arguments; it passes over static ones.

    Beside it, the text of the tuple that it returns, "" if functions are in it.
    """
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
    accepted = [*(f"{n}=_default_{n}" if n in defaults else n for n in keywords), *(f"{n}=None" for n in static)]
    text = (
        f"def host({', '.join(['*', *accepted] if accepted else [])}):\n    return ({body}{',' if scalars else ''})\n"
    )
    namespace: dict[str, Any] = {f"_{name}": function for name, function in FUNCTIONS.items()}
    namespace |= {f"_default_{name}": value for name, value in defaults.items()}
    exec(text, namespace)  # the text is made above, from operations alone
    host = namespace["host"]
    host.__name__ = host.__qualname__ = name  # a forgotten keyword is reported under the formula's name
    return host, "" if any(f"_{n}(" in body for n in FUNCTIONS) else body


_PYTHON = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "pow": "{0} ** {1}",
    "neg": "-{0}",
} | {name: f"_{name}({{0}})" for name in ("abs", "sqrt", "exp", "log", "tanh", "erf", "sigmoid", "sign", "zeros_like")}
_PYTHON |= {name: f"_{name}({{0}}, {{1}})" for name in ("maximum", "minimum")}
