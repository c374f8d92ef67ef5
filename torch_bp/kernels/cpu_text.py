"""Numba's text of a CPU kernel, from an expression.

Three shapes: one pass over one tensor, one pass over a whole list of tensors given by a table of addresses, and loops
over the rows of matrices. All are split into chunks that threads share. Traps that shaped the text:

- Memory is reached through typed pointers that start at the chunk: an index computed in the loop blocks vectorisation.
- `fastmath` allows contraction only. Reciprocals turn 1e-39 into Inf, the full set drops NaN. Sums of rows say
  themselves that their order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from torch_bp.kernels import rows, vector
from torch_bp.kernels.expression import Expression, Speller
from torch_bp.kernels.symbol import Symbol

DTYPES = {torch.float32: "float32", torch.float64: "float64"}
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
}
_START = {"row_sum": "real(0)", "row_max": "real(-math.inf)"}
_GATHER = {"row_sum": "add({0}, {1})", "row_max": "larger({0}, {1})"}

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

# The order of a sum is free, which lets LLVM add whole vectors; llvm.maximum lets NaN through.
_REDUCING = """
labels = pointer_to(types.int64)


@intrinsic
def add(typing_context, a, b):
    def code(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=("reassoc",))

    return real(real, real), code


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
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

{pointer}

real = types.{dtype}
pointer = pointer_to(real)
{functions}# Numba's functions of these names, which it declares in a way that keeps the code out of the cache
get_num_threads = types.ExternalFunction("get_num_threads", types.intp())
set_num_threads = types.ExternalFunction("set_num_threads", types.void(types.intp))


@njit("void({signature})", cache=ON_DISK, nogil=True, parallel={parallel}, fastmath={{"contract"}}, error_model="numpy")
'''


def _loop(expression: Expression, targets: Sequence[str], count: str, indent: str) -> str:
    """The loop over one stretch of memory: load what is read, compute, store to `targets`."""
    spell = Speller(expression, _SPELLING)
    body = [_load(n) if n.operation == "input" else spell.line(n) for n in expression.order]
    body += _stores(spell, zip(targets, expression.outputs), "i")
    return f"{indent}for i in range({count}):\n" + "".join(f"{indent}    {line}\n" for line in body or ["pass"])


def _load(node: Symbol) -> str:
    return f"in_{node.arguments[0]} = p_{node.arguments[0]}[i]"


def _stores(spell: Speller, results: Iterable[tuple[str, Symbol]], place: str) -> list[str]:
    return [f"p_{t}[{place}] = {spell.name(r)}" for t, r in results if spell.name(r) != f"in_{t}"]


def _pointers(names: Sequence[str], address: str, indent: str) -> str:
    return "".join(f"{indent}p_{n} = pointer({address.format(n=n, i=i)})\n" for i, n in enumerate(names))


def _function(
    expression: Expression, dtype: torch.dtype, arguments: Sequence[str], signature: Sequence[str], parallel: bool
) -> str:
    """The module up to the body of `run`; a parallel one takes the number of threads first."""
    scalars = [f"s{i}" for i in range(len(expression.scalars))]
    arguments = [*arguments, *scalars]
    signature = ["int64"] * parallel + [*signature] + [DTYPES[dtype]] * len(scalars)
    text = _HEAD.format(
        name=expression.name,
        dtype=DTYPES[dtype],
        pointer=POINTER,
        functions=vector.definitions(expression.operations, dtype) + _REDUCING * expression.by_rows,
        signature=", ".join(signature),
        parallel=parallel,
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
        return text + _pointers(names, "a_{n}", "    ") + _loop(expression, targets, "count", "    ")
    text += f"    for chunk in prange((count + {CHUNK - 1}) // {CHUNK}):\n"
    text += f"        start = chunk * {CHUNK}\n"
    text += _pointers(names, f"a_{{n}} + start * {dtype.itemsize}", "        ")
    text += _loop(expression, targets, f"min({CHUNK}, count - start)", "        ")
    return text + "    set_num_threads(before)\n"


def text_list(expression: Expression, targets: Sequence[str], dtype: torch.dtype, parallel: bool) -> str:
    """The module of a kernel `run(addresses, tensor, start, length, scalar...)` over a list of tensors.

    `addresses[r, k]` is where argument r of tensor k begins; chunk c is `length[c]` elements of tensor `tensor[c]`
    from element `start[c]` on.
    """
    names = expression.operands(targets)
    signature = ["int64[:, ::1]", *["int64[::1]"] * 3]
    text = _function(expression, dtype, ["addresses", "tensor", "start", "length"], signature, parallel)
    text += f"    for chunk in {'prange' if parallel else 'range'}(tensor.shape[0]):\n"
    text += f"        k = tensor[chunk]\n        first = start[chunk] * {dtype.itemsize}\n"
    text += _pointers(names, "addresses[{i}, k] + first", "        ")
    text += _loop(expression, targets, "length[chunk]", "        ")
    return text + "    set_num_threads(before)\n" * parallel


def text_rows(expression: Expression, targets: Sequence[str], dtype: torch.dtype, parallel: bool) -> str:
    """The module of a kernel `run(rows, columns, address..., scalar...)` over matrices and columns of one row each."""
    spell, results = Speller(expression, _SPELLING), list(zip(targets, expression.outputs))
    names = expression.operands(targets)
    arguments = ["rows", "columns", *(f"a_{n}" for n in names)]
    text = _function(expression, dtype, arguments, ["int64"] * len(arguments), parallel)
    indent = "        "
    text += f"    block = max(1, {CHUNK} // columns)\n"
    text += f"    for chunk in {'prange' if parallel else 'range'}((rows + block - 1) // block):\n"
    text += f"{indent}for row in range(chunk * block, min(rows, (chunk + 1) * block)):\n"
    kinds = {n.arguments[0]: n.kind for n in expression.order if n.operation == "input"}
    kinds |= {t: r.kind for t, r in results}
    lines = []
    for name, kind in kinds.items():
        stride = {"tensor": f"{dtype.itemsize} * columns", "label": 8, "column": 0}.get(kind, dtype.itemsize)
        lines.append(f"p_{name} = {'labels' if kind == 'label' else 'pointer'}(a_{name} + row * {stride})")
    given = [n for n in expression.order if n.operation == "input" and rows.per_row(n)]
    lines += [f"in_{n.arguments[0]} = p_{n.arguments[0]}[0]" for n in given]
    for step in rows.steps(expression):
        lines += [spell.line(n) for n in step.before]
        lines += [f"{spell.name(r)} = {_START[r.operation]}" for r in step.reductions]
        body = [_load(n) if n.operation == "input" else spell.line(n) for n in step.elements]
        for r in step.reductions:
            value = spell.name(r)
            body.append(f"{value} = {_GATHER[r.operation].format(value, spell.name(r.arguments[0]))}")
        if step.stores:
            body += _stores(spell, [(t, r) for t, r in results if not rows.per_row(r)], "i")
        if body:
            lines += ["for i in range(columns):", *(f"    {line}" for line in body)]
    lines += _stores(spell, [(t, r) for t, r in results if rows.per_row(r)], "0")
    text += "".join(f"{indent}    {line}\n" for line in lines)
    return text + "    set_num_threads(before)\n" * parallel
