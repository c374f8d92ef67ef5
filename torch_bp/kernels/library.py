"""The C functions that torch's library exports, made known to the compiler of CPU kernels by name."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_LIBRARY = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _LIBRARY.get(sys.platform, "libtorch_cpu.so")))


def quick(name: str) -> Any:
    """Return a function of one number that takes no time worth letting other Python threads run; None if torch has it
    not."""
    try:
        found: Any = ctypes.PyDLL(_library()._name)[name]
    except (AttributeError, OSError):
        return None
    found.argtypes = [ctypes.c_int]
    return found


def export(names: Iterable[str]) -> None:
    """Let compiled code call these functions; AttributeError or OSError where torch has them not."""
    make_known({name: ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value for name in names})


def make_known(addresses: Mapping[str, int | None]) -> None:
    """Let compiled code call what lies at these addresses by name."""
    import llvmlite.binding

    for name, address in addresses.items():
        llvmlite.binding.add_symbol(name, address)
