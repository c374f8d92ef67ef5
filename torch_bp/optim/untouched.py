"""Training for a try: afterwards model, optimizer and random numbers are as they were."""

import copy
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@contextmanager
def untouched(model: nn.Module, optimizer: Optimizer | None = None, generators: Iterable[Any] = ()) -> Iterator[None]:
    """What happens inside to `model` and `optimizer` is taken back at the end, also after an exception.

    Kept are parameters, gradients and buffers (values and identity), the training flag of each module, the optimizer's
    state and groups, and the random numbers of Python, NumPy, torch on every device in use, and of `generators`.
    Optimizer steps inside work on a copy of its state. It costs the memory of a second model and its state.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before = layer.weight.item()
        >>> with untouched(layer):
        ...     _ = nn.init.zeros_(layer.weight)
        >>> layer.weight.item() == before
        True
    """
    groups = optimizer.param_groups if optimizer is not None else []
    params = dict.fromkeys([*model.parameters(), *(p for group in groups for p in group["params"])])
    places: list[Any] = [names for m in model.modules() for names in (m._parameters, m._buffers)]
    tensors = dict.fromkeys([*params, *(t for names in places for t in names.values() if t is not None)])
    with ExitStack() as kept:  # it goes on with the others where one thing cannot be taken back
        for m in model.modules():
            kept.callback(setattr, m, "training", m.training)
        for p in params:
            kept.callback(setattr, p, "grad", p.grad)
        for t in tensors:
            kept.callback(_write, t, _once(t).clone())
        for names in places:
            kept.callback(_refill, names, dict(names))
        kept.enter_context(same_random_numbers(generators))
        kept.enter_context(_same_optimizer(optimizer))
        for p in params:  # new ones are made; those in place stay as they are
            p.grad = None
        yield


def _once(t: Tensor) -> Tensor:
    """The tensor without the repetitions of an expanded one, into which torch does not write."""
    t = t.detach()
    if t.layout is not torch.strided or 0 not in t.stride():
        return t
    return t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]


def _write(t: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        _once(t).copy_(value)


def _refill(names: dict[str, Any], kept: dict[str, Any]) -> None:
    names.clear()
    names.update(kept)


@contextmanager
def _same_optimizer(optimizer: Optimizer | None) -> Iterator[None]:
    if optimizer is None:
        yield
        return
    if "state" not in vars(optimizer):
        raise TypeError(
            f"optimizer must be the optimizer itself, got {type(optimizer).__name__}; a wrapper has it as `.optimizer`."
        )
    state, groups = optimizer.state, [dict(group) for group in optimizer.param_groups]
    values = [{k: v.clone() for k, v in group.items() if isinstance(v, Tensor)} for group in groups]
    called = vars(optimizer).get("_opt_called")
    optimizer.state = defaultdict(dict, {p: copy.deepcopy(of_p) for p, of_p in state.items()})
    try:
        yield
    finally:
        optimizer.state = state
        for group, kept, tensors in zip(optimizer.param_groups, groups, values):
            group.clear()
            group.update(kept)
            for key, value in tensors.items():
                group[key].copy_(value)
        if called is None:
            vars(optimizer).pop("_opt_called", None)


@contextmanager
def same_random_numbers(generators: Iterable[Any] = ()) -> Iterator[None]:
    """The random numbers of Python, NumPy, torch and `generators` go on afterwards as if none had been drawn inside."""
    numpy: Any = sys.modules.get("numpy")  # if it has not been imported nobody draws from it
    python, arrays = random.getstate(), numpy and numpy.random.get_state()
    kept = [(generator, generator.get_state()) for generator in generators if isinstance(generator, torch.Generator)]
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            yield
    finally:
        random.setstate(python)
        if arrays:
            numpy.random.set_state(arrays)
        for generator, state in kept:
            generator.set_state(state)
