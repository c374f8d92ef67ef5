"""The schedule that looks at a metric."""

import warnings
from typing import Literal, SupportsFloat

from torch.optim import Optimizer
from torch.optim import lr_scheduler as theirs

from torch_bp.optim import curves
from torch_bp.optim.lr_scheduler import state as shared
from torch_bp.optim.lr_scheduler.state import rates_of


class ReduceLROnPlateau(theirs.ReduceLROnPlateau):
    """As `torch.optim.lr_scheduler.ReduceLROnPlateau`, over `curves.improved` and `curves.plateau`.

    It also takes `last_epoch`, as all other schedules do: libraries hand it to every schedule but torch's own class of
    this name. It says from which epoch to go on counting, and by keyword only; -1, the default, begins at 0.

    >>> scheduler = ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=0.8), factor=0.5, patience=0)
    >>> for loss in (1.0, 0.5, 0.5):
    ...     scheduler.step(loss)
    >>> scheduler.get_last_lr()
    [0.4]
    """

    state_dict, load_state_dict = shared.state_dict, shared.load_state_dict
    rescale, _endless = shared.refuse_rescale, "the metric decides; set `patience` instead"

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: list[float] | float = 0,
        eps: float = 1e-8,
        *,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr, eps)
        if last_epoch != -1:
            self.last_epoch = last_epoch

    def _is_better(self, a: float, best: float) -> bool:
        return curves.improved(a, best, self.mode, self.threshold, self.threshold_mode)

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        """Take the metric of one more epoch, and cut the rates when it is due."""
        current = float(metrics)
        if epoch is not None:
            warnings.warn(theirs.EPOCH_DEPRECATION_WARNING, UserWarning, stacklevel=2)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if better := self._is_better(current, self.best):
            self.best = current
        self.num_bad_epochs, self.cooldown_counter, reduce = curves.plateau(
            better, self.num_bad_epochs, self.cooldown_counter, self.patience, self.cooldown
        )
        if reduce:
            self._reduce_lr(self.last_epoch)
        self._last_lr = rates_of(self.optimizer)
