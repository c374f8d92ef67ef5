"""A fit that diverges goes back and on with a smaller rate: `torch_bp.DivergenceGuard` as a callback."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

import torch_bp.diagnostics.guard as plain
from torch_bp.diagnostics.guard_arguments import check_numbers
from torch_bp.diagnostics.guard_event import Event


class DivergenceGuard(Callback):
    """As `torch_bp.DivergenceGuard`, with model, optimizers, schedules and scaler of the fit.

    It looks at the loss that goes into the backward, the sum of what goes into one update, and at the gradients before
    they are clipped. A bad update is left out by dropping the gradients. The run goes back at the end of the batch,
    after schedules that step by batch. The Trainer's counters, its loggers and its data go on: `global_step` counts the
    updates that were taken back too. Works with automatic and manual optimization; a closure that is evaluated several
    times for an update, as that of LBFGS, is judged by its first loss.

    Where there is a logger, each event gives the scalars `guard/<action>` (its number of retries or skips so far) and
    `guard/factor`, at the global step. With several processes under DDP the loss is averaged, so that all decide alike,
    which is one more message for each update. The callback's state travels in checkpoints; snapshots do not, and a
    resumed fit begins with one of the state that it has loaded.

    Args:
        data: as of `torch_bp.DivergenceGuard`. Default: none.
        factor, retries, cooldown, every, keep, trust, storage, spike, patience, rise, window: as there.

    Attributes:
        guard: the `torch_bp.DivergenceGuard`, once the fit has begun.
        events: what has happened.

    Raises:
        TypeError, ValueError: as of `torch_bp.DivergenceGuard`.
        RuntimeError: in the fit, a strategy that is neither one device nor DDP, or as of `torch_bp.DivergenceGuard`.
        DivergenceError: in the fit, no retries are left.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> guard = DivergenceGuard(factor=0.5, retries=5)
        >>> trainer = Trainer(callbacks=guard, max_epochs=2, logger=False, enable_checkpointing=False)
        >>> # trainer.fit(module, datamodule=data); then guard.events
        >>> guard.events
        []
    """

    def __init__(
        self,
        data: Any = None,
        factor: float = 0.5,
        retries: int = 3,
        cooldown: int = 0,
        every: int = 100,
        keep: int = 3,
        trust: int = 50,
        storage: str = "device",
        spike: float | None = 10.0,
        patience: int = 2,
        rise: float | None = 0.5,
        window: int = 64,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_numbers(self._arguments)
        self.guard: plain.DivergenceGuard | None = None
        self._loaded: dict[str, Any] | None = None
        self._losses: list[Tensor] = []  # since the last update
        self._judged = False  # an update of this batch
        self._logged = 0  # events

    @property
    def events(self) -> list[Event]:
        return [] if self.guard is None else self.guard.events

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise RuntimeError(
                "DivergenceGuard: strategy must be one device or DDPStrategy, whose processes have all parameters, got "
                f"{type(strategy).__name__}."
            )
        self.guard = plain.DivergenceGuard(
            pl_module,
            trainer.optimizers,
            scheduler=[each.scheduler for each in trainer.lr_scheduler_configs],
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **self._arguments,
        )
        if self._loaded is not None:
            self.guard.load_state_dict(self._loaded)
            self._loaded = None
        self._losses, self._judged, self._logged = [], False, len(self.guard.events)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        guard, losses = self.guard, self._losses
        self._losses = []
        if guard is None or not losses or (self._judged and pl_module.automatic_optimization):
            return
        loss = torch.stack([each.float().reshape(()) for each in losses]).sum()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            if any(each.dtype is torch.float16 for each in losses):
                return
            loss = loss / scaler.scale(torch.ones_like(loss))
        if trainer.world_size > 1:
            loss = trainer.strategy.reduce(loss, reduce_op="mean")
        self._judged = True
        which = optimizer if len(trainer.optimizers) > 1 else None
        if not guard.before_update(loss, which):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.guard is None or not self._judged:
            return
        self._judged = False
        try:
            self.guard.after_update()
        finally:
            self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.guard is not None:
            try:
                self.guard.settle()
            finally:
                self._log(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"guard": self._loaded if self.guard is None else self.guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["guard"]

    def _log(self, trainer: Trainer) -> None:
        new = self.events[self._logged :]
        self._logged = len(self.events)
        for event in new:
            count = sum(each.action == event.action for each in self.events)
            for logger in trainer.loggers:
                numbers = {f"guard/{event.action}": float(count), "guard/factor": event.factor}
                logger.log_metrics(numbers, step=trainer.global_step)
