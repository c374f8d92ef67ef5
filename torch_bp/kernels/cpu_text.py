"""Numba's text of a CPU kernel, from an expression.

Two shapes: one pass over one tensor, and one pass over a whole list of tensors given by a table of addresses; loops
over the rows of matrices are in `cpu_row_text`. All are split into chunks that threads share. Traps that shaped them:

- Memory is reached through typed pointers that start at the chunk: an index computed in the loop blocks vectorisation.
- `fastmath` allows contraction only. Reciprocals turn 1e-39 into Inf, the full set drops NaN. Over rows it allows
  nothing, since `g - row_sum(g) / n` of one column must be 0; only sums say that their order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from torch_bp.kernels import half, vector
from torch_bp.kernels.expression import Expression, Speller
from torch_bp.kernels.symbol import Symbol

DTYPES = {
    torch.float32: ("float32", "float32"),
    torch.float64: ("float64", "float64"),
    torch.bfloat16: ("uint16", "float32"),
    torch.float16: ("uint16", "float32"),
}  # how it is stored, how it is computed
CHUNK = 8192  # elements a thread takes at a time: four float32 streams of it fit the second-level cache

SPELLING = {
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
    "as_stored": "{0}",
}
_HALF_SPELLING = {**SPELLING, "as_stored": "widened(rounded({0}))"}
START = {"row_sum": "types.float64(0)", "row_max": "real(-math.inf)", "total": "types.float64(0)"}
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

# Sums are kept in float64, and their order is free, which lets LLVM add whole vectors. llvm.maximum lets NaN through.
_REDUCING = """
labels = pointer_to(types.int64)


@intrinsic
def add(typing_context, a, b):
    def code(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=("reassoc", "contract"))

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


def _loop(
    expression: Expression, targets: Sequence[str], dtype: torch.dtype, count: str, indent: str, copied: str = ""
) -> str:
    """The loop over one stretch of memory: load what is read, compute, store to `targets`, and one of them `copied`."""
    spell = Speller(expression, _HALF_SPELLING if half.is_half(dtype) else SPELLING)
    computed = [n for n in expression.order if n.kind != "total"]
    body = [load(n, dtype) if n.operation == "input" else spell.line(n) for n in computed]
    body += stores(spell, zip(targets, expression.outputs), "i", dtype)
    body += [f"p_copy[i] = rounded({spell.name(r)})" for t, r in zip(targets, expression.outputs) if t == copied]
    body += [gathered(spell, total) for total in expression.totals]
    lines = [f"{spell.name(total)} = {START['total']}" for total in expression.totals]
    lines += [f"for i in range({count}):", *(f"    {line}" for line in body or ["pass"])]
    lines += [f"totals[chunk, {j}] = {spell.name(total)}" for j, total in enumerate(expression.totals)]
    return "".join(f"{indent}{line}\n" for line in lines)


def gathered(spell: Speller, reduction: Symbol) -> str:
    """The line of a loop that takes one more element into a sum or a maximum."""
    value, element = spell.name(reduction), reduction.arguments[0]
    text = spell.name(element)
    if reduction.operation == "total" and element.operation == "mul":  # room for the square of any number
        text = " * ".join(f"types.float64({spell.name(factor)})" for factor in element.arguments)
    return f"{value} = {_GATHER[reduction.operation].format(value, text)}"


def load(node: Symbol, dtype: torch.dtype, place: str = "i") -> str:
    value = f"p_{node.arguments[0]}[{place}]"
    return f"in_{node.arguments[0]} = {f'widened({value})' if half.is_half(dtype) and node.kind != 'label' else value}"


def stores(spell: Speller, results: Iterable[tuple[str, Symbol]], place: str, dtype: torch.dtype) -> list[str]:
    value = "rounded({})" if half.is_half(dtype) else "{}"
    return [f"p_{t}[{place}] = {value.format(spell.name(r))}" for t, r in results if spell.name(r) != f"in_{t}"]


def _pointers(names: Sequence[str], address: str, indent: str) -> str:
    return "".join(f"{indent}p_{n} = pointer({address.format(n=n, i=i)})\n" for i, n in enumerate(names))


def function(
    expression: Expression,
    dtype: torch.dtype,
    arguments: Sequence[str],
    signature: Sequence[str],
    parallel: bool,
    more: str = "",
) -> str:
    """The module up to the body of `run`, with `more` functions; a parallel one takes the number of threads first."""
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
        + more,
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
    text = function(expression, dtype, arguments, ["int64"] * len(arguments), parallel)
    if not parallel:
        return text + _pointers(names, "a_{n}", "    ") + _loop(expression, targets, dtype, "count", "    ")
    text += f"    for chunk in prange((count + {CHUNK - 1}) // {CHUNK}):\n"
    text += f"        start = chunk * {CHUNK}\n"
    text += _pointers(names, f"a_{{n}} + start * {dtype.itemsize}", "        ")
    text += _loop(expression, targets, dtype, f"min({CHUNK}, count - start)", "        ")
    return text + "    set_num_threads(before)\n"


def text_list(
    expression: Expression,
    targets: Sequence[str],
    dtype: torch.dtype,
    parallel: bool,
    copied: tuple[str, torch.dtype] | None = None,
) -> str:
    """The module of a kernel `run(addresses, tensor, start, length, copies, totals, scalar...)` over a list of tensors.

    `addresses[r, k]` is where argument r of tensor k begins; chunk c is `length[c]` elements of tensor `tensor[c]`
    from element `start[c]` on, and total j of them goes to `totals[c, j]`. With `copied`, the name of a target and a
    dtype of 16 bits, what is written to it is also written, rounded, to where `copies[k]` says, if that is not 0.
    """
    names = expression.operands(targets)
    arguments = ["addresses", "tensor", "start", "length", *["copies"] * bool(copied)]
    arguments += ["totals"] * bool(expression.totals)
    signature = ["int64[:, ::1]", *["int64[::1]"] * (3 + bool(copied)), *["float64[:, ::1]"] * bool(expression.totals)]
    more = half.definitions(copied[1]) + "\nshort_pointer = pointer_to(types.uint16)\n\n" if copied else ""
    text = function(expression, dtype, arguments, signature, parallel, more)
    text += f"    for chunk in {'prange' if parallel else 'range'}(tensor.shape[0]):\n"
    text += f"        k = tensor[chunk]\n        first = start[chunk] * {dtype.itemsize}\n"
    text += _pointers(names, "addresses[{i}, k] + first", "        ")
    if copied:
        text += "        if copies[k] != 0:\n            p_copy = short_pointer(copies[k] + start[chunk] * 2)\n"
        text += _loop(expression, targets, dtype, "length[chunk]", "            ", copied[0]) + "        else:\n"
    text += _loop(expression, targets, dtype, "length[chunk]", "    " * (3 if copied else 2))
    return text + "    set_num_threads(before)\n" * parallel
