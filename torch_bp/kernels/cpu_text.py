"""Numba's text of a CPU kernel, from an expression.

Three shapes: one pass over one tensor, one pass over a whole list of tensors given by a table of addresses, and loops
over the rows of matrices. All are split into chunks that threads share. Traps that shaped the text:

- Memory is reached through typed pointers that start at the chunk: an index computed in the loop blocks vectorisation.
- `fastmath` allows contraction only. Reciprocals turn 1e-39 into Inf, the full set drops NaN. Over rows it allows
  nothing, since `g - row_sum(g) / n` of one column must be 0; only sums say that their order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from torch_bp.kernels import half, rows, vector
from torch_bp.kernels.expression import Expression, Speller
from torch_bp.kernels.symbol import Symbol

DTYPES = {
    torch.float32: ("float32", "float32"),
    torch.float64: ("float64", "float64"),
    torch.bfloat16: ("uint16", "float32"),
    torch.float16: ("uint16", "float32"),
}  # how it is stored, how it is computed
BLOCKS = 32  # into which the rows are cut, at the most, where columns are added up: each has sums of its own
CHUNK = 8192  # elements a thread takes at a time: four float32 streams of it fit the second-level cache

_SPELLING = {
    "constant": "real({0})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "pow": "{0} ** {1}",
    "neg": "-{0}",
    "abs": "abs({0})",
    "sqrt": "math.sqrt({0})",
    "exp": "exp({0})",
    "log": "log({0})",
    "tanh": "tanh({0})",
    "erf": "erf({0})",
    "sigmoid": "real(1) / (real(1) + exp(-{0}))",
    "sign": "real(({0} > real(0)) - ({0} < real(0)))",
    "number": "(real(1) if {0} else real(0))",
    "where": "({1} if {0} else {2})",
    "maximum": "({0} if ({0} > {1}) | ({0} != {0}) else {1})",
    "minimum": "({0} if ({0} < {1}) | ({0} != {0}) else {1})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "not {0}",
    "one_hot": "(real(1) if i == {0} else real(0))",
    "zeros_like": "real(0)",
}
_START = {"row_sum": "types.float64(0)", "row_max": "real(-math.inf)", "total": "types.float64(0)"}
_GATHER = {"row_sum": "add({0}, {1})", "row_max": "larger({0}, {1})", "total": "add({0}, {1})"}

POINTER = '''
def pointer_to(kind):
    """Make the intrinsic that turns an address into a pointer to `kind`."""

    @intrinsic
    def pointer(typing_context, address):
        def code(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), code

    return pointer
'''

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

# Sums are kept in float64, and their order is free, which lets LLVM add whole vectors. llvm.maximum lets NaN through.
_REDUCING = """
labels = pointer_to(types.int64)


