"""A scaled loss is refused before its backward, where an optimizer is applied in it.

A `GradScaler` meets the optimizer after the backward, when it unscales; what `apply_in_backward` updates has then been
updated from scaled gradients. It meets the loss earlier. While there is a handle, `torch.amp.GradScaler.scale`
therefore looks whose parameters the loss is made of. A scaler of another class that scales by itself is not seen, nor
are parameters that the graph does not hold: those within a reentrant checkpoint, and of `fully_shard`. Both are
refused in `scaler.step`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.amp import GradScaler

_handles: weakref.WeakSet[Any] = weakref.WeakSet()
_made: dict[Callable[..., Any], Callable[..., Any]] = {}  # what was put in the place of `GradScaler.scale`, and of what


def watch(handle: Any) -> None:
    """Refuse scaled losses of the parameters among `handle.names`, from now on."""
    _handles.add(handle)
    current = GradScaler.scale
    if current not in _made:  # torch's, or that of others who have put theirs there
        refusing = _refusing(current)
        _made[refusing] = current
        GradScaler.scale = refusing  # type: ignore[method-assign]


def unwatch(handle: Any) -> None:
    """Refuse them no longer; the last handle leaves `GradScaler` as it was, unless another has wrapped it since."""
    _handles.discard(handle)
    while not _handles and GradScaler.scale in _made:
        GradScaler.scale = _made[GradScaler.scale]  # type: ignore[method-assign]


def _refusing(scale: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(scale)
    def refusing(self: GradScaler, outputs: Any) -> Any:
        scaled = scale(self, outputs)
        if self.is_enabled() and _handles:
            for loss in _tensors(scaled):
                for handle in _handles:
                    _check(loss, handle.names)
        return scaled

    return refusing


def _tensors(scaled: Any) -> Iterator[Tensor]:
    if isinstance(scaled, Tensor):
        yield scaled
    elif isinstance(scaled, list | tuple):  # anything else is an iterator, which a look would exhaust
        for each in scaled:
            yield from _tensors(each)


def _check(loss: Tensor, names: Mapping[Tensor, str]) -> None:
    """Go through the graph of a loss in search of a parameter."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad" and node.variable in names:  # type: ignore[attr-defined]
            raise RuntimeError(
                "apply_in_backward: gradients must be unscaled when they come, got a GradScaler, which unscales them "
                f"after the backward, and a loss of {names[node.variable]}; "  # type: ignore[attr-defined]
                "nothing was updated. Train in bfloat16, which needs no scaling, or remove() the handle."
            )
        nodes += [following for following, _ in node.next_functions]
