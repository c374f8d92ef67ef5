"""Triton on CUDA: loads it, compiles the text of a kernel and launches it.

FP fusion is set at the launch rather than left to a default. Numbers reach a float32 kernel as arguments. For float64,
and where a scalar is itself a tensor on the device (a captured training step), they come from a float64 table on the
device, because Triton passes numbers as float32.

With `TRITON_INTERPRET=1` in the environment before Triton is loaded, the same text runs on CPU tensors, slowly.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from torch_bp.kernels import cache, cuda_text
from torch_bp.kernels.expression import Expression
from torch_bp.kernels.table import Table

BLOCK = 1024
COLUMNS, ROWS = 256, 16  # that a program takes where columns are added up
LAUNCH = {
    "num_warps": 4,
    "enable_fp_fusion": True,
}  # as nvcc compiles torch's kernels, and Numba ours ("contract")

_log = logging.getLogger(__name__)
_lock = threading.RLock()


@functools.cache
def usable() -> bool:
    """Say whether Triton can be loaded; if not, tell so once in the log."""
    try:
        import triton

        if not cuda_text.interpreted():
            triton.runtime.driver.active.get_current_target()  # needs a driver and a C compiler
    except Exception as error:
        _log.warning(
            "Triton cannot be used (%s: %s); formulas on CUDA run as torch operations, slower and with the same "
            "results. Remedy: pip install triton.",
            type(error).__name__,
            error,
        )
        return False
    return True


class Kernel:
    """A formula on the device for one dtype and shape of call."""

    def __init__(
        self,
        text: Callable[..., str],
        expression: Expression,
        targets: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        self.expression = expression
        self._text = text
        self._arguments = (expression, tuple(targets), dtype)
        self._runs: dict[tuple[Any, ...], Any] = {}

    def _run(self, *key: Any) -> Any:
        if key not in self._runs:
            with _lock:
                text = self._text(*self._arguments, *key)
                self._runs[key] = cache.load(f"{self.expression.name}_triton", text).run
        return self._runs[key]

    def _scalars(self, values: Any, device: torch.device) -> tuple[bool, list[Any]]:
        """Return whether the scalars go through a table, and the arguments that carry them."""
        dtype = self._arguments[2]
        if isinstance(values, torch.Tensor):
            return True, [values]
        if not values:
            return False, []
        if any(isinstance(v, torch.Tensor) for v in values):
            return True, [torch.stack([_column(v, device) for v in values])]
        if dtype is torch.float64 and _capturing(device):
            return True, [torch.stack([_column(v, device) for v in values])]
        if dtype is torch.float64:
            return True, [torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)]
        return False, [float(v) for v in values]

    def run_single(self, tensors: Sequence[torch.Tensor], values: Sequence[Any]) -> None:
        """Run over tensors of one shape; the results are the last of them."""
        count = tensors[0].numel()
        with _device(tensors[0].device):
            from_table, scalars = self._scalars(values, tensors[0].device)
            self._run(from_table)[(-(-count // BLOCK),)](count, *tensors, *scalars, BLOCK=BLOCK, **LAUNCH)

    def run_rows(
        self, count: int, columns: int, rows: int, tensors: Sequence[torch.Tensor], values: Sequence[Any]
    ) -> None:
        """Run over matrices of `count` rows, and columns; a program takes `rows` of them."""
        device = tensors[0].device
        with _device(device):
            from_table, scalars = self._scalars(values, device)
            grid = (-(-count // rows),)
            self._run(from_table)[grid](count, columns, rows, *tensors, *scalars, BLOCK=BLOCK, **LAUNCH)

    def run_columns(
        self, count: int, columns: int, rows: int, tensors: Sequence[torch.Tensor], values: Sequence[Any]
    ) -> None:
        """As `run_rows`; a program takes COLUMNS columns of `rows` rows."""
        device = tensors[0].device
        with _device(device):
            from_table, scalars = self._scalars(values, device)
            grid = -(-columns // COLUMNS), -(-count // rows)
            self._run(from_table)[grid](count, columns, rows, *tensors, *scalars, BLOCK=COLUMNS, **LAUNCH)

    def run_list(
        self, table: Table, device: torch.device, values: Any, skip: torch.Tensor | None = None, copied: Any = None
    ) -> torch.Tensor | None:
        """Run over the tensors of a table; return the totals of each chunk, if there are any.

        Args:
            table: has looked at the tensors.
            device: theirs.
            values: the scalars, numbers or tensors of one element, or one float64 tensor on the device with all.
            skip: one int32 on the device: where it is not 0 when the kernel runs, nothing is done.
            copied: as of `cuda_text.text_list`, with the addresses in the table.
        """
        totals = self._totals(len(table.tensor), device)
        with _device(device):
            from_table, scalars = self._scalars(values, device)
            addresses, chunks, _ = table.on_device(device)
            form = () if skip is None and copied is None else (skip is not None, copied)
            self._run(from_table, *form)[(len(table.tensor),)](
                addresses,
                addresses.shape[1],
                *chunks,
                *([] if skip is None else [skip]),
                *([] if copied is None else [table.copies_on(device)]),
                *([] if totals is None else [totals]),
                *scalars,
                CHUNK=cuda_text.CHUNK,
                BLOCK=BLOCK,
                **LAUNCH,
            )
        return totals

    def _totals(self, chunks: int, device: torch.device) -> torch.Tensor | None:
        count = len(self.expression.totals)
        return torch.empty(chunks, count, dtype=torch.float64, device=device) if count else None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _column(value: Any, device: torch.device) -> torch.Tensor:
    """One number of the table, filled in on the device: a copy from the host could not be captured."""
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float64).reshape(())
    return torch.full((), value, dtype=torch.float64, device=device)


def _device(device: torch.device) -> Any:
    """Make `device` current; the interpreter computes with numpy, which would warn of overflow and NaN."""
    return torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore")
