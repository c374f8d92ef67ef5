"""The way into a CPU kernel for a call on few tensors: one compiled function looks at them and runs the kernel.

From Python each question to a tensor costs about as much as the arithmetic of a small one. Here handles of tensors go
in (`torch_bp.kernels.native`), and what comes out says whether the kernel has run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_bp.kernels import cpu, native
from torch_bp.kernels.cpu_row_text import text_rows
from torch_bp.kernels.cpu_text import DTYPES, text_single
from torch_bp.kernels.expression import Expression

_TEXT = """

from numba.core.cgutils import alloca_once

integers = pointer_to(types.int64)
alike = types.ExternalFunction("torch_bp_alike", types.int64(types.int64, types.int64))
fitting = types.ExternalFunction("torch_bp_fitting", types.int64(types.int64, types.int64, types.int64))


@intrinsic
def room(typing_context):
    def code(context, builder, signature, arguments):
        return builder.ptrtoint(alloca_once(builder, ir.IntType(64), size={words}), ir.IntType(64))

    return types.int64(), code


@njit("int64({signature})", cache=ON_DISK, nogil=True, error_model="numpy")
def entry({arguments}):
    place = room()
    words = integers(place)
{given}
    elements = {look}
    if elements != {unfit}:
        run({passed})
    return elements
"""


def entry(expression: Expression, targets: Sequence[str], dtype: torch.dtype, by_rows: bool) -> cpu.Kernel | None:
    """Return the way into a kernel over one tensor, or over the rows of matrices; None where there can be none.

    Its `run(elements, handle..., scalar...)` takes handles of the inputs and of the results, and returns UNFIT if the
    tensors are not for the kernel; then nothing was done.
    """
    if native.entries() is None:  # compiled code cannot look at tensors
        return None
    return cpu.Kernel(_text_rows if by_rows else _text_single, expression, targets, dtype, function="entry")


def _text_single(expression: Expression, targets: Sequence[str], dtype: torch.dtype, parallel: bool) -> str:
    names = expression.operands(targets)
    text = text_single(expression, targets, dtype, parallel)
    return text + _text(expression, names, dtype, parallel, f"alike(place, {len(names)})", ["elements"])


def _text_rows(expression: Expression, targets: Sequence[str], dtype: torch.dtype, parallel: bool) -> str:
    names = expression.operands(targets)
    kinds = dict(expression.kinds) | {t: r.kind.removesuffix(" sum") for t, r in zip(targets, expression.outputs)}
    code = sum(native.KINDS.index(kinds[n]) << 2 * k for k, n in enumerate(names))
    count = len(names)
    sizes = [f"words[{count}]", f"words[{count + 1}]"]
    text = text_rows(expression, targets, dtype, parallel)
    return text + _text(expression, names, dtype, parallel, f"fitting(place, {count}, {code})", sizes)


def _text(
    expression: Expression, names: Sequence[str], dtype: torch.dtype, parallel: bool, look: str, sizes: Sequence[str]
) -> str:
    """The function `entry(handle..., scalar...)`, for the end of a module with `run`.

    A parallel one takes the number of threads first. It returns the number of elements, or `native.UNFIT`.
    """
    count, scalars, threads = len(names), [f"s{i}" for i in range(len(expression.scalars))], ["threads"] * parallel
    return _TEXT.format(
        words=count + native.ROOM,
        signature=", ".join(["int64"] * (count + parallel) + [DTYPES[dtype][1]] * len(scalars)),
        arguments=", ".join([*threads, *(f"h_{n}" for n in names), *scalars]),
        given="\n".join(f"    words[{k}] = h_{n}" for k, n in enumerate(names)),
        look=look,
        unfit=native.UNFIT,
        passed=", ".join([*threads, *sizes, *(f"words[{k}]" for k in range(count)), *scalars]),
    )
