"""A pass of `TrainStep` as a node of autograd's, whose gradients Lightning's own backward takes up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torch_bp.lightning.monitor import BackpropMonitor

if TYPE_CHECKING:
    from torch_bp.lightning.backprop_module import BackpropModule


class ExplicitPass:
    """Forward, loss and backward by `TrainStep`, in the order in which Lightning wants them.

    Lightning calls `training_step`, then `zero_grad`, then `loss.backward()`, and wants the loss of the first, for
    logs and callbacks: so the pass runs in `training_step`, under its autocast and its default dtype, and gradients
    are there before `zero_grad`. They are held back, and the loss gets a graph of one node, whose backward hands them
    over. So `LightningModule.backward` stays what it is, all hooks find what they expect, a penalty that a subclass
    adds to the loss goes through autograd beside it, and a loss that somebody has scaled is found out.

    With one process the gradients stay in the step's own memory, and accumulate there. With several, the node gives
    them to autograd: DistributedDataParallel finds them where it finds all gradients, averages them in its buckets, at
    the boundary of a window only, and `no_sync`, communication hooks, and parameters without gradient work. (It would
    take its own bookkeeping amiss if the gradients came by another way.)

    Args:
        module: whose trainer has set it up.
    """

    def __init__(self, module: BackpropModule) -> None:
        from torch_bp.step import TrainStep

        self.trainer, self.module = module.trainer, module
        strategy: Any = self.trainer.strategy
        self._shared = isinstance(strategy.model, DistributedDataParallel)
        name = type(strategy).__name__
        if not self._shared and not isinstance(strategy, SingleDeviceStrategy):
            raise RuntimeError(
                f"BackpropModule: strategy must be one device or DDPStrategy for engine='step', got {name}; use "
                "engine='autograd'."
            )
        self._scaler = getattr(strategy.precision_plugin, "scaler", None)
        loss = module.loss
        if isinstance(loss, torch.nn.Module) and any(p.requires_grad for p in loss.parameters()):
            raise RuntimeError(
                "BackpropModule: loss must have no parameters to train for engine='step', which trains those of the "
                "model; make it part of the model, or use engine='autograd'."
            )
        self._metrics = bool(module.train_metrics)
        options: Any = {"keep_output": self._metrics, "capture": module.capture, "fallback": module.fallback}
        self._step = TrainStep(module.model, loss, self.trainer.optimizers[0], **options)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if isinstance(callback, BackpropMonitor) and monitor and monitor.optimizer is self.trainer.optimizers[0]:
                self._step.watch = monitor

    def __call__(self, x: tuple[Any, ...], y: tuple[Any, ...], batch_idx: int) -> tuple[Tensor, Any]:
        """Return the loss, with the node that has the gradients, and the output if there are metrics, else None."""
        leaves = [p for p in self.module.model.parameters() if p.requires_grad]
        # As Lightning decides whether to call zero_grad, which comes too late here.
        fresh = batch_idx % self.trainer.accumulate_grad_batches == 0
        loss, deliver, leaves = (self._to_autograd if self._shared else self._in_place)(x, y, leaves, fresh)
        output = self._step.output if self._metrics else None
        if self._metrics and not isinstance(output, Tensor):
            raise TypeError(
                f"BackpropModule: model must return a tensor for metrics with engine='step', got "
                f"{type(output).__name__}; use engine='autograd', or no metrics."
            )
        self._latest = deliver

        def hand_over(dy: Tensor) -> Sequence[Any]:
            if self._latest is not deliver:
                raise RuntimeError(
                    "BackpropModule: training_step must run once for each backward for engine='step', whose next pass "
                    "takes the memory of the last one's gradients; use engine='autograd'."
                )
            return deliver(dy)

        return _Gradients.apply(loss, hand_over, *leaves), output

    def _in_place(self, x: Any, y: Any, leaves: Sequence[Tensor], fresh: bool) -> Any:
        share = self._scale() / self.trainer.accumulate_grad_batches
        if fresh:
            _give(leaves, [None] * len(leaves))
        loss = self._step.backward(x, y, share)
        gradients = [p.grad for p in leaves]
        _give(leaves, [None] * len(leaves))

        def deliver(dy: Tensor) -> Sequence[None]:
            if not math.isclose(float(dy), share, rel_tol=1e-2):  # bfloat16 has three digits
                raise RuntimeError(
                    "BackpropModule: the loss must not be scaled after training_step for engine='step', which has its "
                    f"gradients by then, got {float(dy) / share:.4g} times the loss; scale it in `loss`, or use "
                    "engine='autograd'."
                )
            for p, gradient in zip(leaves, gradients):
                if gradient is not None:
                    if p.grad is not None:  # of something that was added to the loss
                        gradient.add_(p.grad)
                    p.grad = gradient
            return [None]

        # A leaf that is no parameter: those have had their hooks called.
        return loss, deliver, [torch.zeros((), requires_grad=True)]

    def _scale(self) -> float:
        """Return what Lightning multiplies the loss by: float16 would lose gradients that are scaled later."""
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    def _to_autograd(self, x: Any, y: Any, leaves: Sequence[Tensor], fresh: bool) -> Any:
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in leaves):
            raise RuntimeError(
                "BackpropModule: parameters must have no hooks for engine='step' in several processes, where both the "
                "step and autograd would call them; use engine='autograd'."
            )
        before = [p.grad for p in leaves]
        _give(leaves, [None] * len(leaves))
        share = self._scale() / self.trainer.accumulate_grad_batches  # a monitor hears error signals
        loss = self._step.backward(x, y, share)
        reached = [(p, p.grad) for p in leaves if p.grad is not None]
        _give(leaves, before)
        return loss, lambda dy: [dy / share * gradient for _, gradient in reached], [p for p, _ in reached]


class _Gradients(torch.autograd.Function):
    """A whole pass as one node: what `deliver` makes of the error signal at the loss are its gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, deliver: Callable[[Tensor], Sequence[Any]], *leaves: Tensor) -> Tensor:
        ctx.deliver = deliver
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return None, None, *ctx.deliver(dy)


def _give(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient
