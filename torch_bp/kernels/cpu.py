"""Numba: emits the text of a CPU kernel from an expression, compiles it or finds it on disk, and runs it.

Two shapes: one pass over one tensor, and one pass over a whole list of tensors given by a table of addresses. Both are
split into chunks that run on as many threads as torch uses. Traps that shaped the text:

- Memory is reached through typed pointers that start at the chunk: an index computed in the loop blocks vectorisation.
- `fastmath` allows contraction only. Reciprocals turn 1e-39 into Inf, the full set drops NaN.
- GNU OpenMP kills a forked child that runs parallel code after its parent did, and Numba's own thread pool aborts when
  two threads enter it: in both cases the serial kernel serves.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from torch_bp.kernels import cache
from torch_bp.kernels.expression import Expression

DTYPES = {torch.float32: "float32", torch.float64: "float64"}
CHUNK = 8192  # elements a thread takes at a time: four float32 streams of it fit the second-level cache
PARALLEL_FROM = 32768  # elements below which waking threads costs more than it brings

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_state = {"parallel_ran": False, "serial_only": False, "threads": 1}

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
    "exp": "math.exp({0})",
    "log": "math.log({0})",
    "tanh": "math.tanh({0})",
    "erf": "math.erf({0})",
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
}

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

_HEAD = '''"""{name}: made by torch_bp from a formula."""
import math
from numba import njit, prange, types
from numba.extending import intrinsic

{pointer}

real = types.{dtype}
pointer = pointer_to(real)
# Numba's functions of these names, which it declares in a way that keeps the code out of the cache
get_num_threads = types.ExternalFunction("get_num_threads", types.intp())
set_num_threads = types.ExternalFunction("set_num_threads", types.void(types.intp))


@njit("void({signature})", cache=ON_DISK, nogil=True, parallel={parallel}, fastmath={{"contract"}}, error_model="numpy")
'''


@functools.cache
def usable() -> bool:
    """Say whether Numba can be loaded; if not, tell so once in the log."""
    try:
        with _uncollected():
            importlib.import_module("numba")
            with contextlib.suppress(ImportError, AttributeError):  # a Numba that is built otherwise starts more slowly
                _spare_scipy()
                importlib.import_module("numba.core.registry").cpu_target.target_context.refresh()
    except Exception as error:
        _log.warning(
            "Numba cannot be used (%s: %s); formulas run as torch operations, slower and with the same results. "
            "Remedy: pip install --upgrade numba.",
            type(error).__name__,
            error,
        )
        return False
    os.register_at_fork(after_in_child=_after_fork)
    return True


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector while Numba loads: it makes half a million objects, and all of them stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _spare_scipy() -> None:
    """Let Numba see that SciPy is installed without importing its linear algebra, a third of the time of a first call.

    Numba does that as it loads what it knows of arrays. When a user's function calls for BLAS, it imports it then.
    """
    linalg: Any = importlib.import_module("numba.np.linalg")
    if "numba.np.arraymath" in sys.modules or importlib.util.find_spec("scipy") is None:
        return
    check = linalg.ensure_blas
    linalg.ensure_blas = lambda: None
    try:
        arrays: Any = importlib.import_module("numba.np.arraymath")
        arrays.ensure_blas = check
    finally:
        linalg.ensure_blas = check


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it
    _state["serial_only"] |= _state["parallel_ran"]


def _start_threads(threads: int) -> bool:
    """Start Numba's threads; False if only the thread pool that aborts on concurrent use is there."""
    import numba

    numba.get_num_threads()
    # Both share one OpenMP library, and Numba sets its count there, which is torch's too.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    _state["serial_only"] = numba.threading_layer() == "workqueue"
    _state["parallel_ran"], _state["threads"] = True, numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return not _state["serial_only"]


