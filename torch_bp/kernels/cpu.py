"""Numba on the CPU: loads it, compiles the text of a kernel or finds it on disk, and runs it on torch's threads.

GNU OpenMP kills a forked child that runs parallel code after its parent did, and Numba's own thread pool aborts when
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

PARALLEL_FROM = 32768  # elements below which waking threads costs more than it brings

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_state = {"parallel_ran": False, "serial_only": False, "threads": 1}


@functools.cache
def usable() -> bool:
    """Say whether Numba can be loaded; if not, tell so once in the log."""
    try:
        with _uncollected():
            if importlib.import_module("numba").config.DISABLE_JIT:
                raise RuntimeError("NUMBA_DISABLE_JIT is set")
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

    try:
        numba.get_num_threads()
    except Exception as error:  # the user asked for a threading layer that is not there
        _log.warning("kernels run on one thread (%s: %s)", type(error).__name__, error)
        _state["serial_only"] = True
        return False
    # Both share one OpenMP library, and Numba sets its count there, which is torch's too.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    _state["serial_only"] = numba.threading_layer() == "workqueue"
    _state["parallel_ran"], _state["threads"] = True, numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    return not _state["serial_only"]


def _threads() -> int:
    """Return how many threads a large kernel takes: torch's number, or 1."""
    if _state["serial_only"]:
        return 1
    threads = torch.get_num_threads()
    if threads == 1 or not (_state["parallel_ran"] or _start_threads(threads)):
        return 1
    return min(threads, _state["threads"])


@contextlib.contextmanager
def _announced(name: str) -> Iterator[None]:
    """Say in the log that a kernel is being compiled, before the wait, where it was not found on disk.

    A line of the level INFO, and nothing on stderr: the wait is a second or two, once on a machine, and what a library
    says there unasked tears progress bars and comes once from every rank.
    """
    event: Any = importlib.import_module("numba.core.event")
    thread, told = threading.get_ident(), [False]

    def tell(compilation: Any) -> None:
        if not told[0] and threading.get_ident() == thread:
            told[0] = True
            kept = cache.folder()
            _log.info(
                "compiling the kernel %s, a second or so; %s",
                name,
                f"it is kept in {kept}"
                if kept
                else "it is not kept, as the cache folder cannot be used: set TORCH_BP_CACHE to one that can",
            )

    listener = type("Listener", (event.Listener,), {"on_start": lambda _, e: tell(e), "on_end": lambda _, e: None})
    with event.install_listener("numba:compile", listener()):
        yield


def compiled(name: str, text: str) -> ModuleType:
    """Return the module of this text, its functions compiled or taken from disk."""
    with _lock, _announced(name):
        try:
            return cache.load(name, text)
        except Exception as error:
            # A full disk, or machine code torn by a crash: the text itself is sound.
            _log.warning("kernel %s: cache unusable (%s: %s); compiling in memory", name, type(error).__name__, error)
            return cache.load(name, text, on_disk=False)


class Kernel:
    """A compiled formula for one dtype and shape of call; the serial and the parallel text are compiled when needed.

    Args:
        text: makes the module's text of `expression`, `targets`, `dtype` and whether it is parallel.
        function: the name of the module's function that is called. Default: "run".
    """

    def __init__(
        self,
        text: Callable[[Expression, Sequence[str], torch.dtype, bool], str],
        expression: Expression,
        targets: Sequence[str],
        dtype: torch.dtype,
        function: str = "run",
    ) -> None:
        self.expression = expression
        self._text, self._function = text, function
        self._arguments = (expression, tuple(targets), dtype)

    @functools.cached_property
    def serial(self) -> Callable[..., Any]:
        """The kernel for the calling thread alone."""
        return self._compiled(parallel=False)

    @functools.cached_property
    def _parallel(self) -> Callable[..., Any]:
        return self._compiled(parallel=True)

    def run(self, elements: int, *arguments: Any) -> Any:
        """Run over `elements` elements in all, on torch's number of threads; return what the kernel returns."""
        if elements < PARALLEL_FROM:
            return self.serial(*arguments)
        threads = _threads()
        return self._parallel(threads, *arguments) if threads > 1 else self.serial(*arguments)

    def _compiled(self, *, parallel: bool) -> Callable[..., Any]:
        name = f"{self.expression.name}_{'parallel' if parallel else 'serial'}_{self._function}"
        return getattr(compiled(name, self._text(*self._arguments, parallel)), self._function)
