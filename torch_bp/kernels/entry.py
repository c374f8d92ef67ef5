"""The way into a CPU kernel for a call on few tensors: one compiled function looks at them and runs the kernel.

From Python each question to a tensor costs about as much as the arithmetic of a small one. Here handles of tensors go
in (`torch_bp.kernels.native`), and what comes out says whether the kernel has run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

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


class Entry:
    """A kernel over one tensor, or over the rows of matrices, for one dtype.

    Call it with the number of elements, then handles of inputs and results, then scalars. True: the kernel has run.
    False: the tensors are not for it, and nothing was done.
    """

    def __init__(self, expression: Expression, targets: Sequence[str], dtype: torch.dtype, by_rows: bool) -> None:
        self._arguments = expression, tuple(targets), dtype
        self._by_rows = by_rows

    @classmethod
    def over_tensors(cls, expression: Expression, targets: Sequence[str], dtype: torch.dtype) -> Entry | None:
        """Return the entry to a kernel over one tensor, or None where compiled code cannot look at tensors."""
        return cls(expression, targets, dtype, by_rows=False) if native.functions() else None

    @classmethod
    def over_rows(cls, expression: Expression, targets: Sequence[str], dtype: torch.dtype) -> Entry | None:
        """As `over_tensors`, to a kernel over the rows of matrices, the first of its tensors."""
        return cls(expression, targets, dtype, by_rows=True) if native.functions() else None

    def __call__(self, elements: int, *arguments: Any) -> bool:
        if elements < cpu.PARALLEL_FROM:
            return self._serial(*arguments) != native.UNFIT
        threads = cpu.threads_for(elements)
        if threads == 1:
            return self._serial(*arguments) != native.UNFIT
        return self._parallel(threads, *arguments) != native.UNFIT

    @functools.cached_property
    def _serial(self) -> Callable[..., int]:
        return self._compiled(parallel=False)

    @functools.cached_property
    def _parallel(self) -> Callable[..., int]:
        return self._compiled(parallel=True)

    def _compiled(self, *, parallel: bool) -> Callable[..., int]:
        text = (text_rows if self._by_rows else text_single)(*self._arguments, parallel)
        text += _text(*self._arguments, self._by_rows, parallel)
        return cpu.compiled(f"{self._arguments[0].name}_{'parallel' if parallel else 'serial'}_entry", text).entry


def _text(expression: Expression, targets: Sequence[str], dtype: torch.dtype, by_rows: bool, parallel: bool) -> str:
    """The function `entry(handle..., scalar...)`, for the end of a module with `run`.

    A parallel one takes the number of threads first. It returns the number of elements, or `native.UNFIT`.
    """
    names = expression.operands(targets)
    count, scalars = len(names), [f"s{i}" for i in range(len(expression.scalars))]
    addresses = [f"words[{k}]" for k in range(count)]
    sizes, look = ["elements"], f"alike(place, {count})"
    if by_rows:
        kinds = dict(expression.kinds) | {t: r.kind.removesuffix(" sum") for t, r in zip(targets, expression.outputs)}
        code = sum(native.KINDS.index(kinds[n]) << 2 * k for k, n in enumerate(names))
        sizes, look = [f"words[{count}]", f"words[{count + 1}]"], f"fitting(place, {count}, {code})"
    threads = ["threads"] * parallel
    return _TEXT.format(
        words=count + native.ROOM,
        signature=", ".join(["int64"] * (count + parallel) + [DTYPES[dtype][1]] * len(scalars)),
        arguments=", ".join([*threads, *(f"h_{n}" for n in names), *scalars]),
        given="\n".join(f"    words[{k}] = h_{n}" for k, n in enumerate(names)),
        look=look,
        unfit=native.UNFIT,
        passed=", ".join([*threads, *sizes, *addresses, *scalars]),
    )