def _loop(expression: Expression, targets: Sequence[str], count: str, indent: str) -> str:
    """The loop over one stretch of memory: load what is read, compute, store to `targets`."""
    lines, results = expression.statements(_SPELLING)
    used = expression.used_inputs()
    body = [f"in_{name} = p_{name}[i]" for name in expression.inputs if name in used]
    body += lines
    body += [f"p_{t} [i] = {r}".replace(" [", "[") for t, r in zip(targets, results) if r != f"in_{t}"]
    return f"{indent}for i in range({count}):\n" + "".join(f"{indent}    {line}\n" for line in body or ["pass"])


def _pointers(names: Sequence[str], address: str, indent: str) -> str:
    return "".join(f"{indent}p_{n} = pointer({address.format(n=n, i=i)})\n" for i, n in enumerate(names))


def _function(arguments: Sequence[str], signature: Sequence[str], parallel: bool, **named: str) -> str:
    """The module up to the body of `run`; a parallel one takes the number of threads first."""
    text = _HEAD.format(
        pointer=POINTER, signature=", ".join(["int64"] * parallel + [*signature]), parallel=parallel, **named
    )
    if not parallel:
        return text + f"def run({', '.join(arguments)}):\n"
    text += f"def run({', '.join(['threads', *arguments])}):\n"
    return text + "    before = get_num_threads()\n    set_num_threads(threads)\n"


def text_single(expression: Expression, targets: Sequence[str], dtype: torch.dtype, parallel: bool) -> str:
    """The module of a kernel `run(count, address..., scalar...)` over one tensor."""
    names = expression.operands(targets)
    scalars = [f"s{i}" for i in range(len(expression.scalars))]
    signature = ["int64"] * (1 + len(names)) + [DTYPES[dtype]] * len(scalars)
    arguments = ["count", *(f"a_{n}" for n in names), *scalars]
    text = _function(arguments, signature, parallel, name=expression.name, dtype=DTYPES[dtype])
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
    scalars = [f"s{i}" for i in range(len(expression.scalars))]
    signature = ["int64[:, ::1]", *["int64[::1]"] * 3, *[DTYPES[dtype]] * len(scalars)]
    arguments = ["addresses", "tensor", "start", "length", *scalars]
    text = _function(arguments, signature, parallel, name=expression.name, dtype=DTYPES[dtype])
    text += f"    for chunk in {'prange' if parallel else 'range'}(tensor.shape[0]):\n"
    text += f"        k = tensor[chunk]\n        first = start[chunk] * {dtype.itemsize}\n"
    text += _pointers(names, "addresses[{i}, k] + first", "        ")
    text += _loop(expression, targets, "length[chunk]", "        ")
    return text + "    set_num_threads(before)\n" * parallel


def compiled(name: str, text: str) -> ModuleType:
    """Return the module of this text, its functions compiled or taken from disk."""
    with _lock:
        try:
            return cache.load(name, text)
        except Exception as error:
            # A full disk, or machine code torn by a crash: the text itself is sound.
            _log.warning("kernel %s: cache unusable (%s: %s); compiling in memory", name, type(error).__name__, error)
            return cache.load(name, text, on_disk=False)


class Kernel:
    """A compiled formula for one dtype and shape of call; the serial and the parallel text are compiled when needed."""

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

    @functools.cached_property
    def serial(self) -> Callable[..., None]:
        """The kernel for the calling thread alone."""
        return self._compiled(parallel=False)

    @functools.cached_property
    def _parallel(self) -> Callable[..., None]:
        return self._compiled(parallel=True)

    def run(self, elements: int, *arguments: Any) -> None:
        """Run over `elements` elements in all, on torch's number of threads."""
        if elements >= PARALLEL_FROM and not _state["serial_only"]:
            threads = torch.get_num_threads()
            if threads > 1:
                return self._run_parallel(threads, arguments)
        self.serial(*arguments)

    def _run_parallel(self, threads: int, arguments: tuple[Any, ...]) -> None:
        if not _state["parallel_ran"] and not _start_threads(threads):
            return self.run(0, *arguments)
        self._parallel(min(threads, _state["threads"]), *arguments)

    def _compiled(self, *, parallel: bool) -> Callable[..., None]:
        text = self._text(*self._arguments, parallel)
        return compiled(f"{self.expression.name}_{'parallel' if parallel else 'serial'}", text).run
