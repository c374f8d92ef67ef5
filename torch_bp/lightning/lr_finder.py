"""A range test of the learning rate as a callback, and the length of a schedule.

`torch_bp.optim` is loaded on use only: see there.
"""

import inspect
import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from torch_bp import chart, config

_TRAINER = ("accelerator", "devices", "precision", "accumulate_grad_batches", "gradient_clip_val", "strategy")


def total_steps(trainer: Trainer, interval: Literal["step", "epoch"] = "step") -> int:
    """How often a schedule steps in the whole fit, for arguments such as `total_steps` or `T_max`.

    A fit that is resumed with a larger `max_epochs` brings the old length back with the schedule's state, as torch's
    do, and a cosine would rise again. `rescale` of torch_bp's schedules, in the module's `on_train_start`, which
    Lightning calls after it has loaded the state, goes on to the new one; where nothing has changed it does nothing:

        def on_train_start(self):
            self.lr_schedulers().rescale(total_steps(self.trainer))

    Args:
        trainer: the trainer of a fit, in `configure_optimizers` for example.
        interval: what the schedule counts: optimizer steps, or epochs. Default "step".

    Raises:
        ValueError: another `interval`, or the fit has no end.

    Example:
        >>> total_steps(Trainer(max_epochs=3, logger=False, enable_checkpointing=False), interval="epoch")
        3
    """
    if interval not in ("step", "epoch"):
        raise ValueError(f"interval must be 'step' or 'epoch', got {interval!r}.")
    steps = trainer.estimated_stepping_batches if interval == "step" else trainer.max_epochs
    if steps is None or not 0 < steps < math.inf:
        raise ValueError(
            f"lr_scheduler: total_steps must be positive and finite, got {steps}: the fit is open-ended. "
            "Give the Trainer max_epochs or max_steps (--trainer.max_steps on a command line)."
        )
    return int(steps)


