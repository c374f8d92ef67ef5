"""Triton's text of a CUDA kernel, from an expression.

One pass over one tensor, or over a list of tensors given by a table of addresses; loops over the rows of matrices are
in `torch_bp.kernels.cuda_row_text`. float16 and bfloat16 are loaded and stored as they are and computed in float32.
Square roots and divisions round to nearest, as IEEE and torch do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

from torch_bp.kernels.expression import Expression, Speller
from torch_bp.kernels.symbol import Symbol

DTYPES = {
    torch.float16: ("float16", "float32"),
    torch.bfloat16: ("bfloat16", "float32"),
    torch.float32: ("float32", "float32"),
    torch.float64: ("float64", "float64"),
}  # how it is stored, how it is computed

CHUNK = 4096  # elements of a list that one program takes

SPELLING = {
    "constant": "tl.full((), {0}, REAL)",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "divide({0}, {1})",
    "pow": "power({0}, {1})",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "sqrt": "root({0})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "tanh": "tanh({0})",
    "erf": "tl.erf({0})",
    "sigmoid": "divide(tl.full((), 1.0, REAL), 1 + tl.exp(-{0}))",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0)).to(REAL)",
    "number": "tl.where({0}, 1.0, 0.0).to(REAL)",
    "where": "tl.where({0}, {1}, {2})",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "({0} == 0)",
    "one_hot": "tl.where(place == {0}, 1.0, 0.0).to(REAL)",
    "zeros_like": "tl.zeros((BLOCK,), REAL)",
    "as_stored": "{0}.to(STORED).to(REAL)",
}
_REDUCE = {
    "row_sum": ("0.0", "{0} + {1}", "tl.sum({0}, 0)"),
    "row_max": ("float('-inf')", "larger({0}, {1})", "tl.reduce({0}, 0, larger)"),
    "total": ("0.0", "{0} + {1}", "tl.sum({0}, 0)"),
}

_ROUNDED = """
@triton.jit
def divide(a, b):
    a, b = tl.broadcast(a, b)
    return tl.div_rn(a, b)


@triton.jit
def root(a):
    return tl.sqrt_rn(a)
"""

_DOUBLE = """
@triton.jit
def divide(a, b):
    return a / b


@triton.jit
def root(a):
    return tl.sqrt(a)
"""

_LIBRARY = """
@triton.jit
def power(a, b):
    a, b = tl.broadcast(a, b)
    return libdevice.pow(a, b)


@triton.jit
def tanh(a):
    return libdevice.tanh(a)
"""

# The interpreter has no libdevice: these stand in for it on the CPU alone.
_INTERPRETED_LIBRARY = """
@triton.jit
def power(a, b):
    magnitude = tl.exp(b * tl.log(tl.abs(a)))
    whole = tl.where(tl.floor(b) == b, 1.0, float("nan"))
    even = tl.where(tl.floor(b / 2) * 2 == b, 1.0, -1.0)
    signed = tl.where(a < 0, magnitude * whole * even, magnitude)
    at_zero = tl.where(b > 0, 0.0, float("inf"))
    return tl.where(b == 0, 1.0, tl.where(a == 0, at_zero, signed)).to(a.dtype)


@triton.jit
def tanh(a):
    e = tl.exp(-2 * tl.abs(a))
    small = a - a * a * a / 3
    size = tl.where(tl.abs(a) < 1e-3, tl.abs(small), (1 - e) / (1 + e))
    return tl.where(a < 0, -size, tl.where(a != a, a, size))
"""

_HEAD = '''"""{name}: made by torch_bp from a formula."""
import triton
import triton.language as tl
from triton.language.extra import libdevice

REAL = tl.constexpr(tl.{real})
STORED = tl.constexpr(tl.{stored})
{library}

@triton.jit
def run({arguments}, BLOCK: tl.constexpr):
'''


def interpreted() -> bool:
    """True where Triton interprets kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _library(real: str) -> str:
    return (_ROUNDED if real == "float32" else _DOUBLE) + (_INTERPRETED_LIBRARY if interpreted() else _LIBRARY)


def load(node: Symbol, place: str, mask: str) -> str:
    name = node.arguments[0]
    return f"in_{name} = tl.load(p_{name} + {place}, mask={mask}).to(REAL)"


def stores(spell: Speller, results: Iterable[tuple[str, Symbol]], place: str, mask: str) -> list[str]:
    mask = f", mask={mask}" if mask else ""
    return [
        f"tl.store(p_{t} + {place}, {spell.name(r)}.to(STORED){mask})" for t, r in results if spell.name(r) != f"in_{t}"
    ]


