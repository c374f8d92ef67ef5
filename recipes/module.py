"""A multilayer perceptron as a `BackpropModule`.

Layer l computes z_l = W_l a_{l-1} + b_l and a_l = act(z_l) (eq. 1 and 2), from the input a_0 of shape
(batch, features) to the output, (batch, outputs), which has no activation. Loss, metrics, optimizer and
schedule are whatever the recipe names.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from torch_bp import nn
from torch_bp.lightning import BackpropModule


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


class MLP(BackpropModule):
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
        prediction: called without arguments; see `BackpropModule`.
        metrics, interval, monitor, engine: see `BackpropModule`.
        lr_scheduler: its `scheduler`.
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
        engine: Literal["autograd", "step"] = "autograd",
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (fan_in, fan_out) in enumerate(pairwise([features, *hidden]), start=1):
            layers[f"linear{number}"] = nn.Linear(fan_in, fan_out)
            layers[f"activation{number}"] = activation()
            if dropout:
                layers[f"dropout{number}"] = nn.Dropout(dropout)
        layers["output"] = nn.Linear([features, *hidden][-1], outputs)
        if rescale:
            layers["rescale"] = Rescale(*rescale)
        super().__init__(
            nn.Sequential(layers),
            loss(),
            optimizer,
            lr_scheduler,
            engine,
            prediction=prediction(),
            metrics=metrics,
            interval=interval,
            monitor=monitor,
        )
        self.save_hyperparameters()
