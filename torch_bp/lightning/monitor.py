"""The monitor of `torch_bp.watch` as a callback."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from torch_bp.diagnostics import Monitor, watch


class BackpropMonitor(Callback):
    """Watches the training of a LightningModule, with either engine of a `BackpropModule`: see `torch_bp.watch`.

    Readings go to the first `TensorBoardLogger` of the trainer with all that it can show, to other loggers as metrics,
    and to `readings.jsonl` in the trainer's log folder, from the first process. With `logger=False` they are kept in
    `monitor.readings`; a trainer with `barebones=True` is left alone. Gradients are read when they are unscaled, with
    manual optimization too: after clipping where torch_bp's optimizers measure them in the step, else before it. The
    losses are what `training_step` returns, the mean over accumulated batches, and the metric of the validation that
    `validation_loss` names. A checkpoint holds the count of steps, and since when units are dead.

    Args:
        level, every, budget, write_every, layers, per_example, histograms, keep, tags, diagnose, silent,
            check_every: as of `torch_bp.watch`. Gradient checks need a loss that is a module, in the attribute `loss`,
            `loss_fn` or `criterion` of the LightningModule, and is called with what `self(...)` returns.
        optimizer: which of several optimizers is watched, from 0. Default: the first.
        validation_loss: name under which the module logs it. Default: "loss/val", "val_loss" or "val/loss".

    Attributes:
        monitor: of the fit, a `Monitor`; None before.

    Raises:
        ValueError, TypeError: in the fit, what `torch_bp.watch` raises; or there are optimizers, and not this one.

    Example:
        >>> callback = BackpropMonitor(level="layers", every=10)
        >>> # Trainer(callbacks=callback).fit(module, datamodule=data); then callback.monitor.last
    """

    def __init__(
        self,
        level: str = "layers",
        every: int = 10,
        budget: float | None = 0.02,
        write_every: int | None = None,
        layers: str | None = None,
        per_example: bool | None = None,
        histograms: bool | None = None,
        keep: int = 1000,
        tags: dict[str, str] | None = None,
        diagnose: bool = True,
        silent: bool = False,
        check_every: int | None = None,
        optimizer: int = 0,
        validation_loss: str | None = None,
    ) -> None:
        self._options: dict[str, Any] = {"level": level, "every": every, "budget": budget, "write_every": write_every}
        self._options |= {"layers": layers, "per_example": per_example, "histograms": histograms, "keep": keep}
        self._options |= {"tags": tags, "diagnose": diagnose, "silent": silent, "check_every": check_every}
        self._which, self._validation_loss = optimizer, validation_loss
        self.monitor: Monitor | None = None
        self._state: Mapping[str, Any] | None = None
        self._left: tuple[int, Mapping[str, Any]] = 0, {}  # at the end of a fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count = len(trainer.optimizers)
        if trainer.barebones or not count:
            return
        if self._which not in range(count):
            raise ValueError(
                f"BackpropMonitor: optimizer must be one of the {count} of the module, 0 to {count - 1}, got "
                f"{self._which!r}. Leave it out for the first."
            )
        optimizer = trainer.optimizers[self._which]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        several = trainer.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized()
        output = _output(trainer) if trainer.is_global_zero else None
        self.monitor = watch(pl_module, optimizer, output, scaler=scaler, reduce=several, **self._options)
        losses = (getattr(pl_module, name, None) for name in ("loss", "loss_fn", "criterion"))
        if (loss_fn := next((each for each in losses if isinstance(each, torch.nn.Module)), None)) is not None:
            self.monitor.loss_of_check(loss_fn)
        self.monitor.alone = count == 1
        if self._state is None and trainer.global_step and trainer.global_step == self._left[0]:
            self._state = self._left[1]  # the same trainer fits on
        if self._state is not None:
            self.monitor.load_state_dict(self._state)
            self._state = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.monitor is not None:
            self.monitor.epoch = trainer.current_epoch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self.monitor is not None and not self.monitor.explicit:
            # Lightning has divided it by the number of accumulated batches
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self.monitor.loss(loss.detach() * scale)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Lightning computes gradients in a closure of the step.
        if self.monitor is not None and optimizer is trainer.optimizers[self._which]:
            self.monitor.gradients_ready()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking:
            return
        names = [self._validation_loss] if self._validation_loss else ["loss/val", "val_loss", "val/loss"]
        for name in names:
            if name in trainer.callback_metrics:
                self.monitor.validation(trainer.callback_metrics[name])
                return

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def state_dict(self) -> dict[str, Any]:
        if self.monitor is not None:
            return self.monitor.state_dict()
        return dict(self._state or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None

    def _close(self, trainer: Trainer) -> None:
        if self.monitor is not None:
            self.monitor.close()
            self._left = trainer.global_step, self.monitor.state_dict()


class _Loggers:
    """Loggers that know nothing of TensorBoard, as a thing with `add_scalar`."""

    def __init__(self, loggers: list[Any], folder: str | None) -> None:
        self._loggers, self.log_dir = loggers, folder

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics({tag: value}, step=step)


def _output(trainer: Trainer) -> Any:
    """Where readings of this trainer go: TensorBoard's own writer if there is one."""
    if not trainer.loggers:
        return None
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if boards:
        return boards[0].experiment
    folder = trainer.log_dir
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    return _Loggers(trainer.loggers, folder)
