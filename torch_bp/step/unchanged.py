"""Whether a model is still what it was when a step was captured.

What a captured step does was decided by the model's modules and numbers: training or evaluation, a dropout rate, which
activation, which parameters are trained, where they lie. Tensors that a function has
from elsewhere have a place and a form as well. Each of these is looked at before every step, some thirty nanoseconds
each; what no longer holds is captured anew.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from torch_bp.step.memory import number

_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}  # torch's own, the same for as long as a module lives
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_get = operator.getitem
_trained = operator.attrgetter("requires_grad")


def hooked(modules: Iterable[nn.Module]) -> bool:
    """True if hooks on modules or their parameters would miss the calls of a captured step."""
    modules = list(modules)
    if _has_any_global_hook():
        return True
    if any(getattr(m, name) for module in modules for m in module.modules() for name in _HOOKS):
        return True
    return any(map(_watched, (p for module in modules for p in module.parameters())))


def refuse_backward_hooks(modules: Iterable[nn.Module]) -> None:
    """Raise where a module has hooks on its backward, which an explicit step has no place to call."""
    for module in modules:
        for name, m in module.named_modules():
            if m._backward_hooks or m._backward_pre_hooks:
                raise RuntimeError(
                    f"TrainStep: modules must have no backward hooks, got one on {name or 'the model'}; use "
                    "step.trace for error signals, hooks on parameters, or loss.backward()."
                )


_hooks_of = operator.attrgetter("_backward_hooks")
_later_hooks_of = operator.attrgetter("_post_accumulate_grad_hooks")


def _watched(parameter: Tensor) -> bool:
    return bool(_hooks_of(parameter) or _later_hooks_of(parameter))


class Unchanged:
    """What modules were made of.

    Args:
        modules: with all that is inside them.
        tensors: that are watched besides.

    Example:
        >>> model = nn.Dropout(0.5)
        >>> before = Unchanged([model])
        >>> before.holds()
        True
        >>> model.p = 0.1
        >>> before.holds()
        False
    """

    def __init__(self, modules: Iterable[nn.Module], tensors: Iterable[Tensor] = ()) -> None:
        everything = list(dict.fromkeys(m for module in modules for m in module.modules()))
        items = [
            (place, name, value)
            for module in everything
            for place in (module.__dict__, module._modules, module._parameters, module._buffers)
            for name, value in place.items()
            if place is not module.__dict__ or name not in _BOOKKEEPING
        ]
        self._places = [place for place, _, _ in items]
        self._names = [name for _, name, _ in items]
        self._values = [value for _, _, value in items]
        self._dicts: list[Any] = [
            place for m in everything for place in (m.__dict__, m._modules, m._parameters, m._buffers)
        ]
        self._dicts += [value for value in self._values if isinstance(value, list | dict | set)]
        self._sizes = list(map(len, self._dicts))
        self._hooks = [getattr(module, name) for module in everything for name in _HOOKS]
        self._look([*self._values, *tensors])

    def _look(self, values: Iterable[Any]) -> None:
        every = {id(v): v for v in values}.values()
        self._tensors = [value for value in every if isinstance(value, Tensor)]
        self._where = list(map(Tensor.data_ptr, self._tensors))
        self._strides = list(map(Tensor.stride, self._tensors))
        self._counts = list(map(Tensor.numel, self._tensors))
        self._trained = [t.requires_grad for t in self._tensors]

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Watch strided tensors besides, but for those in memory of one that is watched: views that a forward makes."""
        known = {number(t) for t in self._tensors if t.layout is torch.strided}
        others = [t for t in tensors if number(t) not in known]
        if others:
            self._look([*self._tensors, *others])

    def holds(self) -> bool:
        """True if all is as it was, and nobody watches."""
        try:
            return (
                all(map(operator.is_, map(_get, self._places, self._names), self._values))
                and list(map(len, self._dicts)) == self._sizes
                and list(map(Tensor.data_ptr, self._tensors)) == self._where
                and list(map(Tensor.stride, self._tensors)) == self._strides
                and list(map(Tensor.numel, self._tensors)) == self._counts
                and list(map(_trained, self._tensors)) == self._trained
                and not any(self._hooks)
                and not _has_any_global_hook()
                and not any(map(_hooks_of, self._tensors))
                and not any(map(_later_hooks_of, self._tensors))
            )
        except KeyError:  # something was taken away
            return False
