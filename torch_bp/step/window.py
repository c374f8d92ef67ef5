"""A window: the batches whose gradients make one update, and what becomes of one that is not finite."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from torch_bp.kernels.norm import values_of
from torch_bp.step.arguments import Inputs
from torch_bp.step.device_line import DeviceLine
from torch_bp.step.line import Line
from torch_bp.step.origin import origin, tell
from torch_bp.step.outcomes import NOT_FINITE
from torch_bp.step.parts import Parts
from torch_bp.step.runner import Runner
from torch_bp.step.uncaptured import Uncaptured
from torch_bp.step.update import Norm
from torch_bp.step.watched import name_of


class Window:
    """Does passes, and the update after the last one of a window.

    Args:
        parts: of the step.
        runner: of the passes.

    Attributes:
        accumulate: how many batches make one update.
        steps: updates so far.
        waiting: batches since the last one.
        by_hand: True if a pass that belongs to no window has left gradients.
        ran: the last pass, None before the first.
    """

    def __init__(self, parts: Parts, runner: Runner) -> None:
        self._passes, self._modules, self._parameters = parts.passes, parts.modules, parts.parameters
        self._update, self._loss_scale, self._runner = parts.update, parts.loss_scale, runner
        self.accumulate, self.steps = 1, 0
        self.ran: Line | DeviceLine | Uncaptured | None = None
        self.waiting, self.by_hand = 0, False

    def drop(self) -> None:
        """As of `TrainStep`."""
        self.waiting, self.by_hand = 0, False
        for p in self._parameters():
            p.grad = None
        if self._update.monitor is not None:
            self._update.monitor.skipped()

    def one(self, inputs: Inputs) -> Tensor:
        """Do a pass, and if it is the last of the window, the update; return the loss, which the next overwrites."""
        if self._runner.outcomes is not None:
            # with a loss scale, steps that are left out are no exception: the counts of the next ones depend on them
            self.raise_found(wait=self._loss_scale is not None)
        if self._update.monitor is not None:
            self._update.monitor.follow(name_of(self._passes.loss_fn), whole=True)
        if not self.waiting:  # gradients by hand are replaced
            self.by_hand = False
        final = self.waiting + 1 >= self.accumulate
        self.ran = ran = self._runner.run(inputs, self.waiting > 0, 1 / self.accumulate, final=final)
        loss = ran.loss
        if ran.replayed and (ran.updates or not final):  # whether it is finite, the device will tell
            self.waiting += 1
            self._told(inputs, final)
            return loss
        size = ran.norm()
        # a norm can overflow where no number does
        finite = math.isfinite(size) or all(map(_finite, ran.gradients))
        earlier = ran.replayed and self.accumulate > 1 and int(self._runner.window) == NOT_FINITE  # type: ignore[arg-type]
        if earlier or not math.isfinite(loss) or not (finite or self._can_scale_down()):
            self._refuse(inputs, loss, size)
        self.waiting += 1
        if final and not finite:
            self._leave_out()
        elif final:
            self.finish(size if self.accumulate == 1 else None)
        return loss

    def _told(self, inputs: Inputs, final: bool) -> None:
        """Note that a device was told to do a pass, and if it is the `final` one of a window, the update."""
        about = self.steps + 1, inputs, self.ran, final
        size = self.ran.batch_bytes  # type: ignore[union-attr]
        self._runner.outcomes.note(self._runner.window, about, size)  # type: ignore[union-attr, arg-type]
        if final:
            self.waiting, self.by_hand = 0, False
            self.steps += 1
            if self._update.monitor is not None:
                self._update.monitor.updated()

    def _can_scale_down(self) -> bool:
        """True if gradients may have overflowed for their scale alone."""
        return self._loss_scale is not None and float(self._loss_scale.value) > 1

    def _leave_out(self) -> None:
        """Drop a window whose scaled gradients have overflowed."""
        self.drop()
        self._loss_scale.update_(torch.ones(()))  # type: ignore[union-attr]

    def raise_found(self, wait: bool = False) -> None:
        """Raise if a device has come upon a step that was not finite, which it has not taken."""
        outcomes = self._runner.outcomes
        found = [] if outcomes is None else outcomes.found(wait)
        untaken = [about for _, about in found if about[-1]]
        for _, _, line, _ in untaken:
            line.take_back()
        self.steps -= len(untaken)
        refused = [about for code, about in found if code == NOT_FINITE]
        if refused:
            step, inputs, _, _ = refused[0]
            later = len({about[0] for about in refused}) - 1
            more = f", as at {later} later" * (later > 0)
            where = origin(self._passes, inputs, self._parameters(), self._modules)
            raise FloatingPointError(
                f"TrainStep: at step {step}{more} the loss or the norm of the gradients was not finite: {where}. The "
                "device has left parameters, optimizer and running statistics as they were before the batch, and has "
                "gone on with those that came after; leave the batch out, or lower the rate, or clip gradients by "
                "clip_grad_norm."
            )

    def finish(self, norm: float | None) -> None:
        """Do the update; `norm` is that of the gradients, None if it is not known."""
        by_hand, self.waiting, self.by_hand = self.by_hand, 0, False
        gradients = [] if self.ran is None else self.ran.gradients
        if norm is None:  # other batches of the window may have reached others
            gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if self._loss_scale is not None and not by_hand:
            self._loss_scale.unscale_(gradients)
            self._loss_scale.update_(torch.zeros(()))
            norm = None
        self._update(gradients, Norm(gradients)() if norm is None else norm)
        self.steps += 1

    def _refuse(self, inputs: Inputs, loss: Tensor, norm: float) -> NoReturn:
        """Leave everything as it was before the batch, but for the gradients of its window, and say what is wrong."""
        value = loss.item()
        self.ran.restore()  # type: ignore[union-attr]
        if self._update.monitor is not None:
            tell(self._update.monitor, self._passes, inputs, self._parameters(), self._modules)
        self.drop()
        where = origin(self._passes, inputs, self._parameters(), self._modules)
        raise FloatingPointError(
            f"TrainStep: at step {self.steps + 1} the loss is {value:.4g} and the norm of the gradients {norm:.4g}: "
            f"{where}. Parameters, optimizer and running statistics are as before the batch, gradients of its window "
            "are dropped; leave the batch out, or lower the rate, or clip gradients by clip_grad_norm."
        )


def _finite(gradient: Tensor) -> bool:
    return bool(values_of(gradient).isfinite().all())
