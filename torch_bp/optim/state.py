"""The state of one parameter: made where it is missing, taken back, and where its numbers are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Layout = Sequence[str | None]  # names of a rule's state, None for what a choice leaves out


def initial_state(optimizer: Any, p: Tensor, group: Mapping[str, Any], layout: Layout) -> tuple[dict, list[str]]:
    """Return the state of a parameter, completed where something is missing, and the names that were missing."""
    if not optimizer.counts_steps and not any(layout):
        return {}, []
    state = optimizer.state[p]
    counts = counted(optimizer)
    missing = [n for n in (*counts, *layout) if n is not None and state.get(n) is None]
    for name in missing:
        value = 0 if name == "step" else optimizer.initial(name, group)
        if name in counts:
            state[name] = _count(value, p, group)
        else:
            value = complex(value, value) if p.is_complex() else value
            state[name] = torch.full_like(p, value, memory_format=torch.preserve_format)
    return state, missing


def counted(optimizer: Any) -> tuple[str, ...]:
    """Names of the state that is one number for a whole parameter."""
    return ("step", *getattr(optimizer, "numbers", ())) if optimizer.counts_steps else ()


def _count(value: float, p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """A number that is state, where torch keeps it: on the host, but for what must not be read there."""
    on_device = group.get("capturable") or group.get("fused")
    double = torch.get_default_dtype() is torch.float64 and not group.get("fused")
    dtype = torch.float64 if double else torch.float32
    return torch.full((), float(value), dtype=dtype, device=p.device if on_device else "cpu")


def forget(created: Iterable[tuple[dict[str, Any], list[str]]]) -> None:
    """Take back what `initial_state` made for an update that did not happen."""
    for state, names in created:
        for name in names:
            state.pop(name, None)


def on_device(group: Mapping[str, Any]) -> bool:
    """True where the step count is a tensor that the host must not read, or the update itself is differentiated."""
    if group.get("differentiable") or group.get("capturable"):
        return True
    return bool(group.get("fused")) and any(p.device.type != "cpu" for p in group["params"])