def _body(expression: Expression, targets: Sequence[str], place: str, mask: str, indent: str) -> str:
    spell = Speller(expression, SPELLING)
    computed = [n for n in expression.order if n.kind != "total"]
    body = [load(n, place, mask) if n.operation == "input" else spell.line(n) for n in computed]
    body += stores(spell, zip(targets, expression.outputs), place, mask)
    body += [gathered(spell, total) for total in expression.totals]
    return "".join(f"{indent}{line}\n" for line in body)


def started(spell: Speller, reduction: Symbol) -> str:
    return f"many_{spell.name(reduction)} = tl.full((BLOCK,), {_REDUCE[reduction.operation][0]}, REAL)"


def gathered(spell: Speller, reduction: Symbol) -> str:
    """The line of a loop that takes one more block into a sum or a maximum."""
    start, gather, _ = _REDUCE[reduction.operation]
    many = f"many_{spell.name(reduction)}"
    return f"{many} = {gather.format(many, f'tl.where(inside, {spell.name(reduction.arguments[0])}, {start})')}"


def reduced(spell: Speller, reduction: Symbol) -> str:
    return _REDUCE[reduction.operation][2].format(f"many_{spell.name(reduction)}")


def begun(
    expression: Expression,
    dtype: torch.dtype,
    from_table: bool,
    arguments: Sequence[str],
    last: Sequence[str] = (),
    library: str = "",
) -> str:
    """How each module begins: up to where its kernel `run(arguments..., scalar..., last...)` has read its scalars.

    Args:
        from_table: the scalars are in memory of the device, which is one argument. Else each is one.
        library: functions that the kernel calls besides.
    """
    stored, real = DTYPES[dtype]
    count = len(expression.scalars)
    scalars, read = [f"v{i}" for i in range(count)], "tl.full((), v{i}, REAL)"
    if from_table and count:
        scalars, read = ["scalars"], "tl.load(scalars + {i}).to(REAL)"
    text = _HEAD.format(
        name=expression.name,
        real=real,
        stored=stored,
        library=_library(real) + library,
        arguments=", ".join([*arguments, *scalars, *last]),
    )
    return text + "".join(f"    s{i} = {read.format(i=i)}\n" for i in range(count))


def text_single(expression: Expression, targets: Sequence[str], dtype: torch.dtype, from_table: bool) -> str:
    """The module of a kernel `run(count, tensor..., scalar...)` over one tensor."""
    names = [f"p_{n}" for n in expression.operands(targets)]
    text = begun(expression, dtype, from_table, ["count", *names])
    text += "    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)\n    inside = place < count\n"
    return text + _body(expression, targets, "place", "inside", "    ")


def text_list(
    expression: Expression,
    targets: Sequence[str],
    dtype: torch.dtype,
    from_table: bool,
    guarded: bool = False,
    copied: tuple[str, torch.dtype] | None = None,
) -> str:
    """The module of a kernel `run(addresses, columns, tensor, start, length, skip, copies, totals, scalar...)`.

    Total j of chunk c goes to `totals[c, j]`. A `guarded` one does nothing where the number at `skip` is not 0.
    `copied` is as of `cpu_text.text_list`.
    """
    spell, totals = Speller(expression, SPELLING), expression.totals
    given = ["addresses", "columns", "tensor", "start", "length", *["skip"] * guarded]
    given += ["copies"] * bool(copied) + ["totals"] * bool(totals)
    text = begun(expression, dtype, from_table, given, ["CHUNK: tl.constexpr"])
    text += "    chunk = tl.program_id(0)\n    k = tl.load(tensor + chunk)\n"
    text += "    first = tl.load(start + chunk)\n    count = tl.load(length + chunk)\n"
    text += "    count = tl.where(tl.load(skip) == 0, count, 0)\n" * guarded
    for row, name in enumerate(expression.operands(targets)):
        text += f"    p_{name} = tl.load(addresses + {row} * columns + k).to(tl.pointer_type(STORED)) + first\n"
    if copied:
        text += "    copy = tl.load(copies + k)\n    copied = tl.where(copy == 0, 0, count)\n"
        text += f"    p_copy = copy.to(tl.pointer_type(tl.{DTYPES[copied[1]][0]})) + first\n"
    text += "".join(f"    {started(spell, total)}\n" for total in totals)
    text += "    for step in range(0, CHUNK, BLOCK):\n"
    text += "        place = step + tl.arange(0, BLOCK)\n        inside = place < count\n"
    text += _body(expression, targets, "place", "inside", "        ")
    if copied:
        value = dict(zip(targets, (spell.name(r) for r in expression.outputs)))[copied[0]]
        text += f"        tl.store(p_copy + place, {value}.to(tl.{DTYPES[copied[1]][0]}), mask=place < copied)\n"
    return text + "".join(
        f"    tl.store(totals + chunk * {len(totals)} + {j}, {reduced(spell, total)}.to(tl.float64))\n"
        for j, total in enumerate(totals)
    )
