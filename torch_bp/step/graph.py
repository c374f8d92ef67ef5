"""A graph of CUDA's: kernels that are captured once and launched again and again, with what they were given."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from torch_bp.kernels import capture
from torch_bp.step.recorder import NotCapturableError


class Graph:
    """A graph of CUDA's that is captured from two functions, one after the other.

    Args:
        pool: memory that the graphs of one step share.
        device: of everything in it.
        generators: of random numbers, besides torch's own, from which a replay goes on.
    """

    def __init__(self, pool: Any, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        self._graph, self._pool, self._device = torch.cuda.CUDAGraph(), pool, device
        self._generators = generators

    def capture(self, first: Callable[[], Any], then: Callable[[Any], None]) -> Any:
        """Capture `then(first())` without running it; return what `first` has returned, which replays overwrite.

        Raises:
            NotCapturableError: an operation cannot be captured; the device is as it was.
        """
        before = torch.cuda.current_stream(self._device)
        try:
            for generator in self._generators:
                self._graph.register_generator_state(generator)
            # other threads, as a loader's that pins memory, go on meanwhile
            with torch.cuda.graph(
                self._graph,
                pool=self._pool,
                stream=torch.cuda.Stream(self._device),
                capture_error_mode="thread_local",
            ):
                made = first()
                then(made)
            return made
        except RuntimeError as error:
            # where CUDA ends a capture itself, torch leaves its stream current, and memory going to the pool
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            raise NotCapturableError(f"CUDA could not capture it: {error}") from error

    def replay(self) -> None:
        """Do what was captured."""
        self._graph.replay()


class _Watcher:
    """Stands where a recorder does while CUDA records: what would read values raises instead."""

    def formula(self, *_: Any) -> Any:
        return NotImplemented


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Refuse what reads values, in this thread, for as long as the context lasts."""
    thread = threading.get_ident()
    capture.recorders[thread] = _Watcher()
    try:
        yield
    finally:
        del capture.recorders[thread]
