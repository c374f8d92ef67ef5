"""What every schedule shares: base rates of groups, states that load in any order, steps that AMP skips."""

import copy
import warnings
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as theirs

from torch_bp.optim import curves

Rates = list[float | torch.Tensor]
GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
SAVED = "_param_groups"
BUILT_ON = "_built_on"  # the list of groups at the construction: an optimizer that loads makes a new one
_MORE = "See more details at https://pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate"
OVERRIDDEN = (  # both in torch's words
    "Seems like `optimizer.step()` has been overridden after learning rate scheduler initialization. "
    f"Please, make sure to call `optimizer.step()` before `lr_scheduler.step()`. {_MORE}"
)
ORDER = (
    "Detected call of `lr_scheduler.step()` before `optimizer.step()`. In PyTorch 1.1.0 and later, you should call "
    "them in the opposite order: `optimizer.step()` before `lr_scheduler.step()`.  "
    "Failure to do this will result in PyTorch skipping the first value of the learning rate schedule. " + _MORE
)


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def write_rates(optimizer: Optimizer, rates: Any) -> None:
    """Set the rates of the groups; tensors are written in place and never shared."""
    for group, lr in zip(optimizer.param_groups, rates):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(float(lr))
        else:
            group["lr"] = float(lr)


def rates_of(optimizer: Optimizer) -> Rates:
    """Copies of the rates in force."""
    return [copied(group["lr"]) for group in optimizer.param_groups]


def _torchs(scheduler: Any) -> Any:
    """The class of torch's that a schedule is one of."""
    return next(cls for cls in type(scheduler).__mro__ if cls.__module__ == theirs.__name__)


def _moment(scheduler: Any) -> tuple[int, Any]:
    return getattr(scheduler, "last_epoch", 0), scheduler._last_lr


def state_dict(self: Any) -> dict[str, Any]:
    """As torch's, and the values in force of the schedules' keys in the parameter groups.

    They are stamped with the moment: torch's class passes them on unchanged when it loads, steps and saves.
    """
    param_groups = self.optimizer.param_groups
    groups = [{key: copied(group[key]) for key in GROUP_KEYS if key in group} for group in param_groups]
    state = _torchs(self).state_dict(self)
    state.pop(BUILT_ON, None)
    last_epoch, last_lr = _moment(self)
    return state | {SAVED: {"last_epoch": last_epoch, "_last_lr": last_lr, "groups": groups}}


def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
    """As torch's, and write the saved values into the optimizer's groups. `state_dict` is left as it is.

    The length is the state's, as torch has it, with a warning where the schedule was constructed with another.
    """
    load(self, state_dict)


def load(self: Any, state_dict: dict[str, Any]) -> None:
    """`load_state_dict` for methods that do more; the warning is theirs, and tells of their caller's line."""
    constructed = length(self)
    with warnings.catch_warnings():  # parts of a composite do not know where they stand in it
        if hasattr(self, "_schedulers"):
            warnings.filterwarnings("ignore", _OTHER_LENGTH)
        _torchs(self).load_state_dict(self, {key: state_dict[key] for key in state_dict if key != SAVED})
    if constructed and length(self) != constructed:
        warnings.warn(_other_length(self, constructed), UserWarning, stacklevel=3)
    param_groups, saved, groups = self.optimizer.param_groups, state_dict.get(SAVED), []
    if saved and (saved["last_epoch"], saved["_last_lr"]) == _moment(self):
        groups = saved["groups"]
    elif vars(self).get(BUILT_ON) is param_groups and _moment(self)[0] >= 0:  # torch's, and it has begun
        groups = [{"lr": lr} for lr in self._last_lr]
    for group, entries in zip(param_groups, groups):
        for key, value in entries.items():  # a group added since the construction lacks all but its rate
            if isinstance(group.get(key), torch.Tensor):  # stays the same object
                group[key].fill_(float(value))
            else:
                group[key] = float(value)


_OTHER_LENGTH = r"\w+\.load_state_dict: the state is of a run of"


def _other_length(scheduler: Any, constructed: int) -> str:
    name = f" ({scheduler._length})" if hasattr(scheduler, "_length") else ""
    return (
        f"{type(scheduler).__name__}.load_state_dict: the state is of a run of {length(scheduler)} steps{name}, the "
        f"schedule was constructed for {constructed}. It goes on with the state's, as torch's does; call "
        f"rescale(total_steps={constructed}) after loading to go on as in a run of {constructed}."
    )


def length(scheduler: Any) -> int:
    """The length of a schedule that has one, in steps from its start, else 0."""
    if isinstance(scheduler, theirs.SequentialLR):
        last = length(scheduler._schedulers[-1])
        return last and last + max(scheduler._milestones, default=0)
    if isinstance(scheduler, theirs.ChainedScheduler):
        return max(map(length, scheduler._schedulers))
    return getattr(scheduler, scheduler._length, 0) if hasattr(scheduler, "_length") else 0


def load_functions(self: Any, state_dict: dict[str, Any]) -> None:
    """As `load_state_dict`, also where groups, and functions with them, have been added since the construction.

    Raises:
        ValueError: more functions than there are have been saved, and those there are differ.
    """
    functions: list[Any] = self.lr_lambdas
    known, saved = len(functions), state_dict["lr_lambdas"]
    count = max((number for number, entries in enumerate(saved, 1) if entries is not None), default=0)
    each_group(self, functions, "lr_lambdas", count)
    functions[known:] = map(copy.copy, functions[known:])  # what they load may differ from group to group
    load(self, state_dict)


