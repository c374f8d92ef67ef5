"""Numba's text of a CPU kernel over the rows of matrices, from an expression. See `cpu_text` and `rows`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_bp.kernels import half, rows, vector
from torch_bp.kernels.cpu_text import CHUNK, SPELLING, START, function, gathered, load, stores
from torch_bp.kernels.expression import Expression, Speller
from torch_bp.kernels.symbol import Symbol

BLOCKS = 32  # into which the rows are cut, at the most, where columns are added up: each has sums of its own
_DEAR = {*vector.FUNCTIONS, "sigmoid", "pow"}

# Outside of its parallel loop a parallel function loses stores that Numba sees no use for: another function has them.
_ADDING_UP = """
@njit
def add_up(sums, address):
    for column in range(sums.shape[1]):
        total = 0.0
        for block in range(sums.shape[0]):
            total += sums[block, column]
        pointer(address)[column] = {total}

"""


def text_rows(expression: Expression, targets: Sequence[str], dtype: torch.dtype, parallel: bool) -> str:
    """The module of a kernel `run(rows, columns, address..., scalar...)` over matrices and columns.

    A thread takes a block of rows at a time; what it adds up per column goes to a row of its own of a float64 matrix.
    """
    spell, results = Speller(expression, SPELLING), list(zip(targets, expression.outputs))
    sums = [t for t, r in results if r.kind == "column sum"]
    names = expression.operands(targets)
    arguments = ["rows", "columns", *(f"a_{n}" for n in names)]
    adding_up = _ADDING_UP.format(total="rounded(real(total))" if half.is_half(dtype) else "real(total)")
    text = function(expression, dtype, arguments, ["int64"] * len(arguments), parallel, more=adding_up if sums else "")
    text += f"    block = max(1, {CHUNK} // columns)\n"
    if sums:
        text += f"    block = max(block, (rows + {BLOCKS - 1}) // {BLOCKS})\n"
    text += "    blocks = (rows + block - 1) // block\n"
    text += "".join(f"    sums_{t} = np.empty((blocks, columns))\n" for t in sums)
    text += f"    for chunk in {'prange' if parallel else 'range'}(blocks):\n"
    indent = "        "
    for t in sums:
        text += f"{indent}p_{t} = sums_{t}[chunk]\n{indent}for i in range(columns):\n{indent}    p_{t}[i] = 0.0\n"
    text += f"{indent}for row in range(chunk * block, min(rows, (chunk + 1) * block)):\n"
    text += "".join(f"{indent}    {line}\n" for line in _row_lines(expression, spell, results, dtype))
    if parallel:
        text += "    set_num_threads(before)\n"
    return text + "".join(f"    add_up(sums_{t}, a_{t})\n" for t in sums)


def _row_lines(
    expression: Expression, spell: Speller, results: Sequence[tuple[str, Symbol]], dtype: torch.dtype
) -> list[str]:
    """What is done with one row."""
    kinds = {n.arguments[0]: n.kind for n in expression.order if n.operation == "input"}
    kinds |= {t: r.kind for t, r in results}
    lines = []
    for name, kind in kinds.items():
        if kind == "column sum":
            continue
        stride = {"tensor": f"{dtype.itemsize} * columns", "label": 8, "column": 0}.get(kind, dtype.itemsize)
        lines.append(f"p_{name} = {'labels' if kind == 'label' else 'pointer'}(a_{name} + row * {stride})")
    given = [n for n in expression.order if n.operation == "input" and rows.per_row(n)]
    lines += [load(n, dtype, "0") for n in given]
    kept, first, place = _kept(expression, results, dtype)
    for number, step in enumerate(rows.steps(expression)):
        lines += [spell.line(n) for n in step.before]
        lines += [f"{spell.name(r)} = {START[r.operation]}" for r in step.reductions]
        body = []
        for node in step.elements:
            if node is kept and number > first:
                body.append(f"{spell.name(node)} = {place}")
            else:
                body.append(load(node, dtype) if node.operation == "input" else spell.line(node))
        body += [gathered(spell, r) for r in step.reductions]
        if kept is not None and number == first:
            body.append(f"{place} = {spell.name(kept)}")
        if step.stores:
            body += stores(spell, [(t, r) for t, r in results if r.kind == "tensor"], "i", dtype)
            added = [(t, spell.name(r.arguments[0])) for t, r in results if r.kind == "column sum"]
            body += [f"p_{t}[i] = p_{t}[i] + types.float64({value})" for t, value in added]
        if body:
            lines += ["for i in range(columns):", *(f"    {line}" for line in body)]
        lines += [f"{spell.name(r)} = real({spell.name(r)})" for r in step.reductions if r.operation == "row_sum"]
    return lines + stores(spell, [(t, r) for t, r in results if rows.per_row(r)], "0", dtype)


def _kept(
    expression: Expression, results: Sequence[tuple[str, Symbol]], dtype: torch.dtype
) -> tuple[Symbol | None, int, str]:
    """Return a value per element that is dear and that several loops need, the first of these, and where it is kept.

    That is the place of a result of full precision, which the last of these loops, or a later one, writes.
    """
    target = next((t for t, r in results if r.kind == "tensor"), None)
    if target is None or half.is_half(dtype):
        return None, 0, ""
    steps = rows.steps(expression)
    written = next(number for number, step in enumerate(steps) if step.stores)
    for node in expression.order:
        needed = [number for number, step in enumerate(steps) if any(n is node for n in step.elements)]
        if node.operation in _DEAR and len(needed) > 1 and needed[-1] <= written:
            return node, needed[0], f"p_{target}[i]"
    return None, 0, ""
