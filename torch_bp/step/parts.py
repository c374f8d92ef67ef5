"""What a training step is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_bp.step.line import Passes
from torch_bp.step.loss_scale import LossScale
from torch_bp.step.update import Update


@dataclass(frozen=True)
class Parts:
    """The same for every batch.

    Attributes:
        passes: runs the model and the loss.
        modules: the model, and the loss if it is one.
        parameters: gives those that are trained.
        update: what follows the last batch of a window.
        loss_scale: of float16, if there is one.
    """

    passes: Passes
    modules: Sequence[torch.nn.Module]
    parameters: Callable[[], list[Tensor]]
    update: Update
    loss_scale: LossScale | None
