"""What is told of a step beside what is heard of its layers: losses, clipping, the scale of the loss, old gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from torch_bp.diagnostics.loss import Losses


class Told:
    """Numbers of one step, taken at its end.

    Args:
        losses: of the step, as they pass by.
        scaler: a GradScaler, whose scale gradients have, or None.
        reduce: take the mean over all processes.
    """

    def __init__(self, losses: Losses, scaler: Any, reduce: bool) -> None:
        self.losses, self._scaler, self._reduce = losses, scaler, reduce
        self._latest: Tensor | None = None  # loss of the last step, if that was recorded
        self._now: dict[str, Tensor] = {}
        self._after: Tensor | None = None

    def clipped(self, total_norm: Any, max_norm: float) -> None:
        """The norm of gradients before they were clipped by it."""
        norm = torch.as_tensor(total_norm, dtype=torch.float64).detach()
        self._now |= {"before": norm, "clipped norm": norm.clamp(max=max_norm)}

    def loss_after(self, loss: Any) -> None:
        """The loss of the last step's batch after that step."""
        self._after = torch.as_tensor(loss).detach().double().mean()

    def scaled(self, scale: Tensor | float) -> None:
        """What the loss was multiplied by."""
        self._now["scale"] = torch.as_tensor(scale, dtype=torch.float64).detach().clone()

    def carried(self, norm: Tensor) -> None:
        """The norm of gradients that lay there when the step began."""
        self._now["carried"] = norm

    def drop(self) -> None:
        """The step was skipped: what was told is no part of the next."""
        self._now.clear()
        self.losses.forget()

    def take(self, added: bool) -> dict[str, Tensor]:
        """All there is, by the names of a record.

        Args:
            added: gradients that were `carried` are part of the step's.
        """
        now, self._now = self._now, {}
        if not added:
            now.pop("carried", None)
        labels, output = self.losses.labels, self.losses.output
        loss, validation = self.losses.take()
        if loss is not None:
            now["loss"] = _mean_of_processes(loss) if self._reduce else loss
        for name, value in (("validation_loss", validation), ("labels", labels), ("output", output)):
            if value is not None:
                now[name] = value
        after, self._after = self._after, None
        if after is not None and self._latest is not None:
            now["achieved_decrease"] = self._latest.double() - after
        self._latest = now.get("loss")
        if self._scaler is not None and (scale := getattr(self._scaler, "_scale", None)) is not None:
            now["scale"] = scale
        return now


def _mean_of_processes(loss: Tensor) -> Tensor:
    loss = loss.double() / distributed.get_world_size()
    distributed.all_reduce(loss)
    return loss
