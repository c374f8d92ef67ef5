"""What is no Function of ours (views, sums, `cat`, a module of somebody else) as one entry of a tape.

The entry has a graph of autograd's own, from copies of the arguments that stand for them to the results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

if TYPE_CHECKING:
    from torch_bp.autograd.tape import Tape


def through_autograd(tape: Tape, call: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Run any differentiable callable with a graph of its own, and note it on the tape if a gradient goes through it.

    `call` may write to the first argument and to nothing else, if `writes` says so of it.
    """
    if not torch.is_grad_enabled():  # within no_grad, in a forward
        return call(*args, **keywords)
    flat, form = tree_flatten((args, dict(keywords)))
    taken = [k for k, value in enumerate(flat) if tape.tracks(value)]
    sources = [flat[k] for k in taken]
    leaves = [t.detach().requires_grad_() for t in sources]
    given = list(flat)
    for k, leaf in zip(taken, leaves):
        given[k] = leaf
    target = args[0] if args and writes(call) else None
    with torch.enable_grad():
        if target is not None:  # autograd refuses writes to a leaf
            _require_alone(tape, target)
            first = next(k for k, value in enumerate(flat) if value is target)
            given[first] = given[first].clone()
        new_args, new_keywords = tree_unflatten(given, form)
        outputs = call(*new_args, **new_keywords)
        if target is not None:
            outputs = given[first]
    if target is not None:
        with torch.no_grad():
            target.detach().copy_(outputs.detach())
        entry = tape.note(call, sources, [target], [outputs.requires_grad])
        entry.backward = _by_graph([outputs], leaves)
        return target
    made, _ = tree_flatten(outputs)
    graph = [t for t in made if isinstance(t, Tensor) and t.requires_grad]
    if not graph:  # an answer, and no tensor that a gradient goes through
        return outputs
    found = {id(t): t.detach() for t in graph}
    entry = tape.note(call, sources, list(found.values()), [True] * len(found))
    entry.backward = _by_graph(graph, leaves)
    entry.materialize = False
    return tree_map_only(Tensor, lambda t: found.get(id(t), t), outputs)


def _require_alone(tape: Tape, target: Tensor) -> None:
    """Raise if somebody else would see what is written to a tensor, without the gradient that goes through it."""
    storage = target.untyped_storage()._cdata
    if target._is_view() and _holders(target) != _HOLDERS_OF_ONE:
        raise RuntimeError(
            "a view must not be written to in place while a step is traced, since what it is a view of would not "
            "notice; write to the whole, for example out[:, :2] = h instead of out[:, :2].copy_(h), or use cat."
        )
    for other in tape.alive():
        if other is target:
            continue
        if other.layout is torch.strided and other.untyped_storage()._cdata == storage:
            raise RuntimeError(
                "a tensor that shares its memory with another one must not be written to in place while a step "
                "is traced; write out of place, for example y = y + 1 instead of y += 1."
            )


def writes(call: Callable[..., Any]) -> bool:
    """True if a torch function writes to its first argument, by its name: `add_`, `__iadd__`, `__setitem__`."""
    name = getattr(call, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    return name.endswith("_") and name not in ("requires_grad_",)


def _by_graph(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> Callable[..., Any]:
    def backward(*dys: Tensor | None) -> Any:
        pairs = [(t, d) for t, d in zip(outputs, dys) if d is not None]
        return torch.autograd.grad([t for t, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True)

    return backward


def _holders(view: Tensor) -> tuple[int, int]:
    """How many hold the memory of a view, and the tensor that it is a view of."""
    base = view._base
    return torch._C._storage_Use_Count(view.untyped_storage()._cdata), sys.getrefcount(base)


_HOLDERS_OF_ONE = _holders(torch.empty(2)[:1])  # a view that is all that is left of a tensor
