"""The loss of a step, and the labels that it was computed from, while they pass by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Losses:
    """Losses since the last step: of training, and of validation, which is computed without gradients.

    Args:
        loss_fn: a module whose calls are listened to. Default: none, losses are told by `add`.
    """

    def __init__(self, loss_fn: nn.Module | None, labels: bool) -> None:
        self.training: list[Tensor] = []
        self.validation: list[Tensor] = []
        self.labels: Tensor | None = None
        self.divisor = 0  # examples that the mean of the loss was taken over
        self.wanted = True
        self._with_labels = labels
        self._hook = None if loss_fn is None else loss_fn.register_forward_hook(self._called, with_kwargs=True)

    def add(self, loss: Any) -> None:
        """Note a loss of the step: a tensor, or a number."""
        loss = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64)
        self.training.append(loss if loss.dim() == 0 else loss.mean())

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """The mean loss of the step, and of the validation since the last step that took it."""
        found = _mean(self.training), _mean(self.validation)
        self.forget()
        self.validation = []
        return found

    def forget(self) -> None:
        """A step begins."""
        self.training, self.labels = [], None

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if torch.compiler.is_compiling() or not isinstance(loss, Tensor):
            return
        if not torch.is_grad_enabled():
            self.validation.append(loss.detach().mean())
            return
        if not self.wanted:
            return
        self.add(loss)
        target = args[1] if len(args) > 1 else kwargs.get("target")
        output = args[0] if args else kwargs.get("input")
        if self._with_labels and isinstance(target, Tensor) and isinstance(output, Tensor):
            self.labels = label_statistics(output, target)


def label_statistics(output: Tensor, target: Tensor) -> Tensor | None:
    """Count of labels, different ones, the commonest one's count, changes from one to the next; None of other targets.

    Args:
        output: (N, C), of which the labels are classes.
        target: (N), integers; those outside of [0, C), which a loss ignores, do not count.
    """
    if target.is_floating_point() or target.dim() != 1 or output.dim() != 2 or not len(target):
        return None
    classes = output.shape[1]
    valid = (target >= 0) & (target < classes)
    counts = torch.zeros(classes + 1, dtype=torch.float64, device=target.device)
    counts.index_add_(0, torch.where(valid, target, classes), torch.ones_like(target, dtype=torch.float64))
    counts = counts[:classes]
    changes = (target[1:] != target[:-1]).sum().double()
    return torch.stack([counts.sum(), (counts > 0).sum().double(), counts.max(), changes])


def _mean(losses: list[Tensor]) -> Tensor | None:
    if not losses:
        return None
    return losses[0] if len(losses) == 1 else torch.stack([loss.double() for loss in losses]).mean()
