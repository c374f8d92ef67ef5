"""Whether a step is sound, by its loss and gradients: judged at once, or when their numbers have come from a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_bp.diagnostics import late
from torch_bp.diagnostics.loss_test import Anomaly, LossTest
from torch_bp.kernels.norm import sum_of_squares, total_of_squares
from torch_bp.kernels.totals import Totals

_OVERFLOWS = 20  # in a row: 2^20 below the scale it began with; that is no search for a scale any more


class Judge:
    """Judges the steps of a run, of each optimizer that steps alone by a test of its own.

    Args:
        optimizers: all there are.
        scaler: a GradScaler that is enabled, or None.
        test: makes a test of losses.

    Attributes:
        found: what is wrong with the step that is under way, or None.
        key: the number of the optimizer that steps alone, None for all.
    """

    def __init__(self, optimizers: Sequence[Optimizer], scaler: Any, test: Callable[[], LossTest]) -> None:
        self._optimizers, self._scaler = optimizers, scaler
        self._tests = {key: test() for key in (None, *range(len(optimizers)))}
        self._totals, self._tables = Totals(sum_of_squares), dict[Any, Any]()  # of what reads gradients
        self._scale, self._overflows = 0.0, 0
        self.key: int | None = None
        self.found: Anomaly | None = None
        self._out: list[tuple[int | None, float, late.Late]] = []  # what is on its way to the host
        self._marked: list[Optimizer] = []  # that have been told on the device

    @property
    def certain(self) -> bool:
        """Whether what was found takes the run back."""
        return self.found is not None and self.found.certain

    def look(self, loss: Tensor, chosen: Sequence[Optimizer] | None) -> None:
        """Judge a loss and the gradients of those that are `chosen` to step, if they are there to be looked at."""
        groups = [] if self._scaler else [group for each in chosen or () for group in each.param_groups]
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not late.asynchronous(loss):
            scale = self._scaler.get_scale() if self._scaler else 0.0
            self._judge(self.key, None, loss.item(), self._squares(gradients), scale)
            return
        threshold = self._tests[self.key].threshold()
        squares = total_of_squares(gradients, self._tables).to(loss.device)
        scale_now = loss.new_zeros(()) if self._scaler is None else self._scaler.scale(loss.new_ones(()))
        self._out.append((self.key, threshold, late.Late([loss, squares, scale_now])))
        if self._scaler is None and chosen is not None:
            bad = ~(torch.isfinite(loss) & torch.isfinite(squares) & (loss <= threshold))
            for optimizer in chosen:
                if _honours_a_flag(optimizer):
                    optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
                    self._marked.append(optimizer)

    def look_at_parameters(self, optimizer: Optimizer) -> None:
        """Judge what an update has made, if nothing was found before."""
        if self.found is None:
            squares = self._squares([p.detach() for group in optimizer.param_groups for p in group["params"]])
            if not math.isfinite(squares):
                self.found = Anomaly("gradient", squares, math.inf)

    def settle(self) -> bool:
        """Judge what has come from the device since the last step; return whether something came, and is wrong."""
        out, self._out = self._out, []
        for key, threshold, numbers in out:
            if not self.certain:
                self._judge(key, threshold, *numbers.read())
        return bool(out) and self.found is not None

    def close(self) -> None:
        """Whatever comes next is another step."""
        self.found = None
        for optimizer in self._marked:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        self._marked = []

    def forget(self) -> None:
        """Wait for nothing that is on its way."""
        self._out.clear()

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, which goes back with the run."""
        tests = {str(key): test.state_dict() for key, test in self._tests.items()}
        return {"tests": tests, "scale": self._scale, "overflows": self._overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, test in self._tests.items():
            test.load_state_dict(state["tests"][str(key)])
        self._scale, self._overflows = state["scale"], state["overflows"]

    def _squares(self, tensors: Sequence[Tensor]) -> float:
        """The sum of squares of all of them, on the host."""
        found = self._totals(tensors) if tensors else None
        return total_of_squares(tensors, self._tables).item() if found is None else float(found.sum())

    def _judge(self, key: int | None, threshold: float | None, loss: float, squares: float, scale: float) -> None:
        self.key = key
        finite = not math.isfinite(loss) or math.isfinite(squares)
        self.found = self._tests[key].judge(loss, threshold) if finite else Anomaly("gradient", squares, math.inf)
        self._overflows = self._overflows + 1 if scale < self._scale else 0
        self._scale = scale
        if self._overflows >= _OVERFLOWS and self.found is None:
            self.found = Anomaly("overflow", self._overflows, _OVERFLOWS)


def _honours_a_flag(optimizer: Optimizer) -> bool:
    """Whether its step is left out on the device where `found_inf` is 1: torch's with `fused=True`."""
    flagged = getattr(optimizer, "_step_supports_amp_scaling", False)
    return flagged and type(optimizer).__module__.startswith("torch.optim.")
