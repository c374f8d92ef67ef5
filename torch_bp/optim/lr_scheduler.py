"""As `torch.optim.lr_scheduler`, with each schedule stated as one curve of `torch_bp.optim.curves`.

The classes subclass torch's of the same name: constructors, errors, `isinstance`, composers (`SequentialLR`,
`ChainedScheduler`) are torch's, and so are the rates, step for step. Their t is `last_epoch`, the number of
steps taken, in epochs or batches. A rate is moved or set:

- `StepLR MultiStepLR ConstantLR LinearLR ExponentialLR CosineAnnealingLR` *move* the rate in force by
  curve(t) / curve(t - 1), so that others may change it in between; `step(epoch)` sets base_lr curve(epoch).
- `CosineAnnealingWarmRestarts OneCycleLR` *set* it; `ReduceLROnPlateau` cuts it when a metric stands still.

What differs from torch:

- **Loading.** `load_state_dict` also writes the saved rates, and what else schedules keep in parameter groups,
  into the optimizer, whose own state may be loaded before the schedule is constructed, later, or not at all.
  They travel under one more key, `"_param_groups"`, which torch's classes ignore. Without it (torch's states) all
  but `ReduceLROnPlateau` write their last rates, unless the optimizer has loaded since. Groups match in order.
- **Groups added later** with `add_param_group` join every schedule. Their base rate is their `"initial_lr"`
  or, without one, the rate they have at the next step. `OneCycleLR` asks for its own keys.
- **Where torch divides by zero** the schedule is defined: see `curves.move` and `curves.one_cycle`.
"""

import math
import warnings
from typing import Any, SupportsFloat, cast

import torch
from torch.optim import lr_scheduler as theirs

from torch_bp._mirror import mirror
from torch_bp.optim import curves

_Rates = list[float | torch.Tensor]
_GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
_SAVED = "_param_groups"
_BUILT_ON = "_built_on"  # the list of groups at the construction: an optimizer that loads makes a new one


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _state_dict(self: Any) -> dict[str, Any]:
    """As torch's, and the values in force of the schedules' keys in the parameter groups.

    They are stamped with the moment: torch's class passes them on unchanged when it loads, steps and saves.
    """
    param_groups = self.optimizer.param_groups
    groups = [{key: _copy(group[key]) for key in _GROUP_KEYS if key in group} for group in param_groups]
    state = theirs.LRScheduler.state_dict(self)
    state.pop(_BUILT_ON, None)
    return state | {_SAVED: {"last_epoch": self.last_epoch, "_last_lr": self._last_lr, "groups": groups}}


def _load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
    """As torch's, and write the saved values into the optimizer's groups. `state_dict` is left as it is."""
    theirs.LRScheduler.load_state_dict(self, {key: state_dict[key] for key in state_dict if key != _SAVED})
    param_groups, saved, groups = self.optimizer.param_groups, state_dict.get(_SAVED), []
    if saved and (saved["last_epoch"], saved["_last_lr"]) == (self.last_epoch, self._last_lr):
        groups = saved["groups"]
    elif vars(self).get(_BUILT_ON) is param_groups and self.last_epoch >= 0:  # torch's, and it has begun
        groups = [{"lr": lr} for lr in self._last_lr]
    for group, entries in zip(param_groups, groups):
        for key in entries.keys() & group.keys():
            if isinstance(group[key], torch.Tensor):  # stays the same object
                group[key].fill_(float(entries[key]))
            else:
                group[key] = float(entries[key])


def _base_lrs(scheduler: theirs.LRScheduler) -> _Rates:
    """The base rates of all groups, those of groups added since the construction included."""
    groups = scheduler.optimizer.param_groups
    vars(scheduler).setdefault(_BUILT_ON, groups)
    for group in groups[len(scheduler.base_lrs) :]:
        base_lr = group.setdefault("initial_lr", _copy(group["lr"]))
        scheduler.base_lrs = [*scheduler.base_lrs, _copy(base_lr)]
    return scheduler.base_lrs[: len(groups)]


def _moved(scheduler: theirs.LRScheduler, before: float, now: float, eta_min: float = 0.0) -> _Rates:
    """The rates in force, moved as the curve moves from `before` to `now`."""
    theirs._warn_get_lr_called_within_step(scheduler)
    pairs = zip(scheduler.optimizer.param_groups, _base_lrs(scheduler))
    return [curves.move(group["lr"], base_lr, before, now, eta_min) for group, base_lr in pairs]


def _closed_form(self: Any) -> _Rates:
    """The rates at `last_epoch` from the base rates alone."""
    factor, eta_min = self._curve(self.last_epoch), getattr(self, "eta_min", 0.0)
    return [curves.between(eta_min, base_lr, factor) for base_lr in _base_lrs(self)]


class StepLR(theirs.StepLR):
    """As `torch.optim.lr_scheduler.StepLR`, over `curves.step`.

    >>> StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), step_size=30).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, _get_closed_form_lr = _state_dict, _load_state_dict, _closed_form

    def _curve(self, t: int, since: int = 0) -> float:
        return curves.step(t, self.step_size, self.gamma, since)

    def get_lr(self) -> _Rates:
        return _moved(self, 1.0, self._curve(self.last_epoch, since=self.last_epoch - 1))


class MultiStepLR(theirs.MultiStepLR):
    """As `torch.optim.lr_scheduler.MultiStepLR`, over `curves.multi_step`.

    >>> MultiStepLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), milestones=[30, 80]).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, _get_closed_form_lr = _state_dict, _load_state_dict, _closed_form

    def _curve(self, t: int, since: float = -math.inf) -> float:
        return curves.multi_step(t, self.milestones, self.gamma, since)

    def get_lr(self) -> _Rates:
        return _moved(self, 1.0, self._curve(self.last_epoch, since=self.last_epoch - 1))


class ConstantLR(theirs.ConstantLR):
    """As `torch.optim.lr_scheduler.ConstantLR`, over `curves.constant`.

    >>> ConstantLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), factor=0.5).get_last_lr()
    [0.4]
    """

    state_dict, load_state_dict, _get_closed_form_lr = _state_dict, _load_state_dict, _closed_form

    def _curve(self, t: int) -> float:
        return curves.constant(t, self.factor, self.total_iters)

    def get_lr(self) -> _Rates:
        return _moved(self, self._curve(self.last_epoch - 1), self._curve(self.last_epoch))


class LinearLR(theirs.LinearLR):
    """As `torch.optim.lr_scheduler.LinearLR`, over `curves.linear`.

    >>> LinearLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), start_factor=0.25).get_last_lr()
    [0.2]
    """

    state_dict, load_state_dict, _get_closed_form_lr = _state_dict, _load_state_dict, _closed_form

    def _curve(self, t: int) -> float:
        return curves.linear(t, self.start_factor, self.end_factor, self.total_iters)

    def get_lr(self) -> _Rates:
        now = self._curve(self.last_epoch)
        resumed = self._is_initial and self.last_epoch > 0
        return _moved(self, now if resumed else self._curve(self.last_epoch - 1), now)


class ExponentialLR(theirs.ExponentialLR):
    """As `torch.optim.lr_scheduler.ExponentialLR`, over `curves.exponential`.

    >>> ExponentialLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), gamma=0.5).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, _get_closed_form_lr = _state_dict, _load_state_dict, _closed_form

    def _curve(self, t: int) -> float:
        return curves.exponential(t, self.gamma)

    def get_lr(self) -> _Rates:
        return _moved(self, 1.0, self._curve(0 if self._is_initial else 1))


class CosineAnnealingLR(theirs.CosineAnnealingLR):
    """As `torch.optim.lr_scheduler.CosineAnnealingLR`, over `curves.cosine` from the base rate to `eta_min`.

    >>> CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), T_max=100).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, _get_closed_form_lr = _state_dict, _load_state_dict, _closed_form

    def _curve(self, t: int) -> float:
        return curves.cosine(t, self.T_max)

    def get_lr(self) -> _Rates:
        before, now = self._curve(self.last_epoch - 1), self._curve(self.last_epoch)
        if self._is_initial:
            before = now
        elif before == 0:
            now = curves.cosine(1, self.T_max, rising=True)
        return _moved(self, before, now, self.eta_min)


