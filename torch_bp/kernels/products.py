"""Small matrix products on one thread.

MKL, which multiplies for torch on x86, gives a product of 32x10 by 10x32 to all threads it has. To meet takes them
longer than to multiply, the more so where something else runs on one of the cores; and what they have computed lies in
several caches afterwards. MKL can be told for the calling thread alone how many threads to use; torch's own number is
left as it is. A torch that multiplies by another library has no such function: nothing is done there.

Measured on two cores, products of either operand transposed, one thread against two: 1.3 and 2.6 us for 32x10x32, 3.4
and 3.7 us for 64x64x32, 6.2 and 5.2 us for 64x64x64; where the two cores share one, 1.2 and 4.2 us for 32x10x32, and
about the same up to 100x100x100.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from torch_bp.kernels import library
from torch_bp.kernels.plain import PLAIN_TYPES

LARGEST = 2**17  # multiplications of a product that is better done by one thread
SYMBOL = "MKL_Set_Num_Threads_Local"  # takes a number of threads, 0 for as many as there are otherwise

OPERATIONS: dict[Any, int] = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}  # where the operands begin

_is_compiling = torch.compiler.is_dynamo_compiling
_threads = torch.get_num_threads


_AS_IT_IS: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class _OneThread:
    def __init__(self, set_threads: Callable[[int], Any]) -> None:
        self._set = set_threads

    def __enter__(self) -> None:
        self._set(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._set(0)


@functools.cache
def _one_thread() -> _OneThread | None:
    """The context for products on one thread; None where there is none."""
    set_threads = library.quick(SYMBOL)
    return None if set_threads is None else _OneThread(set_threads)


def small(multiplications: int) -> bool:
    """True if a product of so many multiplications is better done by one thread, and can be."""
    return multiplications <= LARGEST and _threads() > 1 and _one_thread() is not None


def operands(operation: Any, args: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what one of `OPERATIONS` multiplies."""
    left, right = args[OPERATIONS[operation] :][:2]
    return left, right


def on_threads_that_pay(left: torch.Tensor, columns: int) -> contextlib.AbstractContextManager[None]:
    """Return a context for products of as many multiplications as one of `left` (*, I) and another of (I, columns).

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 2)
        >>> with on_threads_that_pay(a, 2):
        ...     a @ b
        tensor([[3., 3.],
                [3., 3.]])
    """
    if _is_compiling() or type(left) not in PLAIN_TYPES or not left.is_cpu or not small(left.numel() * columns):
        return _AS_IT_IS
    return _one_thread() or _AS_IT_IS
