"""A network under Lightning, trained by autograd or by `TrainStep`.

`torch_bp.optim` is loaded on use only: see there.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau  # torch_bp's are subclasses of these
from torchmetrics import Metric, MetricCollection

from torch_bp.lightning.explicit_pass import ExplicitPass
from torch_bp.lightning.lr_finder import total_steps


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
        optimizer: called with the parameters: `functools.partial(optim.Adam, lr=1e-3)`. On the command line
            `class_path` and `init_args` of an optimizer.
        scheduler: called with the optimizer. A `total_steps` left open becomes the length of the fit. Default: none.
        engine: "autograd" (default) or "step".
        capture, fallback: of `torch_bp.TrainStep`, for the engine "step".
        prediction: turns outputs into what metrics and `predict` get, such as probabilities. Default: as they are.
        metrics: called without arguments, by name; the tag is `<name>/<stage>`. Default: none.
        interval: what the schedule counts, "step" (default) or "epoch". `ReduceLROnPlateau` always counts epochs.
        monitor: the metric that `ReduceLROnPlateau` watches. Default: "loss/val".

    Raises:
        TypeError: `optimizer` or `scheduler` is one already.
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
        for name, given, of in (("optimizer", optimizer, "the parameters"), ("scheduler", scheduler, "the optimizer")):
            if isinstance(given, Optimizer | LRScheduler) or not (callable(given) or given is None):
                raise TypeError(
                    f"BackpropModule: {name} must be a function of {of} making one, got {type(given).__name__}; hand "
                    "over functools.partial(the class, its arguments)."
                )
        self.model, self.loss, self.optimizer, self.scheduler = model, loss, optimizer, scheduler
        self.engine, self.interval, self.monitor = engine, interval, monitor
        self.capture, self.fallback = capture, fallback
        self.prediction = prediction or torch.nn.Identity()
        self.train_metrics, self.val_metrics, self.test_metrics = (
            MetricCollection({f"{name}/{stage}": make() for name, make in (metrics or {}).items()})
            for stage in ("train", "val", "test")
        )
        self._explicit: ExplicitPass | None = None

    def forward(self, *x: Any) -> Any:
        return self.model(*x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.engine == "autograd":
            return self._evaluate(batch, "train", self.train_metrics)
        if self._explicit is None or self._explicit.trainer is not self.trainer:
            self._explicit = ExplicitPass(self)
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


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