class CosineAnnealingWarmRestarts(theirs.CosineAnnealingWarmRestarts):
    """As `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`, over `curves.warm_restarts` and `cosine`.

    The running cycle is found in whole numbers: constructing with `last_epoch` resumes in the right one for
    T_mult > 1 too, and `step(epoch)` restarts at every restart, where torch's logarithm can miss one.

    >>> CosineAnnealingWarmRestarts(torch.optim.SGD([torch.zeros(1)], lr=0.8), T_0=10).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict = _state_dict, _load_state_dict

    def get_lr(self) -> _Rates:
        theirs._warn_get_lr_called_within_step(self)
        factor = curves.cosine(self.T_cur, self.T_i)
        return [curves.between(self.eta_min, base_lr, factor) for base_lr in _base_lrs(self)]

    def step(self, epoch: float | None = None) -> None:
        """Go one step on, or to `epoch` >= 0, which may have a fraction; a negative one raises ValueError."""
        if epoch is None and self.last_epoch >= 0:
            epoch, cycle = self.last_epoch + 1, curves.warm_restarts(self.T_cur + 1, self.T_i, self.T_mult)
        else:
            if (epoch := epoch or 0) < 0:
                raise ValueError(f"Expected non-negative epoch, but got {epoch}")
            cycle = curves.warm_restarts(epoch, self.T_0, self.T_mult)
        self.T_cur, self.T_i = cycle  # type: ignore[assignment]  # torch says int, and takes fractions too
        self._update_lr(math.floor(epoch))


class OneCycleLR(theirs.OneCycleLR):
    """As `torch.optim.lr_scheduler.OneCycleLR`, over `curves.one_cycle`.

    A group added later must bring `initial_lr`, `max_lr` and so on: the next step's KeyError names them all.

    >>> OneCycleLR(torch.optim.Adam([torch.zeros(1)]), 0.5, total_steps=9, div_factor=4.0).get_last_lr()
    [0.125]
    """

    state_dict = _state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, and write the saved rates and momentum into the optimizer's groups."""
        _load_state_dict(self, state_dict)
        if self.last_epoch >= 0:  # in a SequentialLR it may not have begun
            self._set_momentum()

    def get_lr(self) -> _Rates:
        """The rates at `last_epoch`; with cycle_momentum it also sets the momentum, as torch's does."""
        theirs._warn_get_lr_called_within_step(self)
        if (t := self.last_epoch) > (total_steps := self.total_steps):
            raise ValueError(f"Tried to step {t} times. The specified number of total steps is {total_steps}")
        self._set_momentum()
        return [self._value(i, "lr") for i in range(len(_base_lrs(self)))]

    def _set_momentum(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups if self.cycle_momentum else ()):
            momentum = self._value(i, "momentum")
            group |= {"betas": (momentum, *group["betas"][1:])} if self.use_beta1 else {"momentum": momentum}

    def _value(self, i: int, quantity: str) -> float | torch.Tensor:
        """The "lr" or "momentum" of group `i` at `last_epoch`."""
        group, phases = self.optimizer.param_groups[i], cast(list[dict[str, Any]], self._schedule_phases)
        keys = [phases[0][f"start_{quantity}"], *(phase[f"end_{quantity}"] for phase in phases)]
        needed = _GROUP_KEYS[1:] if self.cycle_momentum else _GROUP_KEYS[1:4]
        if missing := [key for key in needed if key not in group]:
            raise KeyError(
                f"OneCycleLR: param_groups[{i}] must have the keys {needed}, got a group without {missing}. "
                "Pass them to add_param_group, or construct the schedule after adding the group."
            )
        levels, ends = [group[key] for key in keys], [phase["end_step"] for phase in phases]
        return curves.one_cycle(self.last_epoch, levels, ends, self._anneal_func_type)


class ReduceLROnPlateau(theirs.ReduceLROnPlateau):
    """As `torch.optim.lr_scheduler.ReduceLROnPlateau`, over `curves.improved` and `curves.plateau`.

    >>> scheduler = ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=0.8), factor=0.5, patience=0)
    >>> for loss in (1.0, 0.5, 0.5):
    ...     scheduler.step(loss)
    >>> scheduler.get_last_lr()
    [0.4]
    """

    state_dict, load_state_dict = _state_dict, _load_state_dict

    def _is_better(self, a: float, best: float) -> bool:
        return curves.improved(a, best, self.mode, self.threshold, self.threshold_mode)

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Take the metric of one more epoch, and cut the rates when it is due."""
        current = float(metrics)
        if epoch is not None:
            warnings.warn(theirs.EPOCH_DEPRECATION_WARNING, UserWarning, stacklevel=2)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if better := self._is_better(current, self.best):
            self.best = current
        self.num_bad_epochs, self.cooldown_counter, reduce = curves.plateau(
            better, self.num_bad_epochs, self.cooldown_counter, self.patience, self.cooldown
        )
        if reduce:
            self._reduce_lr(self.last_epoch)
        self._last_lr = [_copy(group["lr"]) for group in self.optimizer.param_groups]


__getattr__, __dir__, __all__ = mirror(globals(), theirs)