class LRFinder(Callback):
    """A range test of the learning rate as a fit of its own: see `torch_bp.optim.lr_find`.

    The fit ends when the test does, prints what `torch-bp lr-find` prints, and leaves the model's parameters and
    buffers, and the random numbers, as they were; only generators that a loader has of its own go on. Losses of batches
    whose gradients are accumulated count as one. Schedules have no effect. Lightning's checkpoint callbacks rest during
    the fit, as they would keep weights of the test, and might overwrite or remove those of a training. The fit trains
    nothing: what is tested or saved after it are the weights from before.

    The trainer must have as many steps as there are rates: `max_steps=100`, say, with `max_epochs=-1`. If the data ends
    earlier, the test does, with a warning.

    Args:
        min_lr, max_lr, steps, smoothing, diverge: see `torch_bp.optim.RangeTest`.

    Attributes:
        test: what has been found, a `torch_bp.optim.RangeTest` with `suggestion(rule)` and `plot()`.

    Raises:
        RuntimeError: in the fit, where the model optimizes by hand, has several optimizers, or a first loss that is not
            finite.

    Example:
        >>> finder = LRFinder(steps=50)
        >>> trainer = Trainer(callbacks=finder, max_epochs=-1, max_steps=50, logger=False, enable_checkpointing=False)
        >>> # trainer.fit(model, datamodule=data); then finder.test.suggestion("steepest")
        >>> finder.test.min_lr, finder.test.max_lr
        (1e-07, 10.0)
    """

    _reports = True

    def __init__(
        self,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        steps: int = 100,
        smoothing: float = 0.9,
        diverge: float = 4.0,
    ) -> None:
        from torch_bp.optim import RangeTest

        self._arguments = (min_lr, max_lr, steps, smoothing, diverge)
        self.test = RangeTest(*self._arguments)
        self._kept, self._resting = ExitStack(), ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        from torch_bp.optim.untouched import same_random_numbers

        if stage != "fit":
            return
        self._kept.enter_context(same_random_numbers())
        resting = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoint)]  # type: ignore[attr-defined]
        if resting:
            before = trainer.callbacks  # type: ignore[attr-defined]
            self._resting.callback(setattr, trainer, "callbacks", before)
            trainer.callbacks = [callback for callback in before if callback not in resting]  # type: ignore[attr-defined]
            names = ", ".join(type(callback).__name__ for callback in resting)
            rank_zero_info(f"LRFinder: {names}: nothing is written in this fit, whose weights are thrown away.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from torch_bp.optim import RangeTest
        from torch_bp.optim.untouched import untouched

        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise RuntimeError(
                "LRFinder: the model must have one optimizer, which Lightning steps, got "
                f"{len(trainer.optimizers)} and automatic_optimization={pl_module.automatic_optimization}. "
                "Use torch_bp.optim.lr_find."
            )
        self.test = RangeTest(*self._arguments)
        self._rates = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]
        self._loss, self._done = 0.0, trainer.global_step
        self._kept.enter_context(untouched(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        from torch_bp.optim.lr_scheduler.state import write_rates
        from torch_bp.optim.range_test import scaled

        write_rates(trainer.optimizers[0], scaled(self.test.next_lr, self._rates))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs  # none where the step has skipped
        if loss is None:
            return
        loss = trainer.strategy.reduce(loss.detach().float(), reduce_op="mean")
        self._loss += float(loss)  # Lightning has divided it by the number of accumulated batches
        if trainer.global_step > self._done:
            self._done, loss, self._loss = trainer.global_step, self._loss, 0.0
            trainer.should_stop = not self.test.record(loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._kept.close()
        if not self._reports:
            return
        rank_zero_info(
            f"LRFinder: {chart.range_test(self.test)}\nThis fit has trained nothing: the model is as it was."
        )
        if self.test.cut_short:
            tried, steps = len(self.test.lr), self.test.steps
            rank_zero_warn(
                f"LRFinder: the fit ended after {tried} of {steps} rates, before the loss diverged. Give the Trainer "
                f"max_steps={steps} with max_epochs=-1, or a larger max_epochs, or take fewer steps."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        self._kept.close()
        self._resting.close()


def find_by_config(content: Mapping[str, Any], **options: Any) -> Any:
    """The range test of a LightningCLI configuration, a `torch_bp.optim.RangeTest`.

    The model's constructor arguments that the file leaves open come from attributes of the data module of the same
    name. Of `trainer` only what bears on a step counts: precision, accumulation, clipping, devices.

    Raises:
        ConfigError: there has been no loss, such as where the data module has no batches.
    """
    finder = LRFinder(**options)
    finder._reports = False  # the command does
    if isinstance(seed := content.get("seed_everything"), int) and not isinstance(seed, bool):
        torch.manual_seed(seed)
    data = _instantiated(LightningDataModule, dict(content["data"]))
    node = dict(content["model"])
    arguments = dict(node.get("init_args") or {})
    for name in inspect.signature(config.node(node)[0]).parameters:
        if name not in arguments and hasattr(data, name):
            arguments[name] = getattr(data, name)
    model = _instantiated(LightningModule, node | {"init_args": arguments})
    if content.get("optimizer") is not None:  # LightningCLI gives it to models that have none of their own
        optimizer = config.build(content["optimizer"], params=model.parameters())
        model.configure_optimizers = lambda: optimizer
    given = content.get("trainer") or {}
    trainer = Trainer(
        **{name: given[name] for name in _TRAINER if name in given},
        max_epochs=-1,
        max_steps=options.get("steps", 100),
        callbacks=[finder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* does not have many workers")
        # Lightning's own use of a function that torch has renamed.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        trainer.fit(model, datamodule=data)
    if not finder.test.lr:
        raise config.ConfigError(
            "data: it must give at least one batch with a loss, got none. "
            "Check the data module's arguments and what training_step returns."
        )
    return finder.test


def _instantiated(base: type, node: Mapping[str, Any]) -> Any:
    """The object of a node, whose arguments jsonargparse reads as LightningCLI does."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "made")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its older name
    return instantiate(parser.parse_object({"made": dict(node)})).made
