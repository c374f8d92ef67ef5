"""The loss of a step, and the labels that it was computed from, while they pass by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torch_bp.diagnostics.hook import Hook
from torch_bp.diagnostics.quantities import sums


class Losses:
    """Losses since the last step: of training, and of validation, which is computed without gradients.

    Args:
        loss_fn: a module whose calls are listened to; None: losses are told by `add`.
        labels: keep statistics of what the loss compares, output and labels.
    """

    def __init__(self, loss_fn: nn.Module | None, labels: bool) -> None:
        self.training: list[Tensor] = []
        self.validation: list[Tensor] = []
        self.labels: Tensor | None = None
        self.output: Tensor | None = None  # what `output_statistics` says of the last one
        self.name = None if loss_fn is None else type(loss_fn).__name__
        self.wanted = True
        self._with_labels = labels
        self._hook = None
        if loss_fn is not None:
            self._hook = loss_fn.register_forward_hook(Hook(self._called), with_kwargs=True)

    def add(self, loss: Any) -> None:
        """Note a loss of the step: a tensor, or a number."""
        self.training.append(as_loss(loss))

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """The mean loss of the step, and of the validation since the last step that took it."""
        found = _mean(self.training), _mean(self.validation)
        self.forget()
        self.validation = []
        return found

    def forget(self) -> None:
        """A step begins."""
        self.training, self.labels, self.output = [], None, None

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if torch.compiler.is_compiling() or not isinstance(loss, Tensor):
            return
        if not torch.is_grad_enabled():
            self.validation.append(as_loss(loss))
            return
        if not self.wanted:
            return
        self.add(loss)
        target = args[1] if len(args) > 1 else kwargs.get("target")
        output = args[0] if args else kwargs.get("input")
        if isinstance(output, Tensor):
            self.compared(output, target)

    def compared(self, output: Tensor, target: Any = None) -> None:
        """Note what the loss compares: the output of the model, and targets of any kind."""
        if not self._with_labels:
            return
        with torch.no_grad():
            self.output = output_statistics(output.detach())
            self.labels = label_statistics(output, target) if isinstance(target, Tensor) else None


def as_loss(loss: Any) -> Tensor:
    """A loss that was told, a tensor or a number, as a tensor of one element without a graph: its mean, if of more.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(loss, Tensor):
        try:
            return torch.tensor(float(loss), dtype=torch.float64)
        except (TypeError, ValueError):
            got = type(loss).__name__
            raise TypeError(f"watch: loss must be a tensor or a number, got {got}. Pick it out of it.") from None
    loss = loss.detach()
    loss = loss if loss.is_floating_point() else (loss.abs() if loss.is_complex() else loss).double()
    return loss if loss.dim() == 0 else loss.mean()


def label_statistics(output: Tensor, target: Tensor) -> Tensor | None:
    """Count of labels, different ones, the commonest one's count, changes from one to the next, and the commonest one.

    None of other targets.

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
    return torch.stack([counts.sum(), (counts > 0).sum().double(), counts.max(), changes, counts.argmax().double()])


def output_statistics(output: Tensor) -> Tensor | None:
    """Count, sum, sum of squares, least and largest value, in float64; None of no real numbers."""
    if not output.is_floating_point() or not output.numel() or output.layout is not torch.strided:
        return None
    found = sums([output])[0]
    low, high = output.aminmax()
    bad = found[2:].sum() > 0  # sums are of the finite values
    count = torch.full_like(found[0], output.numel())
    return torch.stack([count, *(torch.where(bad, math.nan, s) for s in (*found[:2], low.double(), high.double()))])


def _mean(losses: list[Tensor]) -> Tensor | None:
    if not losses:
        return None
    return losses[0] if len(losses) == 1 else torch.stack([loss.double() for loss in losses]).mean()
