"""Where in a step the first number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_bp.autograd.entry import Entry
from torch_bp.kernels.norm import values_of
from torch_bp.step.line import Passes


class _FoundError(Exception):
    """Ends the pass at the first finding."""


def origin(passes: Passes, inputs: Any, leaves: Sequence[Tensor], modules: Iterable[torch.nn.Module]) -> str:
    """Run the pass again, looking at every result, and say in words where NaN or Inf came up first.

    The modules' buffers and torch's random numbers are afterwards as before.
    """
    buffers = [(b, b.clone()) for module in modules for b in module.buffers()]
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
        with torch.random.fork_rng(devices={t.device for t in leaves if t.is_cuda}):
            passes.run(inputs, leaves, 1.0, remembered, seen)
    except _FoundError as found:
        return str(found)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return "run again, the batch has none: random numbers, as dropout's, were others"


def _bad(values: Any) -> bool:
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
    return any(not bool(values_of(t).isfinite().all()) for t in tensors)


def _of(path: str) -> str:
    return f" in module {path!r}" if path else ""
