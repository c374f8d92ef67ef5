"""Which engine serves a tensor of some device and dtype, and how to force it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from torch_bp.kernels import cpu, cpu_text, cuda, cuda_text, half

ENGINES = ("auto", "torch", "numba", "triton")

_engine = "auto"


def use(engine: str) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that forces the engine of every formula in this process, for tests and debugging.

    Process-wide and not thread-local, because backward runs in other threads. What a kernel cannot serve still runs as
    torch operations.

    Args:
        engine: "torch" (the formula as it is), "numba" (CPU), "triton" (CUDA; on the CPU where Triton interprets), or
            "auto" (default: Numba on the CPU, Triton on CUDA).

    Raises:
        ValueError: `engine` is none of these.

    Example:
        >>> import torch, torch_bp
        >>> with torch_bp.kernels.use("torch"):
        ...     torch_bp.nn.functional.tanh(torch.zeros(1))
        tensor([0.])
    """
    if engine not in ENGINES:
        raise ValueError(f"kernels.use: engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}.")
    return _forcing(engine)


@contextlib.contextmanager
def _forcing(engine: str) -> Iterator[None]:
    global _engine
    before, _engine = _engine, engine
    try:
        yield
    finally:
        _engine = before


def forced() -> str:
    """Return the engine that `use` has forced, or "auto"."""
    return _engine


def serving(tensor: torch.Tensor) -> str | None:
    """Return the engine that has kernels for plain tensors of this one's device and dtype."""
    if _engine == "torch":
        return None
    if tensor.is_cpu:
        if _engine == "triton":
            return "triton" if tensor.dtype in cuda_text.DTYPES and cuda_text.interpreted() and cuda.usable() else None
        served = tensor.dtype in cpu_text.DTYPES and cpu.usable() and half.usable(tensor.dtype)
        return "numba" if served else None
    if tensor.is_cuda and _engine != "numba":
        return "triton" if tensor.dtype in cuda_text.DTYPES and cuda.usable() else None
    return None
