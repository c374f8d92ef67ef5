"""Copies of a model, its loss and its optimizer on which things can be tried: nothing of the original is touched."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def replica(model: nn.Module, *others: Any) -> tuple[Any, ...]:
    """Copies of a model and of what refers to its parameters, such as its optimizer and its loss.

    Gradients are copied, too. Hooks are left out, as they act on what is not copied, but for those of torch that
    compute weights (`torch.nn.utils.weight_norm`). Of a compiled model it is the model that was compiled.

    Raises:
        TypeError: a part of it cannot be copied.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> twin, its_optimizer = replica(model, optimizer)
        >>> its_optimizer.param_groups[0]["params"][0] is twin.weight, twin.weight is model.weight
        (True, False)
    """
    original = getattr(model, "_orig_mod", model)
    memo: dict[int, Any] = {id(model): original} if original is not model else {}
    for module in original.modules():
        for name in _HOOKS:
            hooks = getattr(module, name)
            memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if _of_torch(hook))
    try:
        copies = tuple(copy.deepcopy(each, memo) for each in (original, *others))
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise TypeError(f"replica: model must be one that copy.deepcopy copies, got {error}.") from error
    for mine, theirs in zip(copies[0].parameters(), original.parameters()):
        if theirs.grad is not None:
            mine.grad = theirs.grad.detach().clone()
    return copies


def _of_torch(hook: Any) -> bool:
    """Whether it is of the kind that computes a weight before the forward pass."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.nn.utils")


@contextmanager
def same_random_numbers(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Leave the generators of Python, NumPy and torch as they were; with `seed`, let torch's begin with that."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    numpy = sys.modules.get("numpy")
    pythons, numpys = random.getstate(), numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=list(devices)):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(pythons)
            if numpy is not None:
                numpy.random.set_state(numpys)
