"""Schedules that move the rate in force by curve(t) / curve(t - 1), so that others may change it in between.

`step(epoch)` sets the rate to base_lr curve(epoch). Where torch divides by zero, `curves.move` says what happens.
"""

import math

from torch.optim import Optimizer
from torch.optim import lr_scheduler as theirs

from torch_bp.optim import curves
from torch_bp.optim.lr_scheduler import state as shared
from torch_bp.optim.lr_scheduler.state import Rates, moved


class StepLR(theirs.StepLR):
    """As `torch.optim.lr_scheduler.StepLR`, over `curves.step`.

    >>> StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), step_size=30).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, step = shared.state_dict, shared.load_state_dict, shared.step
    rescale, _endless = (
        shared.refuse_rescale,
        "the rate is cut every step_size steps, without end; set `step_size` instead",
    )
    _get_closed_form_lr = shared.closed_form

    def _curve(self, t: int, since: int = 0) -> float:
        return curves.step(t, self.step_size, self.gamma, since)

    def get_lr(self) -> Rates:
        theirs._warn_get_lr_called_within_step(self)
        return moved(self, 1.0, self._curve(self.last_epoch, since=self.last_epoch - 1))


class MultiStepLR(theirs.MultiStepLR):
    """As `torch.optim.lr_scheduler.MultiStepLR`, over `curves.multi_step`.

    >>> MultiStepLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), milestones=[30, 80]).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, step = shared.state_dict, shared.load_state_dict, shared.step
    rescale, _endless = (
        shared.refuse_rescale,
        "the rate is cut at given steps; set `milestones`, a Counter of steps instead",
    )
    _get_closed_form_lr = shared.closed_form

    def _curve(self, t: int, since: float = -math.inf) -> float:
        return curves.multi_step(t, self.milestones, self.gamma, since)

    def get_lr(self) -> Rates:
        theirs._warn_get_lr_called_within_step(self)
        return moved(self, 1.0, self._curve(self.last_epoch, since=self.last_epoch - 1))


class ConstantLR(theirs.ConstantLR):
    """As `torch.optim.lr_scheduler.ConstantLR`, over `curves.constant`.

    >>> ConstantLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), factor=0.5).get_last_lr()
    [0.4]
    """

    state_dict, load_state_dict, step = shared.state_dict, shared.load_state_dict, shared.step
    _get_closed_form_lr, rescale, _length = shared.closed_form, shared.rescale, "total_iters"

    def _curve(self, t: int) -> float:
        return curves.constant(t, self.factor, self.total_iters)

    def get_lr(self) -> Rates:
        theirs._warn_get_lr_called_within_step(self)
        return moved(self, self._curve(self.last_epoch - 1), self._curve(self.last_epoch))


class LinearLR(theirs.LinearLR):
    """As `torch.optim.lr_scheduler.LinearLR`, over `curves.linear`.

    >>> LinearLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), start_factor=0.25).get_last_lr()
    [0.2]
    """

    state_dict, load_state_dict, step = shared.state_dict, shared.load_state_dict, shared.step
    _get_closed_form_lr, rescale, _length = shared.closed_form, shared.rescale, "total_iters"

    def _curve(self, t: int) -> float:
        return curves.linear(t, self.start_factor, self.end_factor, self.total_iters)

    def get_lr(self) -> Rates:
        theirs._warn_get_lr_called_within_step(self)
        now = self._curve(self.last_epoch)
        resumed = self._is_initial and self.last_epoch > 0
        return moved(self, now if resumed else self._curve(self.last_epoch - 1), now)


class ExponentialLR(theirs.ExponentialLR):
    """As `torch.optim.lr_scheduler.ExponentialLR`, over `curves.exponential`.

    >>> ExponentialLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), gamma=0.5).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, step = shared.state_dict, shared.load_state_dict, shared.step
    rescale, _endless = (
        shared.refuse_rescale,
        "the rate shrinks by gamma in each step, without end; set `gamma` instead",
    )
    _get_closed_form_lr = shared.closed_form

    def _curve(self, t: int) -> float:
        return curves.exponential(t, self.gamma)

    def get_lr(self) -> Rates:
        theirs._warn_get_lr_called_within_step(self)
        return moved(self, 1.0, self._curve(0 if self._is_initial else 1))


class CosineAnnealingLR(theirs.CosineAnnealingLR):
    """As `torch.optim.lr_scheduler.CosineAnnealingLR`, over `curves.cosine` from the base rate to `eta_min`.

    Raises:
        ValueError: T_max is 0, with which torch divides at the first step.

    >>> CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), T_max=100).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, step = shared.state_dict, shared.load_state_dict, shared.step
    _get_closed_form_lr, rescale, _length = shared.closed_form, shared.rescale, "T_max"

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:  # noqa: N803
        if T_max == 0:
            raise ValueError(
                "CosineAnnealingLR: T_max must not be 0, got 0. Give the number of steps from base_lr to eta_min."
            )
        super().__init__(optimizer, T_max, eta_min, last_epoch)

    def _curve(self, t: int) -> float:
        return curves.cosine(t, self.T_max)

    def get_lr(self) -> Rates:
        theirs._warn_get_lr_called_within_step(self)
        before, now = self._curve(self.last_epoch - 1), self._curve(self.last_epoch)
        if self._is_initial:
            before = now
        elif before == 0:
            now = curves.cosine(1, self.T_max, rising=True)
        return moved(self, before, now, self.eta_min)


class PolynomialLR(theirs.PolynomialLR):
    """As `torch.optim.lr_scheduler.PolynomialLR`, over `curves.polynomial`.

    >>> PolynomialLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), total_iters=4).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, step = shared.state_dict, shared.load_state_dict, shared.step
    _get_closed_form_lr, rescale, _length = shared.closed_form, shared.rescale, "total_iters"

    def _curve(self, t: int) -> float:
        return curves.polynomial(t, self.total_iters, self.power)

    def get_lr(self) -> Rates:
        theirs._warn_get_lr_called_within_step(self)
        now = self._curve(self.last_epoch)
        return moved(self, now if self._is_initial else self._curve(self.last_epoch - 1), now)


class MultiplicativeLR(theirs.MultiplicativeLR):
    """As `torch.optim.lr_scheduler.MultiplicativeLR`, over `curves.product`.

    One `lr_lambda` for all groups serves groups added later too; of several, append one to `lr_lambdas` for each.

    >>> MultiplicativeLR(torch.optim.SGD([torch.zeros(1)], lr=0.8), lr_lambda=math.exp).get_last_lr()
    [0.8]
    """

    state_dict, load_state_dict, step = shared.state_dict, shared.load_functions, shared.step
    rescale, _endless = shared.refuse_rescale, "your function knows the steps; give it the new length instead"

    def get_lr(self) -> Rates:
        theirs._warn_get_lr_called_within_step(self)
        t, rates = self.last_epoch, moved(self, 1.0, 1.0)
        if self._is_initial:
            return rates
        lambdas = shared.each_group(self, self.lr_lambdas, "lr_lambdas")
        return [curves.between(0.0, lr, curves.product(t, factor, since=t - 1)) for lr, factor in zip(rates, lambdas)]
