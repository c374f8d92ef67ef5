"""Triton's text of a CUDA kernel over the rows of matrices, from an expression. See `cuda_text` and `rows`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_bp.kernels import rows
from torch_bp.kernels.cuda_text import SPELLING, begun, gathered, load, reduced, started, stores
from torch_bp.kernels.expression import Expression, Speller
from torch_bp.kernels.symbol import Symbol

_LARGER = """
@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
"""


def text_rows(expression: Expression, targets: Sequence[str], dtype: torch.dtype, from_table: bool) -> str:
    """The module of a kernel `run(count, columns, rows, tensor..., scalar...)` over matrices and columns.

    A program takes `rows` rows; what it adds up per column goes to a row of its own of a float64 matrix.
    """
    spell, results = Speller(expression, SPELLING), list(zip(targets, expression.outputs))
    names = [f"p_{n}" for n in expression.operands(targets)]
    text = begun(expression, dtype, from_table, ["count", "columns", "rows", *names], library=_LARGER)
    text += "    block = tl.program_id(0).to(tl.int64)\n"
    text += "    for row in range(block * rows, tl.minimum(count, (block + 1) * rows)):\n"
    return text + "".join(f"        {line}\n" for line in _row_lines(expression, spell, results))


def text_columns(expression: Expression, targets: Sequence[str], dtype: torch.dtype, from_table: bool) -> str:
    """The module of a kernel `run(count, columns, rows, tensor..., scalar...)` for a formula without sums over rows.

    A program takes BLOCK columns of `rows` rows, and keeps what it adds up per column until it is done: sum t of its
    columns goes to a row of its own of a matrix.
    """
    spell, results = Speller(expression, SPELLING), list(zip(targets, expression.outputs))
    names = [f"p_{n}" for n in expression.operands(targets)]
    text = begun(expression, dtype, from_table, ["count", "columns", "rows", *names])
    place = {"tensor": "row * columns + place", "column": "place"}
    sums = [(t, r) for t, r in results if r.kind == "column sum"]
    body = [
        load(n, place[n.kind], "inside") if n.operation == "input" else spell.line(n)
        for n in expression.order
        if n.kind != "column sum"
    ]
    body += stores(spell, [(t, r) for t, r in results if r.kind == "tensor"], place["tensor"], "inside")
    body += [f"sum_{t} += tl.where(inside, {spell.name(r.arguments[0])}, 0)" for t, r in sums]
    lines = ["place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)", "inside = place < columns"]
    lines += ["block = tl.program_id(1).to(tl.int64)", *(f"sum_{t} = tl.zeros((BLOCK,), REAL)" for t, _ in sums)]
    lines += ["for row in range(block * rows, tl.minimum(count, (block + 1) * rows)):", *(f"    {b}" for b in body)]
    lines += [f"tl.store(p_{t} + block * columns + place, sum_{t}, mask=inside)" for t, _ in sums]
    return text + "".join(f"    {line}\n" for line in lines)


def by_columns(expression: Expression) -> bool:
    """True if `text_columns` has a kernel for it: sums over columns, and nothing per row."""
    kinds = {*expression.kinds.values(), *(output.kind for output in expression.outputs)}
    return (
        "column sum" in kinds
        and kinds <= {"tensor", "column", "column sum"}
        and not any(node.operation in ("row_sum", "row_max") for node in expression.order)
    )


def _row_lines(expression: Expression, spell: Speller, results: list[tuple[str, Symbol]]) -> list[str]:
    """What is done with one row."""
    place = {"tensor": "row * columns + place", "column": "place"}
    lines = []
    for node in expression.order:
        if node.operation == "input" and node.kind not in place:
            name, kept = node.arguments[0], "" if node.kind == "label" else ".to(REAL)"
            lines.append(f"in_{name} = tl.load(p_{name} + row){kept}")
    for step in rows.steps(expression):
        lines += [spell.line(n) for n in step.before]
        body = [load(n, place[n.kind], "inside") if n.operation == "input" else spell.line(n) for n in step.elements]
        lines += [started(spell, r) for r in step.reductions]
        body += [gathered(spell, r) for r in step.reductions]
        if step.stores:
            body += stores(spell, [(t, r) for t, r in results if r.kind == "tensor"], place["tensor"], "inside")
            for t, r in results:
                if r.kind == "column sum":
                    at, value = f"p_{t} + block * columns + place", f"{spell.name(r.arguments[0])}.to(tl.float64)"
                    body.append(f"tl.store({at}, tl.load({at}, mask=inside) + {value}, mask=inside)")
        if body:
            lines += ["for first in range(0, columns, BLOCK):", "    place = first + tl.arange(0, BLOCK)"]
            lines += [f"    {line}" for line in ("inside = place < columns", *body)]
        lines += [f"{spell.name(r)} = {reduced(spell, r)}" for r in step.reductions]
    return lines + stores(spell, [(t, r) for t, r in results if rows.per_row(r)], "row", "")
