"""The way into a CPU kernel for a call on few tensors: one compiled function looks at them and runs the kernel.

From Python each question to a tensor costs about as much as the arithmetic of a small one. Here handles of tensors go
in (`torch_bp.kernels.native`), and what comes out says whether the kernel has run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch_bp.kernels import cpu, native
from torch_bp.kernels.cpu_row_text import text_rows
from torch_bp.kernels.cpu_text import DTYPES, text_single
from torch_bp.kernels.expression import Expression
from torch_bp.kernels.sequence import Record, bits

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


# The same for a record (`torch_bp.kernels.sequence`), which has handles first, and then a word for each number that the
# scalars are computed from: a double, or the address of one in memory.
_PACKED = """

from numba import cfunc

doubles, singles = pointer_to(types.float64), pointer_to(types.float32)


@cfunc("int64(int64)", cache=ON_DISK)
def packed(place):
    words, numbers = integers(place), doubles(place)
{given}
    return entry({arguments}) == {unfit}
"""
_READ = {
    None: "numbers[{0}]",
    torch.float64: "doubles(words[{0}])[0]",
    torch.float32: "types.float64(singles(words[{0}])[0])",
    torch.int64: "types.float64(integers(words[{0}])[0])",
}


def entry(expression: Expression, targets: Sequence[str], dtype: torch.dtype, by_rows: bool) -> cpu.Kernel | None:
    """Return the way into a kernel over one tensor, or over the rows of matrices; None where there can be none.

    Its `run(elements, handle..., scalar...)` takes handles of the inputs and of the results, and returns UNFIT if the
    tensors are not for the kernel; then nothing was done.
    """
    if native.entries() is None:  # compiled code cannot look at tensors
        return None
    return cpu.Kernel(_text_rows if by_rows else _text_single, expression, targets, dtype, function="entry")


class Packed:
    """The way into a kernel for a record, on one thread.

    Args:
        expression, targets, dtype, by_rows: as of `entry`.
    """

    def __init__(self, expression: Expression, targets: Sequence[str], dtype: torch.dtype, by_rows: bool) -> None:
        self._expression, self._targets, self._dtype = expression, list(targets), dtype
        self._text = _text_rows if by_rows else _text_single
        self._addresses: dict[Any, int] = {}

    def record(self, tensors: Sequence[torch.Tensor], keywords: Mapping[str, Any]) -> Record | None:
        """Return the record for tensors that stay, inputs and then results; None where there can be none.

        Numbers are as they are now; what is a tensor of one element is read whenever the record runs.
        """
        if native.entries() is None:
            return None
        expression = self._expression
        words = [native.handle_of(t) for t in tensors]
        given: list[tuple[str, Any]] = []
        if not any(isinstance(value, torch.Tensor) for value in keywords.values()):
            values = expression.host(**keywords)
            names = [f"s{i}" for i in range(len(values))]
            words += map(bits, values)
            return Record(self._address([(name, None) for name in names], ", ".join(names)), words, [tensors])
        for name, value in keywords.items():
            if isinstance(value, torch.Tensor):
                if not value.is_cpu or value.dtype not in _READ:
                    return None
                words.append(value.data_ptr())
                given.append((name, value.dtype))
            elif type(value) in (int, float):
                words.append(bits(value))
                given.append((name, None))
        if not expression.arithmetic:
            return None
        return Record(self._address(given, expression.arithmetic), words, [tensors, keywords])

    def _address(self, given: Sequence[tuple[str, Any]], scalars: str) -> int:
        """Return where the function lies that reads these numbers and computes the scalars."""
        key = *given, scalars
        if key not in self._addresses:
            count = len(self._expression.scalars)
            handles = [f"words[{k}]" for k in range(len(self._expression.operands(self._targets)))]
            lines = [f"    {name} = {_READ[kind].format(len(handles) + k)}" for k, (name, kind) in enumerate(given)]
            lines += [f"    scalars = ({scalars.rstrip(',')},)"] * bool(count)

            def text(expression: Expression, targets: Sequence[str], dtype: torch.dtype, parallel: bool) -> str:
                passed = [f"real(scalars[{k}])" for k in range(count)]
                end = _PACKED.format(
                    given="\n".join(lines), arguments=", ".join([*handles, *passed]), unfit=native.UNFIT
                )
                return self._text(expression, targets, dtype, parallel) + end

            kernel: Any = cpu.Kernel(text, self._expression, self._targets, self._dtype, "packed").serial
            self._addresses[key] = kernel.address
        return self._addresses[key]


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
