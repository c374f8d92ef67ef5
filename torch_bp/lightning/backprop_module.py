"""A network under Lightning, trained by autograd or by `TrainStep`.

`torch_bp.optim` is loaded on use only: see there.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau  # torch_bp's are subclasses of these
from torchmetrics import Metric, MetricCollection

from torch_bp.lightning.lr_finder import total_steps
from torch_bp.lightning.monitor import BackpropMonitor


class BackpropModule(LightningModule):
    """A network with its loss, optimizer, schedule and metrics, trained by autograd or by `torch_bp.TrainStep`.

    A batch is `(x, y)`; a tuple or list in the place of `x` or `y` is several arguments of the network or the loss.
    Logged are `loss/<stage>` and the metrics, by epoch.

    With `engine="step"` forward, loss and backward are one explicit pass, whose gradients are those of autograd. All
    else is Lightning's, which goes on stepping the optimizer: accumulation, clipping, schedules, callbacks,
    checkpoints, and resuming are as ever, and a fit may change engines at a checkpoint. What differs:

    - The gradients are those of the loss as `training_step` returns it. A subclass may call it once for a batch, and
      add to the loss, but not scale it.
    - `on_before_zero_grad` finds no gradients, since those of the batch before are gone by then.
    - Processes: one, or several under `DDPStrategy`, which averages the gradients as ever. With "16-mixed" the host
      reads the scale of the loss at every step.

    A Trainer has a price of its own for every step, of which no engine takes anything away. For layers 64-32-10, Adam,
    batches of 32 that are there already, no metrics, and one core of a server, a step took 0.67 ms with "step", 0.73
    with "autograd", and 0.09 in `TrainStep.epoch` without a Trainer: small networks are faster in a loop of one's own.

    Args:
        model: the network.
        loss: called with the network's output and the targets; gives a number. Without parameters of its own, if the
            engine is "step".
        optimizer: called with the parameters. On the command line `class_path` and `init_args` of an optimizer.
        scheduler: called with the optimizer. A `total_steps` left open becomes the length of the fit. Default: none.
        engine: "autograd" (default) or "step".
        capture, fallback: of `torch_bp.TrainStep`, for the engine "step".
        prediction: turns outputs into what metrics and `predict` get, such as probabilities. Default: as they are.
        metrics: called without arguments, by name; the tag is `<name>/<stage>`. Default: none.
        interval: what the schedule counts, "step" (default) or "epoch". `ReduceLROnPlateau` always counts epochs.
        monitor: the metric that `ReduceLROnPlateau` watches. Default: "loss/val".

    Raises:
        ValueError: another `engine` or `interval`; in the fit, a schedule that ends before the fit does.
        RuntimeError: in the fit, what `engine="step"` cannot do.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from torch_bp import nn, optim
        >>> from lightning.pytorch import Trainer
        >>> from torch_bp.lightning import BackpropModule
        >>> module = BackpropModule(
        ...     nn.MLP([4, 8, 1]), nn.MSELoss(), lambda params: optim.Adam(params, lr=1e-3), engine="step"
        ... )
        >>> trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
        >>> # trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=32))
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: torch.nn.Module | Callable[..., Tensor],
        optimizer: Callable[[Iterable], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        engine: Literal["autograd", "step"] = "autograd",
        *,
        prediction: torch.nn.Module | None = None,
        metrics: dict[str, Callable[[], Metric]] | None = None,
        interval: Literal["step", "epoch"] = "step",
        monitor: str = "loss/val",
        capture: bool | Literal["auto"] = "auto",
        fallback: Literal["error", "autograd"] = "error",
    ) -> None:
        super().__init__()
        if engine not in ("autograd", "step"):
            raise ValueError(f"BackpropModule: engine must be 'autograd' or 'step', got {engine!r}.")
        if interval not in ("step", "epoch"):
            raise ValueError(f"BackpropModule: interval must be 'step' or 'epoch', got {interval!r}.")
        self.model, self.loss, self.optimizer, self.scheduler = model, loss, optimizer, scheduler
        self.engine, self.interval, self.monitor = engine, interval, monitor
        self.capture, self.fallback = capture, fallback
        self.prediction = prediction or torch.nn.Identity()
        self.train_metrics, self.val_metrics, self.test_metrics = (
            MetricCollection({f"{name}/{stage}": make() for name, make in (metrics or {}).items()})
            for stage in ("train", "val", "test")
        )
        self._explicit: _ExplicitPass | None = None

    def forward(self, *x: Any) -> Any:
        return self.model(*x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.engine == "autograd":
            return self._evaluate(batch, "train", self.train_metrics)
        if self._explicit is None or self._explicit.trainer is not self.trainer:
            self._explicit = _ExplicitPass(self)
        x, y = map(_several, batch)
        loss, output = self._explicit(x, y, batch_idx)
        self._log(loss, output, x, y, "train", self.train_metrics)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: Any, stage: str, metrics: MetricCollection) -> Tensor:
        x, y = map(_several, batch)
        output = self(*x)
        loss = self.loss(output, *y)
        self._log(loss, output, x, y, stage, metrics)
        return loss

    def _log(self, loss: Tensor, output: Any, x: Any, y: Any, stage: str, metrics: MetricCollection) -> None:
        # Of all processes: on what is logged schedules step and fits stop, which each of them must do alike.
        how: Any = {"on_step": False, "on_epoch": True, "prog_bar": stage == "val", "sync_dist": True}
        self.log(f"loss/{stage}", loss, batch_size=len(x[0]), **how)
        if metrics:
            metrics.update(self.prediction(output.detach()), *y)
            self.log_dict(metrics, **how)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Columns of a table: target and prediction, which is the likeliest class if there are several."""
        x, target = batch
        prediction = self.prediction(self(*_several(x)))
        if prediction.shape[-1] == 1:
            return {"target": target, "prediction": prediction}
        probability, label = prediction.max(dim=-1)
        return {"target": target, "prediction": label, "probability": probability}

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        given = {name: item.default for name, item in inspect.signature(self.scheduler).parameters.items()}
        given |= getattr(self.scheduler, "keywords", {})  # LightningCLI hands over a partial of a function of its own
        open_end = "total_steps" in given and given["total_steps"] is given.get("epochs") is None
        scheduler: Any = self.scheduler
        if open_end:
            scheduler = partial(scheduler, total_steps=total_steps(self.trainer, self.interval))
        scheduler = scheduler(optimizer)
        interval = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else self.interval
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": self.monitor},
        }

    def on_train_start(self) -> None:
        """Refuse a schedule that would end before the fit does, such as one resumed into more epochs."""
        for each in self.trainer.lr_scheduler_configs:
            total = getattr(each.scheduler, "total_steps", None)
            if total is not None and total < (planned := total_steps(self.trainer, self.interval)):
                raise ValueError(
                    f"{type(each.scheduler).__name__}: total_steps must be at least {planned}, the length "
                    f"of the fit, got {total}. Shorten the fit: a resumed schedule keeps its length."
                )

    def teardown(self, stage: str) -> None:
        self._explicit = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has parameters of its own, to which nothing that was captured applies.
        return super().__getstate__() | {"_explicit": None}


class _ExplicitPass:
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


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _give(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient
