"""One explicit pass over one kind of batch: as it is, or captured.

The pass is forward, loss, and the error signals back to the first layer, all on a tape. `Passes` makes it from a model
and a loss; `Line` is one that has been captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.autograd.tape import Entry, Tape
from torch_bp.step.capture import Program, Recorder, memory_of
from torch_bp.step.trace import Explicit, Paths
from torch_bp.step.unchanged import Unchanged

Seen = Callable[[Entry, Sequence[Any]], None]


class Passes:
    """Runs a model and a loss explicitly.

    Args:
        model: called with the inputs.
        loss_fn: called with what the model returns and the targets; gives a number.
        fallback: let autograd do what has no explicit backward.
    """

    def __init__(self, model: Callable[..., Any], loss_fn: Callable[..., Any], fallback: bool) -> None:
        self.model, self.loss_fn, self.fallback = model, loss_fn, fallback
        self.path = Paths({"": model, "loss": loss_fn})

    def run(
        self, x: tuple[Any, ...], y: tuple[Any, ...], leaves: Sequence[Tensor], scale: float, seen: Seen | None = None
    ) -> tuple[Tensor, list[Tensor | None], list[Entry]]:
        """Return the loss, the gradients of `leaves` times `scale`, and what has run.

        Raises:
            TypeError, ValueError: the loss is no tensor, or no number.
        """
        with torch.no_grad(), Tape(leaves, self.path) as tape:
            with Explicit(tape, self.fallback, self.path):
                loss = self.loss_fn(self.model(*x), *y)
            if not isinstance(loss, Tensor):
                raise TypeError(f"TrainStep: loss_fn must return a tensor, got {type(loss).__name__}.")
            if loss.numel() != 1:
                raise ValueError(
                    f"TrainStep: loss_fn must return one number, got shape {tuple(loss.shape)}; give the loss "
                    'reduction="mean" or "sum".'
                )
            entries = list(tape.entries)
            dy = torch.ones_like(loss) if scale == 1 else torch.full_like(loss, scale)
            return loss, tape.backward(loss, dy, seen), entries


class Line:
    """A captured pass.

    Args:
        passes: what to capture. The pass runs once, which is a step like any other.
        modules: whose state decided what it does.
        inputs: the batch: inputs and targets.
        homes: by the number of a parameter in `leaves`, where its gradient goes.
        add: add to what is there.

    Attributes:
        loss: of the last run.
        entries: what the pass ran.
    """

    def __init__(
        self,
        passes: Passes,
        modules: Sequence[torch.nn.Module],
        inputs: tuple[tuple[Any, ...], tuple[Any, ...]],
        leaves: Sequence[Tensor],
        homes: Mapping[int, Tensor],
        scale: float,
        add: bool,
    ) -> None:
        self.unchanged = Unchanged(modules)
        copies = [tuple(t.clone() if isinstance(t, Tensor) else t for t in part) for part in inputs]
        self.batch = [t for part in copies for t in part if isinstance(t, Tensor)]
        with Recorder() as recorder:
            loss, gradients, self.entries = passes.run(copies[0], copies[1], leaves, scale)
        placed: dict[int, Tensor] = {}
        apart: list[tuple[Tensor, Tensor]] = []
        for number, gradient in enumerate(gradients):
            if gradient is None:
                continue
            home, key = homes[number], memory_of(gradient)
            memory = recorder.memories.get(key)
            alone = memory is not None and memory.made and memory.storage.nbytes() == home.untyped_storage().nbytes()
            if alone and not add and key not in placed and gradient.stride() == home.stride():
                placed[key] = home
            else:
                apart.append((home, gradient))
        self.reached = [number for number, gradient in enumerate(gradients) if gradient is not None]
        self.program = Program(recorder, placed, [loss, *(g for g in gradients if g is not None)])
        into = Tensor.add_ if add else Tensor.copy_
        self.program.calls += [functools.partial(into, home, self.program.tensor(g)) for home, g in apart]
        self.loss = self.program.tensor(loss)
        self.loss.copy_(loss)
        for number in self.reached:
            into(homes[number], gradients[number])  # type: ignore[operator]

    def run(self, batch: Sequence[Tensor]) -> Tensor:
        """Run the pass again on another batch of the same kind."""
        for own, given in zip(self.batch, batch):
            own.copy_(given)
        self.program.run()
        return self.loss
