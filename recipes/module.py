"""A multilayer perceptron as a LightningModule.

Layer l computes z_l = W_l a_{l-1} + b_l and a_l = act(z_l) (eq. 1 and 2), from the input a_0 of shape
(batch, features) to the output, (batch, outputs), which has no activation. Loss, metrics, optimizer and
schedule are whatever the recipe names.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau  # torch_bp's is a subclass of it
from torchmetrics import Metric, MetricCollection

from torch_bp import nn
from torch_bp.lightning import total_steps

Batch = tuple[Tensor, Tensor]


class Rescale(nn.Module):
    """`mean + std * x`: from standardised numbers back to the target's own unit."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([mean]))  # float32, in which a bfloat16 `x` is rescaled too
        self.register_buffer("std", torch.tensor([std]))

    def forward(self, x: Tensor) -> Tensor:
        return self.mean + self.std * x

    def extra_repr(self) -> str:
        return f"mean={self.mean.item():.4g}, std={self.std.item():.4g}"


class MLP(LightningModule):
    """A multilayer perceptron and how to train it.

    Args:
        features: columns of the input. On the command line this, `outputs` and `rescale` come from the data.
        outputs: columns of the output.
        optimizer: called with the parameters.
        loss: called without arguments; what it gives is called with the output and the target.
        hidden: widths of the hidden layers, input side first.
        activation: called without arguments, once for each hidden layer.
        dropout: probability in [0, 1) with which a hidden activation is zeroed while training.
        rescale: mean and standard deviation of a real target, which the network then ends by putting back.
        prediction: turns outputs into what metrics and `predict` get, such as probabilities.
        metrics: by name; the tag is `<name>/<stage>`.
        lr_scheduler: called with the optimizer. A `total_steps` left open becomes the length of the fit.
        interval: what the schedule counts. `ReduceLROnPlateau` always counts epochs.
        monitor: the metric that `ReduceLROnPlateau` watches.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        optimizer: OptimizerCallable,
        loss: Callable[[], nn.Module],
        hidden: Sequence[PositiveInt] = (128, 128),
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.0,
        rescale: tuple[float, float] | None = None,
        prediction: Callable[[], nn.Module] = nn.Identity,
        metrics: dict[str, Callable[[], Metric]] | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        interval: Literal["step", "epoch"] = "step",
        monitor: str = "loss/val",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer, self.lr_scheduler, self.interval, self.monitor = (
            optimizer,
            lr_scheduler,
            interval,
            monitor,
        )

        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (fan_in, fan_out) in enumerate(pairwise([features, *hidden]), start=1):
            layers[f"linear{number}"] = nn.Linear(fan_in, fan_out)
            layers[f"activation{number}"] = activation()
            if dropout:
                layers[f"dropout{number}"] = nn.Dropout(dropout)
        layers["output"] = nn.Linear([features, *hidden][-1], outputs)
        if rescale:
            layers["rescale"] = Rescale(*rescale)
        self.network = nn.Sequential(layers)

        self.loss = loss()
        self.prediction = prediction()
        self.train_metrics, self.val_metrics, self.test_metrics = (
            MetricCollection({f"{name}/{stage}": make() for name, make in (metrics or {}).items()})
            for stage in ("train", "val", "test")
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._step(batch, "train", self.train_metrics)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch, "test", self.test_metrics)

    def _step(self, batch: Batch, stage: str, metrics: MetricCollection) -> Tensor:
        x, target = batch
        output = self(x)
        loss = self.loss(output, target)
        metrics.update(self.prediction(output.detach()), target)
        bar = stage == "val"
        self.log(f"loss/{stage}", loss, on_step=False, on_epoch=True, prog_bar=bar, batch_size=len(x))
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=bar)
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Columns of a table: target and prediction, which is the likeliest class if there are several."""
        x, target = batch
        prediction = self.prediction(self(x))
        if prediction.shape[-1] == 1:
            return {"target": target, "prediction": prediction}
        probability, label = prediction.max(dim=-1)
        return {"target": target, "prediction": label, "probability": probability}

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        arguments = getattr(self.lr_scheduler, "keywords", {})  # LightningCLI hands over a functools.partial
        open_end = "total_steps" in arguments and arguments["total_steps"] is arguments.get("epochs") is None
        length = {"total_steps": total_steps(self.trainer, self.interval)} if open_end else {}
        scheduler = self.lr_scheduler(optimizer, **length)
        interval = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else self.interval
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": self.monitor},
        }

    def on_train_start(self) -> None:
        """Refuse a schedule that would end before the fit does, such as one resumed into more epochs."""
        for config in self.trainer.lr_scheduler_configs:
            total = getattr(config.scheduler, "total_steps", None)
            if total is not None and total < (planned := total_steps(self.trainer, self.interval)):
                raise ValueError(
                    f"{type(config.scheduler).__name__}: total_steps must be at least {planned}, the length "
                    f"of the fit, got {total}. Shorten the fit: a resumed schedule keeps its length."
                )
