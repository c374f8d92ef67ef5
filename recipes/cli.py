"""The command line of the recipes: LightningCLI, and what a run leaves behind for its reader."""

import csv
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from recipes.callbacks import Checkpoint, Norms
from torch_bp.lightning import LRFinder


class SaveConfig(SaveConfigCallback):
    """As Lightning's, but only if a logger gives the run a folder, never into the working folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class RecipeCLI(LightningCLI):
    """LightningCLI with these additions.

    - `--threads` sets the number of CPU threads. The model takes its sizes from the data.
    - A run keeps two checkpoints, `best.ckpt`, by `loss/val`, and `last.ckpt`, of its last epoch.
    - `--ckpt_path best` and `last` mean the latest run of the recipe, in a new process too. `validate`,
      `test` and `predict` take `last` unless told otherwise, never untrained weights.
    - `fit` ends with a test of the last weights: a 1cycle schedule is made to end at its best, and which
      epoch is best on a small validation part is largely luck. One with an `LRFinder` has trained nothing to test.
    - Metrics also go to `metrics.csv`, predictions to `predictions.csv`. Every command ends with a table.
    """

    tensorboard: TensorBoardLogger | None = None
    last: Checkpoint | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--threads", type=PositiveInt | None, help="CPU threads; null is torch's choice.")
        for name in ("features", "outputs", "rescale"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        config = self.config[command]
        if command != "fit" and config.ckpt_path is None and not config.trainer.fast_dev_run:
            config.ckpt_path = "last"
        if not config.ckpt_path or not hasattr(config.trainer.logger, "init_args"):
            return
        logger = config.trainer.logger.init_args
        runs = Path(logger.get("save_dir") or "", logger.get("name") or "")
        if config.ckpt_path in ("best", "last"):
            found = sorted(runs.glob(f"*/checkpoints/{config.ckpt_path}.ckpt"), key=os.path.getmtime)
            if not found:
                parser.error(
                    f"--ckpt_path {config.ckpt_path}: {runs} must hold a run with a checkpoint, found none. "
                    "Run `fit` first, or give the path of a checkpoint."
                )
            config.ckpt_path = str(found[-1])
        run = Path(config.ckpt_path).absolute().parent.parent
        if command != "fit" and run.parent == runs.absolute():
            logger.version = run.name

    def before_instantiate_classes(self) -> None:
        if threads := self.config[self.subcommand].threads:
            torch.set_num_threads(threads)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.trainer_defaults["callbacks"] = [Norms()]
        if self.config[self.subcommand].trainer.enable_checkpointing is not False:
            # Two callbacks: save_last=True would update last.ckpt only when best.ckpt is.
            best = Checkpoint(monitor="loss/val", filename="best")
            self.last = Checkpoint(filename="last", save_on_train_epoch_end=True)
            self.trainer_defaults["callbacks"] += [best, self.last]
        trainer = super().instantiate_trainer(**kwargs)
        if not isinstance(trainer.logger, TensorBoardLogger):
            return trainer
        self.tensorboard = logger = trainer.logger
        if self.subcommand == "fit":
            self.make_run_folder(logger)  # still empty: CSVLogger, being first, does not warn
            trainer.loggers = [CSVLogger(logger.save_dir, logger.name, logger.version), logger]
        else:
            trainer.loggers = []  # the points would lie at step 0 of the run's curves
            warnings.filterwarnings("ignore", "The dirpath has changed")  # which only matters to a fit
        return trainer

    def make_run_folder(self, logger: TensorBoardLogger) -> str:
        """Make it before anything is computed, or say why not."""
        try:
            os.makedirs(logger.log_dir, exist_ok=True)
        except OSError as error:
            self.parser.error(
                f"run folder: {logger.log_dir} must be writable, got {error.strerror!r}. "
                "Choose another place with --trainer.logger.save_dir FOLDER."
            )
        return logger.log_dir

    def fit(self, **kwargs: Any) -> None:
        started = time.perf_counter()
        self.trainer.fit(**kwargs)
        seconds = time.perf_counter() - started
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, LRFinder) for callback in callbacks):
            return  # it has said what it found, and nothing has been trained

        weights = self.last.best_model_path if self.last else None
        [metrics] = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=weights or None, verbose=False)
        if self.tensorboard:
            hparams, step = self.tensorboard.hparams, self.trainer.global_step
            self.tensorboard.log_hyperparams(hparams, dict(metrics), step=step)
        self.report({**metrics, "time of the fit": f"{seconds:.1f} s"}, weights)

    def validate(self, **kwargs: Any) -> None:
        [metrics] = self.trainer.validate(**kwargs | {"verbose": False})
        self.report(metrics, kwargs["ckpt_path"])

    def test(self, **kwargs: Any) -> None:
        [metrics] = self.trainer.test(**kwargs | {"verbose": False})
        self.report(metrics, kwargs["ckpt_path"])

    def predict(self, **kwargs: Any) -> None:
        batches: Any = self.trainer.predict(**kwargs | {"return_predictions": True})
        table = {name: torch.cat([batch[name] for batch in batches]).flatten().tolist() for name in batches[0]}
        written = "nowhere: no TensorBoardLogger, hence no run folder"
        if self.tensorboard:
            written = os.path.join(self.make_run_folder(self.tensorboard), "predictions.csv")
            with open(written, "w", newline="") as file:
                csv.writer(file).writerows([table, *zip(*table.values())])
        self.report({"rows": str(len(table["target"])), "predictions": written}, kwargs["ckpt_path"])

    @rank_zero_only
    def report(self, results: Mapping[str, float | str], weights: str | None) -> None:
        """Print what came out, of which weights, and where it lies."""
        table = Table(show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in results.items():
            table.add_row(name, value if isinstance(value, str) else f"{value:.4f}")
        table.add_row("weights", weights or "as they are in memory: no checkpoint")
        if self.tensorboard and os.path.isdir(self.tensorboard.log_dir):
            table.add_row("run", self.tensorboard.log_dir)
        Console(markup=False, highlight=False).print(table)
        if self.tensorboard:
            print(f"tensorboard --logdir {self.tensorboard.save_dir}")


def main(args: ArgsType = None) -> None:
    """Run one command, of `sys.argv` or of `args`."""
    with warnings.catch_warnings():
        # The tables lie in memory: a worker process would only cost.
        warnings.filterwarnings("ignore", ".* does not have many workers")
        # Lightning's own use of a function that torch has renamed.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        RecipeCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            parser_kwargs={"prog": "python -m recipes"},
            trainer_defaults={"enable_progress_bar": sys.stdout.isatty()},
            args=args,
        )
