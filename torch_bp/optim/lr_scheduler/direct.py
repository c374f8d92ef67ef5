"""Schedules that set the rate, whatever it was."""

import math
from typing import Any, cast

from torch.optim import lr_scheduler as theirs

from torch_bp.optim import curves
from torch_bp.optim.lr_scheduler import state as shared
from torch_bp.optim.lr_scheduler.state import GROUP_KEYS, Rates, base_lrs


class CosineAnnealingWarmRestarts(theirs.CosineAnnealingWarmRestarts):
    """As `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`, over `curves.warm_restarts` and `cosine`.

    The running cycle is found in whole numbers: constructing with `last_epoch` resumes in the right one for
    T_mult > 1 too, and `step(epoch)` restarts at every restart, where torch's logarithm can miss one.

    >>> CosineAnnealingWarmRestarts(torch.optim.SGD([torch.zeros(1)], lr=0.8), T_0=10).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict = shared.state_dict, shared.load_state_dict
    rescale, _endless = (
        shared.refuse_rescale,
        "it restarts after T_i steps, without end; set `T_i`, the length of the running cycle instead",
    )

    def get_lr(self) -> Rates:
        theirs._warn_get_lr_called_within_step(self)
        factor = curves.cosine(self.T_cur, self.T_i)
        return [curves.between(self.eta_min, base_lr, factor) for base_lr in base_lrs(self)]

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


def _write_momentum(self: Any) -> None:
    momenta = self._momenta() if self.cycle_momentum else ()
    for group, momentum in zip(self.optimizer.param_groups, momenta):
        group |= {"betas": (momentum, *group["betas"][1:])} if self.use_beta1 else {"momentum": momentum}


def _load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
    """As torch's, and write the saved rates and momentum into the optimizer's groups."""
    shared.load(self, state_dict)
    if self.last_epoch >= 0:  # in a SequentialLR it may not have begun
        _write_momentum(self)


class OneCycleLR(theirs.OneCycleLR):
    """As `torch.optim.lr_scheduler.OneCycleLR`, over `curves.one_cycle`.

    A group added later joins the cycle at the step where it is. What it does not bring of `max_lr`, `initial_lr` and
    `min_lr` comes from its own rate: that is its `max_lr`, which is divided as those of the others are. The bounds of
    its momentum are those of the others; where these differ it must bring them, or KeyError is raised.

    >>> OneCycleLR(torch.optim.Adam([torch.zeros(1)]), 0.5, total_steps=9, div_factor=4.0).get_last_lr()
    [0.125]
    """

    state_dict, load_state_dict, step, _length = shared.state_dict, _load_state_dict, shared.step, "total_steps"

    def get_lr(self) -> Rates:
        """The rates at `last_epoch`; with cycle_momentum it also sets the momentum, as torch's does."""
        theirs._warn_get_lr_called_within_step(self)
        if (t := self.last_epoch) > (total_steps := self.total_steps):
            raise ValueError(f"Tried to step {t} times. The specified number of total steps is {total_steps}")
        _write_momentum(self)
        rates = self._values("lr")
        base_lrs(self)  # takes note of groups added later, whose keys are there now
        return rates

    def _join(self) -> None:
        """Give groups added later the keys they lack.

        Their rate is the peak and not the begin of their cycle: the optimizer's default, or the rate that the others
        have at the moment, is often near the peak, and far too large if multiplied by `div_factor`.
        """
        groups, keys = self.optimizer.param_groups, GROUP_KEYS[1:] if self.cycle_momentum else GROUP_KEYS[1:4]
        whole = [group for group in groups if all(key in group for key in keys)]
        like = next((group for group in whole if group["max_lr"] != 0), None)
        for i, group in enumerate(groups if len(whole) < len(groups) else ()):
            if like is not None:
                peak = float(group.get("max_lr", group["lr"]))
                given = {key: peak * float(like[key] / like["max_lr"]) for key in keys[:3]}
                given |= {key: like[key] for key in keys[3:] if all(other[key] == like[key] for other in whole)}
                group |= given | group
            if missing := [key for key in keys if key not in group]:
                raise KeyError(
                    f"OneCycleLR: param_groups[{i}] must have the keys {keys}, got a group without {missing}. "
                    "Pass them to add_param_group, or construct the schedule after adding the group."
                )

    def _momenta(self) -> Rates:
        return self._values("momentum")

    def _values(self, quantity: str) -> Rates:
        """The "lr" or "momentum" of each group at `last_epoch`."""
        self._join()
        phases = cast(list[dict[str, Any]], self._schedule_phases)
        keys = [phases[0][f"start_{quantity}"], *(phase[f"end_{quantity}"] for phase in phases)]
        levels = ([group[key] for key in keys] for group in self.optimizer.param_groups)
        ends = [phase["end_step"] for phase in phases]
        return [curves.one_cycle(self.last_epoch, of_group, ends, self._anneal_func_type) for of_group in levels]

    def rescale(self, total_steps: int) -> None:
        """Go on as in a cycle planned for `total_steps` steps from its start, those already taken included.

        The phases keep their shares of the cycle; the rate and the momentum take their new values at once. The new
        length is saved with the state.

        Raises:
            ValueError: `total_steps` is not a positive integer, or more steps have been taken.
        """
        shared.check_length(self, total_steps)
        if total_steps == self.total_steps:  # else the ends would be rounded once more
            return
        phases = cast(list[dict[str, Any]], self._schedule_phases)
        for i, phase in enumerate(phases):  # the ends are p T - 1, 2 p T - 2, T - 1: see `curves.one_cycle`
            back = i + 1 if i < len(phases) - 1 else 1
            phase["end_step"] = (phase["end_step"] + back) / self.total_steps * total_steps - back
        self.total_steps = total_steps
        if self.last_epoch >= 0:  # in a SequentialLR it may not have begun
            self._update_lr(self.last_epoch)