def step(self: Any, epoch: int | None = None) -> None:
    """As torch's, but a first step that a GradScaler has skipped gives no warning about the order.

    Such a step leaves gradients that are not finite; it is seen as long as `zero_grad` has not removed them. Nor does
    a copied or unpickled optimizer, whose steps torch no longer counts.
    """
    if self._step_count == 1:
        if not hasattr(self.optimizer.step, "_wrapped_by_lr_sched"):
            if "step" in vars(self.optimizer):
                warnings.warn(OVERRIDDEN, UserWarning, stacklevel=2)
        elif not getattr(self.optimizer, "_opt_called", False) and not _skipped(self.optimizer):
            warnings.warn(ORDER, UserWarning, stacklevel=2)
    self._step_count += 1
    if epoch is not None:
        warnings.warn(theirs.EPOCH_DEPRECATION_WARNING, UserWarning, stacklevel=2)
    self._update_lr(epoch)


def _skipped(optimizer: Optimizer) -> bool:
    """Whether the gradients are such as a GradScaler refuses to step on."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    values = [g.coalesce().values() if g.layout is torch.sparse_coo else g for g in gradients]
    return not all(bool(torch.isfinite(value).all()) for value in values)


def base_lrs(scheduler: theirs.LRScheduler) -> Rates:
    """The base rates of all groups, those of groups added since the construction included."""
    groups = scheduler.optimizer.param_groups
    vars(scheduler).setdefault(BUILT_ON, groups)
    for group in groups[len(scheduler.base_lrs) :]:
        base_lr = group.setdefault("initial_lr", copied(group["lr"]))
        scheduler.base_lrs = [*scheduler.base_lrs, copied(base_lr)]
    return scheduler.base_lrs[: len(groups)]


def each_group(scheduler: theirs.LRScheduler, values: list[Any], name: str, count: int | None = None) -> list[Any]:
    """`values`, one for each group: one that all groups share goes to groups added later too.

    `count` groups are meant, by default as many as there are.

    Raises:
        ValueError: there are more groups than values, which differ.
    """
    count = len(scheduler.optimizer.param_groups) if count is None else count
    if missing := max(count - len(values), 0):
        if not values or any(value is not values[0] and value != values[0] for value in values):
            raise ValueError(
                f"{type(scheduler).__name__}: {name} must have a value for each of {count} parameter groups, got "
                f"{len(values)}. Append one to `scheduler.{name}` for each group that you add."
            )
        values += [copied(values[0]) for _ in range(missing)]
    return values[:count]


def moved(scheduler: theirs.LRScheduler, before: float, now: float, eta_min: float = 0.0) -> Rates:
    """The rates in force, moved as the curve moves from `before` to `now`."""
    pairs = zip(scheduler.optimizer.param_groups, base_lrs(scheduler))
    return [curves.move(group["lr"], base_lr, before, now, eta_min) for group, base_lr in pairs]


def closed_form(self: Any) -> Rates:
    """The rates at `last_epoch` from the base rates alone."""
    factor, eta_min = self._curve(self.last_epoch), getattr(self, "eta_min", 0.0)
    return [curves.between(eta_min, base_lr, factor) for base_lr in base_lrs(self)]


def check_length(scheduler: Any, total_steps: int) -> None:
    """Refuse what is no length of a run."""
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps <= 0:
        raise ValueError(
            f"{type(scheduler).__name__}: total_steps must be a positive integer, got {total_steps}. "
            "Give the number of steps of the whole run, those already taken included."
        )
    taken = getattr(scheduler, "last_epoch", 0)  # a ChainedScheduler counts none; its parts refuse
    if total_steps < taken:
        raise ValueError(
            f"{type(scheduler).__name__}: total_steps must be at least {taken}, the steps already taken, got "
            f"{total_steps}. Give the number of steps of the whole run."
        )


def rescale(self: Any, total_steps: int) -> None:
    """Go on as in a run planned for `total_steps` steps from its start, those already taken included.

    It is for a run that is resumed with another length than it began with: call it after `load_state_dict`, which
    brings the old one back. In Lightning that is `on_train_start`:
    `self.lr_schedulers().rescale(torch_bp.lightning.total_steps(self.trainer))`.

    The rate in force moves at once as the curve moves, from the one of the old length at this step to the one of the
    new length: what others have done to the rate stays. The new length is saved with the state. See `last_epoch` for
    the number of steps taken. Where the curve of the old length is 0, the move is that of `curves.move`.

    Raises:
        ValueError: `total_steps` is not a positive integer.
    """
    check_length(self, total_steps)
    before = self._curve(self.last_epoch)
    setattr(self, self._length, total_steps)
    if self.last_epoch >= 0:  # in a SequentialLR it may not have begun
        write_rates(self.optimizer, moved(self, before, self._curve(self.last_epoch), getattr(self, "eta_min", 0.0)))
        self._last_lr = rates_of(self.optimizer)


def refuse_rescale(self: Any, total_steps: int) -> None:
    """Raise ValueError: this schedule has no length, and goes on by itself. The message says what to set instead."""
    raise ValueError(f"{type(self).__name__}: there is no length for rescale to change: {self._endless}.")
