"""What a step tells a monitor, such as `torch_bp.watch` returns, and how one pass is heard.

A step that the monitor records is a kind of its own: its pass is captured with the ear attached, and ends with the
tensors that are to be measured in memory that stays. Steps that it does not record are those of a step without monitor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Hearing(Protocol):
    """An ear for one pass.

    Attributes:
        heard: tensors in any nesting, for `Monitor.heard`.
        overwritten: which of them the pass has written to afterwards: what is heard is right if they were copied.
    """

    heard: Any
    overwritten: frozenset[int]

    def attach(self, model: torch.nn.Module) -> None: ...

    def compared(self, output: Any, targets: Sequence[Any]) -> None: ...

    def detach(self) -> None: ...


class Monitor(Protocol):
    """See `torch_bp.diagnostics.Monitor`."""

    @property
    def recording(self) -> bool: ...

    def follow(self, loss_name: str, whole: bool) -> None: ...

    def hearing(self, copied: frozenset[int] | None = None) -> Hearing: ...

    def heard(self, heard: Any, loss: Tensor, loss_scale: Tensor | float | None = None) -> None: ...

    def ran(self, model: Any, args: Any, targets: Any, loss_fn: Any) -> None: ...

    def clipped(self, total_norm: Any, max_norm: float) -> Any: ...

    def updating(self, inside: bool = False) -> None: ...

    def updated(self) -> None: ...

    def skipped(self) -> None: ...

    def attend(self) -> None: ...

    def refused(self) -> None: ...


class OverwrittenError(RuntimeError):
    """A pass has written to what was heard, and must be heard again, with copies of `which`."""

    def __init__(self, which: frozenset[int]) -> None:
        super().__init__("a pass has written to what was heard")
        self.which = which


@contextlib.contextmanager
def heard_by(hearing: Hearing | None, model: Any) -> Iterator[None]:
    """Attach an ear to the model for one pass."""
    if hearing is None:
        yield
        return
    hearing.attach(model)
    try:
        yield
    finally:
        hearing.detach()


def name_of(loss_fn: Any) -> str:
    """The name of a loss function, or of its class."""
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)


def require_monitor(monitor: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what is no monitor of these."""
    if not all(hasattr(monitor, name) for name in ("recording", "follow", "hearing", "heard")):
        raise TypeError(
            f"TrainStep: watch must be a monitor, got {type(monitor).__name__}; torch_bp.watch(step) makes one."
        )
    if (watched := getattr(monitor, "optimizer", optimizer)) is not optimizer:
        raise ValueError(
            f"TrainStep: watch must be a monitor of the step's optimizer, got one of {type(watched).__name__}. Make it "
            "by torch_bp.watch(step)."
        )