class LambdaLR(theirs.LambdaLR):
    """As `torch.optim.lr_scheduler.LambdaLR`: base_lr f(t), the function f of the step being the user's.

    One `lr_lambda` for all groups serves groups added later too; of several, append one to `lr_lambdas` for each.
    Functions are not saved, objects that can be called are, as in torch; a module's function can be pickled.

    >>> LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), lr_lambda=lambda t: 0.5**t).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, step = shared.state_dict, shared.load_functions, shared.step
    rescale, _endless = shared.refuse_rescale, "your function knows the steps; give it the new length instead"

    def get_lr(self) -> Rates:
        theirs._warn_get_lr_called_within_step(self)
        bases, lambdas = base_lrs(self), shared.each_group(self, self.lr_lambdas, "lr_lambdas")
        return [curves.between(0.0, base_lr, factor(self.last_epoch)) for base_lr, factor in zip(bases, lambdas)]


class CyclicLR(theirs.CyclicLR):
    """As `torch.optim.lr_scheduler.CyclicLR`, over `curves.triangle`.

    Groups added later share the bounds of the others if these are the same for all; else append theirs to `base_lrs`,
    `max_lrs`, `base_momentums` and `max_momentums`.

    >>> CyclicLR(torch.optim.SGD([torch.zeros(1)], momentum=0.9), base_lr=0.1, max_lr=0.5).get_last_lr()
    [0.1]
    """

    state_dict, load_state_dict, step = shared.state_dict, _load_state_dict, shared.step
    rescale, _endless = (
        shared.refuse_rescale,
        "cycles of total_size steps repeat, without end; set `total_size` instead",
    )

    def get_lr(self) -> Rates:
        """The rates at `last_epoch`; with cycle_momentum it also sets the momentum, as torch's does."""
        theirs._warn_get_lr_called_within_step(self)
        vars(self).setdefault(shared.BUILT_ON, self.optimizer.param_groups)
        _write_momentum(self)
        return self._values(self.base_lrs, self.max_lrs, "base_lrs", "max_lrs")

    def _momenta(self) -> Rates:
        return self._values(self.max_momentums, self.base_momentums, "max_momentums", "base_momentums")

    def _scale(self, cycle: int) -> float:
        if self._scale_fn_custom is not None:
            return self._scale_fn_custom(cycle if self.scale_mode == "cycle" else self.last_epoch)
        if self.mode == "exp_range":
            return curves.exponential(self.last_epoch, self.gamma)
        return curves.halving(cycle) if self.mode == "triangular2" else 1.0

    def _values(self, ends: list[Any], peaks: list[Any], *names: str) -> list[Any]:
        """From `ends`, at the ends of each cycle, up or down to `peaks`, as high as the cycle's scale has it."""
        cycle, height = curves.triangle(self.last_epoch, self.total_size, self.step_ratio)
        height *= self._scale(cycle)
        ends, peaks = (shared.each_group(self, values, name) for values, name in zip((ends, peaks), names))
        return [curves.between(end, peak, height) for end, peak in zip(ends, peaks)]
