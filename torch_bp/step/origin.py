"""Where in a step the first number that is not finite comes from: in words, and for a monitor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_bp.autograd.entry import Entry
from torch_bp.kernels.norm import values_of
from torch_bp.step.line import Passes
from torch_bp.step.memory import Overwritten, memory_of
from torch_bp.step.watched import Monitor


class _FoundError(Exception):
    """Ends the pass at the first finding."""


def origin(passes: Passes, inputs: Any, leaves: Sequence[Tensor], modules: Iterable[torch.nn.Module]) -> str:
    """Run the pass again, looking at every result, and say in words where NaN or Inf came up first.

    What the pass writes to, of the modules and of the batch, and torch's random numbers are afterwards as before.
    """
    for place, value in (("the input", inputs), ("a parameter", leaves)):
        if _bad(value):
            return f"it is in {place}"

    def noted(entry: Entry) -> None:
        if _bad(entry.outputs):
            raise _FoundError(f"it comes from the forward of {entry.name}{_of(passes.path())}")

    paths: dict[int, str] = {}

    def remembered(entry: Entry) -> None:
        paths[id(entry)] = passes.path()
        noted(entry)

    def seen(entry: Entry, gradients: Sequence[Any]) -> None:
        if _bad(gradients):
            raise _FoundError(f"it comes from the backward of {entry.name}{_of(paths[id(entry)])}")

    try:
        with _without_trace(leaves, modules, inputs):
            passes.run(inputs, leaves, 1.0, remembered, seen)
    except _FoundError as found:
        return str(found)
    return "run again, the batch has none: random numbers, as dropout's, were others"


def tell(
    monitor: Monitor, passes: Passes, inputs: Any, leaves: Sequence[Tensor], modules: Iterable[torch.nn.Module]
) -> None:
    """Let a monitor read a step that was not finite, which is not taken; if it has not heard it, it hears it again."""
    if not monitor.recording:
        monitor.attend()
        with _without_trace(leaves, modules, inputs):
            hearing = monitor.hearing(None)
            loss, _ = passes.run(inputs, leaves, 1.0, hearing=hearing)
        monitor.heard(hearing.heard, loss)
    monitor.refused()


@contextlib.contextmanager
def _without_trace(leaves: Sequence[Tensor], modules: Iterable[torch.nn.Module], inputs: Any) -> Iterator[None]:
    """Let the memory of modules and batch, and torch's random numbers, be afterwards as before."""
    given = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.layout is torch.strided]
    before = Overwritten()
    for tensor in (*memory_of(modules), *given):
        before.keep(tensor)
    try:
        with torch.random.fork_rng(devices={t.device for t in leaves if t.is_cuda}):
            yield
    finally:
        before.restore()


def _bad(values: Any) -> bool:
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
    return any(not bool(values_of(t).isfinite().all()) for t in tensors)


def _of(path: str) -> str:
    return f" in module {path!r}" if path else ""
