"""TrainStep: the report's Algorithm 1 for a model, as one line of operations without autograd's graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels import engine
from torch_bp.step.capture import NotCapturable
from torch_bp.step.line import Line, Passes

_LINES = 8  # that are kept for one kind of batch


class TrainStep:
    """A whole training step: forward, loss, error signals from the last layer to the first, gradients and update.

    The model's own forward is run once, with every operation on a tape; what it did is captured and run again for each
    batch of the same shape, over memory that never moves (`torch_bp.step.capture`). Values and gradients are those of
    `loss.backward()`: the same Functions compute them. Parameters stay the model's, gradients are in `p.grad`, and the
    optimizer's state is its own, so that checkpoints, schedules and ordinary training go on from there at any time.

    Args:
        model: a module, called with the inputs. Modules of `torch_bp.nn`, torch's own of the same names, functions
            of the same names, arithmetic, and what moves elements (`cat`, `reshape`, ...).
        loss_fn: called with the model's output and the targets; a loss of `torch_bp.nn`, torch's, or a function
            made of such.
        optimizer: any that holds parameters of the model.
        clip_grad_norm: as `torch.nn.utils.clip_grad_norm_` before every update, > 0. Default: none.
        clip_grad_value: as `torch.nn.utils.clip_grad_value_`, > 0. Default: none.
        accumulate: how many batches make one update, with the mean of their gradients; >= 1.
        capture: "auto" (default: capture where it can be done), True (or raise why not), False (run the model's
            Python at every step, for debugging).
        fallback: "error" (default) or "autograd", which lets autograd do, inside the step, what has no explicit
            backward.

    Raises:
        TypeError, ValueError: an argument is none of these.

    Example:
        >>> import torch
        >>> import torch_bp
        >>> from torch_bp import nn, optim
        >>> model = nn.MLP([4, 8, 3])
        >>> step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
        >>> x, y = torch.zeros(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> before, after = step(x, y), step(x, y)
        >>> bool(after < before)
        True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        accumulate: int = 1,
        capture: bool | str = "auto",
        fallback: str = "error",
    ) -> None:
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.clip_grad_norm, self.clip_grad_value = clip_grad_norm, clip_grad_value
        self.accumulate, self.capture = accumulate, capture
        self._passes = Passes(model, loss_fn, fallback == "autograd")
        self._modules = [m for m in (model, loss_fn) if isinstance(m, torch.nn.Module)]
        self._lines: dict[Any, list[Line]] = {}
        self._homes: dict[Tensor, Tensor] = {}
        self._waiting = 0  # batches since the last update

    def __call__(self, x: Any, y: Any) -> Tensor:
        """Do one step on a batch; return its loss, a number of its own memory."""
        first = self._waiting == 0
        loss = self._pass(x, y, add=not first, scale=1 / self.accumulate)
        self._waiting += 1
        if self._waiting == self.accumulate:
            self.update()
        return loss

    def backward(self, x: Any, y: Any) -> Tensor:
        """Do everything but the update: gradients are added to `p.grad`, as `loss.backward()` does."""
        return self._pass(x, y, add=any(p.grad is not None for p in self._parameters()))

    def update(self) -> None:
        """Clip the gradients and let the optimizer step; after a window that is not full, too."""
        self._waiting = 0
        if self.clip_grad_value is not None:
            torch.nn.utils.clip_grad_value_(self._parameters(), self.clip_grad_value)
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters(), self.clip_grad_norm)
        self.optimizer.step()

    def many(self, xs: Tensor, ys: Tensor) -> Tensor:
        """Do a step on each batch along the first dimension; return their losses."""
        return torch.stack([self(x, y) for x, y in zip(xs, ys)])

    def _parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _pass(self, x: Any, y: Any, add: bool, scale: float = 1.0) -> Tensor:
        inputs = (x if isinstance(x, tuple) else (x,), y if isinstance(y, tuple) else (y,))
        batch = [t for part in inputs for t in part if isinstance(t, Tensor)]
        kind = (add, scale, engine.forced(), torch._C._is_any_autocast_enabled(), *((t.shape, t.dtype) for t in batch))
        with torch.no_grad():
            line = next((line for line in self._lines.get(kind, ()) if line.unchanged.holds()), None)
            if line is not None:
                loss = line.run(batch).clone()
            else:
                line, loss = self._first(inputs, kind, add, scale)
            if line is not None:
                for p, home in line.gradients:
                    p.grad = home
        return loss

    def _first(self, inputs: Any, kind: Any, add: bool, scale: float) -> tuple[Line | None, Tensor]:
        leaves = self._parameters()
        homes = {n: self._home(p) for n, p in enumerate(leaves)}
        if self.capture:
            try:
                line = Line(self._passes, self._modules, inputs, leaves, homes, scale, add)
            except NotCapturable:
                if self.capture is True:
                    raise
            else:
                line.gradients = [(leaves[n], homes[n]) for n in line.reached]
                kept = self._lines.setdefault(kind, [])
                kept.append(line)
                del kept[:-_LINES]
                return line, line.loss.clone()
        loss, gradients, _ = self._passes.run(*inputs, leaves, scale)
        for p, gradient in zip(leaves, gradients):
            if gradient is not None:
                p.grad = p.grad + gradient if add and p.grad is not None else gradient
        return None, loss

    def _home(self, p: Tensor) -> Tensor:
        home = self._homes.get(p)
        if home is None or home.shape != p.shape or home.dtype is not p.dtype or home.stride() != p.stride():
            home = self._homes[p] = torch.empty_like(p, memory_format=torch.preserve_format)
        return home
