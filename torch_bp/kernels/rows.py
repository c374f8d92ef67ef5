"""The order of work for a formula over rows: loops over the elements of a row, and what is computed between them.

A sum over a row is known after a loop over its elements. What is computed per element from that sum needs a second
loop, and so on; an element's value that two loops use is computed twice, which costs less than memory to keep it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch_bp.kernels.expression import Expression
from torch_bp.kernels.symbol import REDUCTIONS, Symbol

_PER_ROW = frozenset({"row", "row mask", "label"})


@dataclass(frozen=True)
class Step:
    """One loop over the elements of a row, with what comes before it."""

    before: tuple[Symbol, ...]  # per row
    elements: tuple[Symbol, ...]  # per element, in order, inputs among them
    reductions: tuple[Symbol, ...]  # known after the loop
    stores: bool  # the loop writes the results that have one value per element


def steps(expression: Expression) -> list[Step]:
    """Cut the computation of one row into steps."""
    ready: dict[int, int] = {}  # the number of loops that must have run before
    for node in expression.order:
        of = [ready.get(id(a), 0) for a in node.arguments if isinstance(a, Symbol)]
        ready[id(node)] = max(of, default=0) + (node.operation in REDUCTIONS)
    elements = [output for output in expression.outputs if output.kind not in _PER_ROW]
    last = max((ready[id(output)] for output in elements), default=-1)
    found = []
    for number in range(max(ready.values(), default=0) + 1):
        here = [n for n in expression.order if ready[id(n)] == number]
        sums = [n for n in expression.order if n.operation in REDUCTIONS and ready[id(n)] == number + 1]
        wanted = [n.arguments[0] for n in sums] + (elements if number == last else [])
        before = [n for n in here if n.kind in _PER_ROW and n.operation not in (*REDUCTIONS, "input")]
        found.append(Step(tuple(before), _needed(expression, wanted), tuple(sums), number == last))
    return found


def _needed(expression: Expression, wanted: Iterable[Symbol]) -> tuple[Symbol, ...]:
    """Return the values per element that `wanted` are computed from, in order."""
    found = {id(n) for n in wanted}
    for node in reversed(expression.order):
        if id(node) in found:
            found |= {id(a) for a in node.arguments if isinstance(a, Symbol)}
    return tuple(n for n in expression.order if id(n) in found and n.kind not in (*_PER_ROW, "column sum"))


def per_row(node: Symbol) -> bool:
    """True for one value per row."""
    return node.kind in _PER_ROW
