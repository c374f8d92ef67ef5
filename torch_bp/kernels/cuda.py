"""Triton: emits the text of a CUDA kernel from an expression and launches it.

Two shapes, as on the CPU: one pass over one tensor, and one pass over a list of tensors given by a table of addresses.
float16 and bfloat16 are loaded and stored as they are and computed in float32. Square roots and divisions round to
nearest, as IEEE and torch do; FP fusion is set at the launch rather than left to a default.

Numbers reach a float32 kernel as arguments. For float64, and where a scalar is itself a tensor on the device (a
captured training step), they come from a float64 table on the device, because Triton passes numbers as float32.

With `TRITON_INTERPRET=1` in the environment before Triton is loaded, the same text runs on CPU tensors, slowly.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from torch_bp.kernels import cache
from torch_bp.kernels.expression import Expression
from torch_bp.kernels.table import Table

DTYPES = {
    torch.float16: ("float16", "float32"),
    torch.bfloat16: ("bfloat16", "float32"),
    torch.float32: ("float32", "float32"),
    torch.float64: ("float64", "float64"),
}  # how it is stored, how it is computed
CHUNK = 4096  # elements of a list that one program takes
BLOCK = 1024
LAUNCH = {
    "num_warps": 4,
    "enable_fp_fusion": True,
}  # as nvcc compiles torch's kernels, and Numba ours ("contract")

_log = logging.getLogger(__name__)
_lock = threading.RLock()

_SPELLING = {
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


@functools.cache
def usable() -> bool:
    """Say whether Triton can be loaded; if not, tell so once in the log."""
    try:
        import triton

        if not interpreted():
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


def interpreted() -> bool:
    """True where Triton interprets kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _library(real: str) -> str:
    return (_ROUNDED if real == "float32" else _DOUBLE) + (_INTERPRETED_LIBRARY if interpreted() else _LIBRARY)


def _body(expression: Expression, targets: Sequence[str], place: str, mask: str, indent: str) -> str:
    lines, results = expression.statements(_SPELLING)
    used = expression.used_inputs()
    body = [f"in_{n} = tl.load(p_{n} + {place}, mask={mask}).to(REAL)" for n in expression.inputs if n in used]
    body += lines
    body += [
        f"tl.store(p_{t} + {place}, {r}.to(STORED), mask={mask})" for t, r in zip(targets, results) if r != f"in_{t}"
    ]
    return "".join(f"{indent}{line}\n" for line in body)


def _scalars(expression: Expression, from_table: bool) -> tuple[list[str], str]:
    """The arguments that bring the scalars in, and the lines that read them."""
    count = len(expression.scalars)
    if not count:
        return [], ""
    if from_table:
        return ["scalars"], "".join(f"    s{i} = tl.load(scalars + {i}).to(REAL)\n" for i in range(count))
    return [f"v{i}" for i in range(count)], "".join(f"    s{i} = tl.full((), v{i}, REAL)\n" for i in range(count))


def text_single(expression: Expression, targets: Sequence[str], dtype: torch.dtype, from_table: bool) -> str:
    """The module of a kernel `run(count, tensor..., scalar...)` over one tensor."""
    stored, real = DTYPES[dtype]
    arguments, reading = _scalars(expression, from_table)
    names = [f"p_{n}" for n in expression.operands(targets)]
    text = _HEAD.format(
        name=expression.name,
        real=real,
        stored=stored,
        library=_library(real),
        arguments=", ".join(["count", *names, *arguments]),
    )
    text += reading
    text += "    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)\n    inside = place < count\n"
    return text + _body(expression, targets, "place", "inside", "    ")


def text_list(expression: Expression, targets: Sequence[str], dtype: torch.dtype, from_table: bool) -> str:
    """The module of a kernel `run(addresses, columns, tensor, start, length, scalar...)` over a list of tensors."""
    stored, real = DTYPES[dtype]
    arguments, reading = _scalars(expression, from_table)
    text = _HEAD.format(
        name=expression.name,
        real=real,
        stored=stored,
        library=_library(real),
        arguments=", ".join(["addresses", "columns", "tensor", "start", "length", *arguments, "CHUNK: tl.constexpr"]),
    )
    text += reading
    text += "    chunk = tl.program_id(0)\n    k = tl.load(tensor + chunk)\n"
    text += "    first = tl.load(start + chunk)\n    count = tl.load(length + chunk)\n"
    for row, name in enumerate(expression.operands(targets)):
        text += f"    p_{name} = tl.load(addresses + {row} * columns + k).to(tl.pointer_type(STORED)) + first\n"
    text += "    for step in range(0, CHUNK, BLOCK):\n"
    text += "        place = step + tl.arange(0, BLOCK)\n        inside = place < count\n"
    return text + _body(expression, targets, "place", "inside", "        ")


class Kernel:
    """A formula on the device for one dtype and shape of call."""

    def __init__(
        self,
        text: Callable[[Expression, Sequence[str], torch.dtype, bool], str],
        expression: Expression,
        targets: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        self.expression = expression
        self._text = text
        self._arguments = (expression, tuple(targets), dtype)
        self._runs: dict[bool, Any] = {}

    def _run(self, from_table: bool) -> Any:
        if from_table not in self._runs:
            with _lock:
                text = self._text(*self._arguments, from_table)
                self._runs[from_table] = cache.load(f"{self.expression.name}_triton", text).run
        return self._runs[from_table]

    def _scalars(self, values: Sequence[Any], device: torch.device) -> tuple[bool, list[Any]]:
        """Return whether the scalars go through a table, and the arguments that carry them."""
        dtype = self._arguments[2]
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

    def run_list(self, table: Table, device: torch.device, values: Sequence[Any]) -> None:
        """Run over the tensors of a table."""
        with _device(device):
            from_table, scalars = self._scalars(values, device)
            addresses, chunks = table.on_device(device)
            self._run(from_table)[(len(table.tensor),)](
                addresses, addresses.shape[1], *chunks, *scalars, CHUNK=CHUNK, BLOCK=BLOCK, **LAUNCH
            )


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