@intrinsic
def add(typing_context, a, b):
    def code(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float64(types.float64, types.float64), code


@intrinsic
def larger(typing_context, a, b):
    def code(context, builder, signature, arguments):
        kind = arguments[0].type
        function = ir.FunctionType(kind, [kind, kind])
        return builder.call(builder.module.declare_intrinsic("llvm.maximum", [kind], function), arguments)

    return real(real, real), code

"""

_HEAD = '''"""{name}: made by torch_bp from a formula."""
import math
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

{pointer}

real = types.{real}
pointer = pointer_to(types.{stored})
{functions}# Numba's functions of these names, which it declares in a way that keeps the code out of the cache
get_num_threads = types.ExternalFunction("get_num_threads", types.intp())
set_num_threads = types.ExternalFunction("set_num_threads", types.void(types.intp))


@njit("void({signature})", cache=ON_DISK, nogil=True, parallel={parallel}, fastmath={fastmath}, error_model="numpy")
'''


def _loop(expression: Expression, targets: Sequence[str], dtype: torch.dtype, count: str, indent: str) -> str:
    """The loop over one stretch of memory: load what is read, compute, store to `targets`."""
    spell = Speller(expression, _SPELLING)
    computed = [n for n in expression.order if n.kind != "total"]
    body = [_load(n, dtype) if n.operation == "input" else spell.line(n) for n in computed]
    body += _stores(spell, zip(targets, expression.outputs), "i", dtype)
    body += [_gathered(spell, total) for total in expression.totals]
    lines = [f"{spell.name(total)} = {_START['total']}" for total in expression.totals]
    lines += [f"for i in range({count}):", *(f"    {line}" for line in body or ["pass"])]
    lines += [f"totals[chunk, {j}] = {spell.name(total)}" for j, total in enumerate(expression.totals)]
    return "".join(f"{indent}{line}\n" for line in lines)


def _gathered(spell: Speller, reduction: Symbol) -> str:
    """The line of a loop that takes one more element into a sum or a maximum."""
    value = spell.name(reduction)
    return f"{value} = {_GATHER[reduction.operation].format(value, spell.name(reduction.arguments[0]))}"


def _load(node: Symbol, dtype: torch.dtype, place: str = "i") -> str:
    value = f"p_{node.arguments[0]}[{place}]"
    return f"in_{node.arguments[0]} = {f'widened({value})' if half.is_half(dtype) and node.kind != 'label' else value}"


def _stores(spell: Speller, results: Iterable[tuple[str, Symbol]], place: str, dtype: torch.dtype) -> list[str]:
    value = "rounded({})" if half.is_half(dtype) else "{}"
    return [f"p_{t}[{place}] = {value.format(spell.name(r))}" for t, r in results if spell.name(r) != f"in_{t}"]


def _pointers(names: Sequence[str], address: str, indent: str) -> str:
    return "".join(f"{indent}p_{n} = pointer({address.format(n=n, i=i)})\n" for i, n in enumerate(names))


def _function(
    expression: Expression, dtype: torch.dtype, arguments: Sequence[str], signature: Sequence[str], parallel: bool
) -> str:
    """The module up to the body of `run`; a parallel one takes the number of threads first."""
    scalars = [f"s{i}" for i in range(len(expression.scalars))]
    arguments = [*arguments, *scalars]
    stored, real = DTYPES[dtype]
    signature = ["int64"] * parallel + [*signature] + [real] * len(scalars)
    text = _HEAD.format(
        name=expression.name,
        stored=stored,
        real=real,
        pointer=POINTER,
        functions=half.definitions(dtype)
        + vector.definitions(expression.operations, getattr(torch, real))
        + _REDUCING * (expression.by_rows or bool(expression.totals))
        + _ADDING_UP.format(total="rounded(real(total))" if half.is_half(dtype) else "real(total)")
        * any(output.kind == "column sum" for output in expression.outputs),
        signature=", ".join(signature),
        parallel=parallel,
        fastmath=set() if expression.by_rows else {"contract"},
    )
    if not parallel:
        return text + f"def run({', '.join(arguments)}):\n"
    text += f"def run({', '.join(['threads', *arguments])}):\n"
    return text + "    before = get_num_threads()\n    set_num_threads(threads)\n"


def text_single(expression: Expression, targets: Sequence[str], dtype: torch.dtype, parallel: bool) -> str:
    """The module of a kernel `run(count, address..., scalar...)` over one tensor."""
    names = expression.operands(targets)
    arguments = ["count", *(f"a_{n}" for n in names)]
    text = _function(expression, dtype, arguments, ["int64"] * len(arguments), parallel)
    if not parallel:
        return text + _pointers(names, "a_{n}", "    ") + _loop(expression, targets, dtype, "count", "    ")
    text += f"    for chunk in prange((count + {CHUNK - 1}) // {CHUNK}):\n"
    text += f"        start = chunk * {CHUNK}\n"
    text += _pointers(names, f"a_{{n}} + start * {dtype.itemsize}", "        ")
    text += _loop(expression, targets, dtype, f"min({CHUNK}, count - start)", "        ")
    return text + "    set_num_threads(before)\n"


def text_list(expression: Expression, targets: Sequence[str], dtype: torch.dtype, parallel: bool) -> str:
    """The module of a kernel `run(addresses, tensor, start, length, totals, scalar...)` over a list of tensors.

    `addresses[r, k]` is where argument r of tensor k begins; chunk c is `length[c]` elements of tensor `tensor[c]`
    from element `start[c]` on, and total j of them goes to `totals[c, j]`.
    """
    names = expression.operands(targets)
    arguments = ["addresses", "tensor", "start", "length", *["totals"] * bool(expression.totals)]
    signature = ["int64[:, ::1]", *["int64[::1]"] * 3, *["float64[:, ::1]"] * bool(expression.totals)]
    text = _function(expression, dtype, arguments, signature, parallel)
    text += f"    for chunk in {'prange' if parallel else 'range'}(tensor.shape[0]):\n"
    text += f"        k = tensor[chunk]\n        first = start[chunk] * {dtype.itemsize}\n"
    text += _pointers(names, "addresses[{i}, k] + first", "        ")
    text += _loop(expression, targets, dtype, "length[chunk]", "        ")
    return text + "    set_num_threads(before)\n" * parallel


def text_rows(expression: Expression, targets: Sequence[str], dtype: torch.dtype, parallel: bool) -> str:
    """The module of a kernel `run(rows, columns, address..., scalar...)` over matrices and columns.

    A thread takes a block of rows at a time; what it adds up per column goes to a row of its own of a float64 matrix.
    """
    spell, results = Speller(expression, _SPELLING), list(zip(targets, expression.outputs))
    sums = [t for t, r in results if r.kind == "column sum"]
    names = expression.operands(targets)
    arguments = ["rows", "columns", *(f"a_{n}" for n in names)]
    text = _function(expression, dtype, arguments, ["int64"] * len(arguments), parallel)
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
    lines += [_load(n, dtype, "0") for n in given]
    for step in rows.steps(expression):
        lines += [spell.line(n) for n in step.before]
        lines += [f"{spell.name(r)} = {_START[r.operation]}" for r in step.reductions]
        body = [_load(n, dtype) if n.operation == "input" else spell.line(n) for n in step.elements]
        body += [_gathered(spell, r) for r in step.reductions]
        if step.stores:
            body += _stores(spell, [(t, r) for t, r in results if r.kind == "tensor"], "i", dtype)
            added = [(t, spell.name(r.arguments[0])) for t, r in results if r.kind == "column sum"]
            body += [f"p_{t}[i] = p_{t}[i] + types.float64({value})" for t, value in added]
        if body:
            lines += ["for i in range(columns):", *(f"    {line}" for line in body)]
        lines += [f"{spell.name(r)} = real({spell.name(r)})" for r in step.reductions if r.operation == "row_sum"]
    return lines + _stores(spell, [(t, r) for t, r in results if rows.per_row(r)], "0", dtype)
