"""Schedules made of schedules: one after the other, or all at once as a product.

The rate of a sequence at step t is that of its running part, counted from the part's milestone: the part sets the rate
to its first value there, whatever it was. The factors of a chain multiply, in the order in which the chain steps them.
So chains may be parts of a sequence, and sequences of a sequence; a sequence in a chain would undo, at its milestones,
what the others have done, as in torch.
"""

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim import lr_scheduler as theirs

from torch_bp.optim.lr_scheduler import state as shared
from torch_bp.optim.lr_scheduler.factor import LinearLR
from torch_bp.optim.lr_scheduler.state import length, rates_of, write_rates


def _begin(scheduler: Any) -> None:
    """Take a schedule to its step 0, as its construction does; the rates must be the initial ones."""
    if not hasattr(scheduler, "_schedulers"):
        scheduler.last_epoch = -1
        scheduler._initial_step()
        return
    parts = scheduler._schedulers
    if isinstance(scheduler, theirs.SequentialLR):
        scheduler.last_epoch = 0
        parts = [parts[bisect_right(scheduler._milestones, 0)]]
    for part in parts:
        _begin(part)
    scheduler._last_lr = rates_of(scheduler.optimizer)


def _begin_anew(scheduler: Any) -> None:
    groups = scheduler.optimizer.param_groups
    write_rates(scheduler.optimizer, [group.setdefault("initial_lr", shared.copied(group["lr"])) for group in groups])
    _begin(scheduler)


def _update_lr(self: Any, epoch: int | None = None) -> None:
    """What a sequence around this one calls: it begins at its milestone, `epoch` 0, with the initial rates."""
    if epoch is None:
        self.step()
    elif epoch == 0:
        _begin_anew(self)
    else:
        raise ValueError(f"{type(self).__name__}: epoch must be 0, got {epoch}. Take the steps one by one.")


def _check_rescalable(scheduler: Any, total_steps: int) -> None:
    shared.check_length(scheduler, total_steps)
    if not length(scheduler):
        parts = ", ".join(type(part).__name__ for part in scheduler._schedulers)
        which = "the last part" if isinstance(scheduler, theirs.SequentialLR) else "a part"
        raise ValueError(
            f"{type(scheduler).__name__}: {which} must have a length, such as CosineAnnealingLR has, got {parts}. "
            "Schedules without a length go on by themselves."
        )


class SequentialLR(theirs.SequentialLR):
    """As `torch.optim.lr_scheduler.SequentialLR`: one schedule after the other.

    Parts may be composites themselves, at any place, and milestones may be 0.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
    >>> SequentialLR(optimizer, [LinearLR(optimizer, 0.25), LinearLR(optimizer, 0.5)], milestones=[5]).get_last_lr()
    [0.2]
    """

    state_dict, load_state_dict, _update_lr = shared.state_dict, shared.load_state_dict, _update_lr

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: list[theirs.LRScheduler],
        milestones: list[int],
        last_epoch: int = -1,
    ) -> None:
        with warnings.catch_warnings():  # torch takes a step too many where a part is a composite of its own
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            super().__init__(optimizer, schedulers, milestones, last_epoch)
        vars(self)[shared.BUILT_ON] = optimizer.param_groups
        if last_epoch == -1:
            _begin_anew(self)

    def _initial_step(self) -> None:
        _begin(self)

    def step(self) -> None:  # type: ignore[override]
        """Go one step on; at a milestone the next part begins."""
        self.last_epoch += 1
        index = bisect_right(self._milestones, self.last_epoch)
        part = self._schedulers[index]
        if index == 0 or self._milestones[index - 1] != self.last_epoch:
            part.step()
        elif hasattr(part, "_schedulers"):
            _begin_anew(part)
        else:
            part._update_lr(0)
        self._last_lr = rates_of(self.optimizer)

    def rescale(self, total_steps: int) -> None:
        """Go on as in a run planned for `total_steps` steps: the last part is made longer or shorter.

        Milestones stay, and so does what comes before the last of them, such as a warm-up.

        Raises:
            ValueError: the last part has no length, or would end before it begins.
        """
        _check_rescalable(self, total_steps)
        begin = max(self._milestones, default=0)
        if total_steps <= begin:
            raise ValueError(
                f"SequentialLR: total_steps must be more than {begin}, the last milestone, got {total_steps}. "
                "Give the number of steps of the whole run."
            )
        part: Any = self._schedulers[-1]  # one that has not begun, and so is at step -1, writes no rate
        part.rescale(total_steps - begin)
        self._last_lr = rates_of(self.optimizer)


class ChainedScheduler(theirs.ChainedScheduler):
    """As `torch.optim.lr_scheduler.ChainedScheduler`: several schedules at once, whose factors multiply.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
    >>> ChainedScheduler([LinearLR(optimizer, 0.5), LinearLR(optimizer, 0.25)]).get_last_lr()
    [0.1]
    """

    state_dict, load_state_dict, _update_lr = shared.state_dict, shared.load_state_dict, _update_lr

    def __init__(self, schedulers: Sequence[theirs.LRScheduler], optimizer: Optimizer | None = None) -> None:
        super().__init__(schedulers, optimizer)
        vars(self)[shared.BUILT_ON] = self.optimizer.param_groups

    def _initial_step(self) -> None:
        _begin(self)

    def rescale(self, total_steps: int) -> None:
        """Go on as in a run planned for `total_steps` steps: the longest parts are given this length.

        Shorter ones, such as a warm-up, stay as they are.

        Raises:
            ValueError: no part has a length.
        """
        _check_rescalable(self, total_steps)
        longest = length(self)
        for part in self._schedulers:
            if length(part) == longest:
                part.rescale(total_steps)  # type: ignore[attr-defined]
        self._last_lr = rates_of(self.optimizer)


def warmup(schedule: theirs.LRScheduler, steps: int, start_factor: float = 1e-3) -> SequentialLR:
    """`schedule` after `steps` steps in which the rate rises in a line from start_factor base_lr to base_lr.

    The schedule begins at its own step 0 when the warm-up ends, so a run of T steps leaves T - steps for it.
    `warmup(schedule, 0)` gives the rates of `schedule`. The result is a `SequentialLR`, and may be composed further.

    Args:
        schedule: a schedule that has not taken a step. Whether it is a composite makes no difference.
        steps: length of the warm-up, in the unit in which the schedule is stepped, >= 0.
        start_factor: share of the base rate at step 0, in (0, 1].

    Raises:
        ValueError: steps < 0, `start_factor` outside (0, 1], or `schedule` is a `ReduceLROnPlateau`.
        TypeError: `schedule` is none, such as the optimizer.
        RuntimeError: `schedule` has taken steps.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
    >>> warmup(LinearLR(optimizer, 1.0, 0.0, total_iters=8), steps=2, start_factor=0.5).get_last_lr()
    [0.4]
    """
    if not isinstance(schedule, theirs.LRScheduler):
        raise TypeError(
            f"warmup: schedule must be a learning-rate schedule, got {type(schedule).__name__}. "
            "Make one of the optimizer first: warmup(CosineAnnealingLR(optimizer, 900), steps=100)."
        )
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"warmup: steps must be an integer >= 0, got {steps}. Give the length of the warm-up.")
    if getattr(schedule, "last_epoch", 0) > 0:
        raise RuntimeError(
            f"warmup: schedule must not have taken steps, got one at step {schedule.last_epoch}. "
            "Compose first, then load its state."
        )
    rise = LinearLR(schedule.optimizer, start_factor, total_iters=steps)
    return SequentialLR(schedule.optimizer, [rise, schedule], [steps])
