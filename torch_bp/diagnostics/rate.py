"""Learning rates that are cut: for good, in whatever a schedule makes its rates from, or for a while."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# In parameter groups, and in schedules, of torch and of torch_bp: what rates are made from.
_IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_IN_SCHEDULES = ("base_lrs", "max_lrs", "_last_lr", "eta_min")


def cut(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], factor: float) -> None:
    """Multiply the rates, and the whole curve of each schedule, by a factor; tensors in place.

    `min_lr` of `ReduceLROnPlateau` stays: it is a bound, and no part of a curve.

    Args:
        optimizers: whose groups have the rates.
        schedulers: of torch or torch_bp, or of the same make: `base_lrs`, `max_lrs` and `eta_min` are their attributes.
        factor: > 0.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
        >>> cut([optimizer], [schedule], 0.5)
        >>> optimizer.param_groups[0]["lr"], schedule.base_lrs
        (0.5, [0.5])
    """
    if factor == 1:
        return
    done: set[int] = set()  # tensors that several places share
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in _IN_GROUPS:
                if key in group:
                    group[key] = _times(group[key], factor, done)
    for scheduler in schedulers:
        _cut_schedule(scheduler, factor, done)


def _cut_schedule(scheduler: Any, factor: float, done: set[int]) -> None:
    if id(scheduler) in done:
        return
    done.add(id(scheduler))
    for name in _IN_SCHEDULES:
        if name in vars(scheduler):
            setattr(scheduler, name, _times(getattr(scheduler, name), factor, done))
    for part in vars(scheduler).get("_schedulers", ()):
        _cut_schedule(part, factor, done)


def _times(value: Any, factor: float, done: set[int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_times(each, factor, done) for each in value])
    if not isinstance(value, Tensor):
        return value * factor
    if id(value) not in done:
        done.add(id(value))
        value.mul_(factor)
    return value


class Ramp:
    """Rates that come back: each is multiplied while its optimizer steps, and is itself again afterwards.

    Whatever sets the rate between steps, of which this knows nothing, sets it as ever.

    Args:
        optimizers: any.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> ramp = Ramp([optimizer])
        >>> ramp.factor = 0.25
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.data, optimizer.param_groups[0]["lr"]
        (tensor([-0.2500]), 1.0)
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._factor = 1.0
        self._handles: list[Any] = []
        self._kept: dict[int, list[Any]] = {}  # the rates of an optimizer that is stepping

    @property
    def factor(self) -> float:
        """What rates are multiplied by; 1 takes the hooks away, which cost time."""
        return self._factor

    @factor.setter
    def factor(self, value: float) -> None:
        self._factor = value
        if value == 1:
            for handle in self._handles:
                handle.remove()
            self._handles = []
        elif not self._handles:
            for optimizer in self._optimizers:
                self._handles.append(optimizer.register_step_pre_hook(self._before))
                self._handles.append(optimizer.register_step_post_hook(self._after))

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._after(optimizer)  # of a step that ended in an exception
        rates = [group["lr"] for group in optimizer.param_groups]
        self._kept[id(optimizer)] = [lr.clone() if isinstance(lr, Tensor) else lr for lr in rates]
        done: set[int] = set()
        for group, lr in zip(optimizer.param_groups, rates):
            group["lr"] = _times(lr, self._factor, done)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._kept.pop(id(optimizer), ())):
            if isinstance(lr, Tensor):
                group["lr"].copy_(lr)
            else:
                group["lr"] = lr
