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
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_bp.autograd.tape import Entry, Tape
from torch_bp.step.capture import Place, Program, Recorder
from torch_bp.step.plan import Plan
from torch_bp.step.trace import Explicit, Paths
from torch_bp.step.unchanged import Unchanged
from torch_bp.step.update import Norm


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
        self,
        inputs: tuple[tuple[Any, ...], tuple[Any, ...]],
        leaves: Sequence[Tensor],
        scale: float,
        noted: Callable[[Entry], None] | None = None,
        seen: Callable[[Entry, Sequence[Any]], None] | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss, and the gradients of `leaves` times `scale`.

        Args:
            inputs: the arguments of the model, and the targets.
            leaves: the tensors that gradients are for.
            scale: the error signal at the loss.
            noted: called with each entry as it has run forward.
            seen: called with each entry as it has run backward, and the gradients that it gave.

        Raises:
            TypeError, ValueError: the loss is no tensor, or no number.
        """
        with torch.no_grad(), Tape(leaves, noted) as tape:
            with Explicit(tape, self.fallback, self.path):
                loss = self.loss_fn(self.model(*inputs[0]), *inputs[1])
            if not isinstance(loss, Tensor):
                raise TypeError(f"TrainStep: loss_fn must return a tensor, got {type(loss).__name__}.")
            if loss.numel() != 1:
                raise ValueError(
                    f"TrainStep: loss_fn must return one number, got shape {tuple(loss.shape)}; give the loss "
                    'reduction="mean" or "sum".'
                )
            dy = torch.ones_like(loss) if scale == 1 else torch.full_like(loss, scale)
            return loss, tape.backward(loss, dy, seen)


class Line:
    """A captured pass.

    Args:
        passes: what to capture. It runs once, as a step like any other.
        modules: whose state decides what it does.
        inputs: the arguments of the model, and the targets.
        leaves: the tensors that gradients are for.
        homes: where the gradient of each goes.
        scale: the error signal at the loss.
        add: add to what is in the homes.

    Attributes:
        batch: tensors that the inputs and targets of a step are copied to.
        loss: of the last run.
        gradients: parameters that have a gradient, and where it goes; `homes` are the latter.
        norm: gives the norm of all gradients.
        program: what runs.
        plan: what it does.
        written: the model's own tensors that a run writes to, as running statistics.

    Raises:
        NotCapturableError: what the pass does depends on values.
    """

    def __init__(
        self,
        passes: Passes,
        modules: Sequence[torch.nn.Module],
        inputs: tuple[tuple[Any, ...], tuple[Any, ...]],
        leaves: Sequence[Tensor],
        homes: Sequence[Tensor],
        scale: float,
        add: bool,
    ) -> None:
        self.unchanged = Unchanged(modules)
        self.plan = Plan()
        copies = tree_map_only(Tensor, torch.clone, inputs)
        self.batch = [t for t in tree_leaves(copies) if isinstance(t, Tensor)]
        with Recorder() as recorder:
            loss, gradients = passes.run(copies, leaves, scale, self.plan.noting(passes.path))
        reached = [number for number, gradient in enumerate(gradients) if gradient is not None]
        places = {number: recorder.place(gradients[number]) for number in reached}
        direct = {} if add else _whole(recorder, places, homes)
        kept = [recorder.place(loss), *places.values()]
        self.program = Program(recorder, {places[n].memory: homes[n] for n in direct}, kept)
        into = Tensor.add_ if add else Tensor.copy_
        self.program.calls += [
            functools.partial(into, homes[n], self.program.tensor(place))
            for n, place in places.items()
            if n not in direct
        ]
        self.written = self.program.written
        self._before = [torch.empty_like(t) for t in self.written]
        self.loss = self.program.tensor(recorder.place(loss))
        self.loss.copy_(loss)
        for number in reached:
            into(homes[number], gradients[number])  # type: ignore[arg-type]
            leaves[number].grad = homes[number]
        self.gradients = [(leaves[n], homes[n]) for n in reached]
        self.homes = [homes[n] for n in reached]
        self.norm = Norm(self.homes)
        self._add = add
        names = {id(p): name for module in modules for name, p in module.named_parameters()}
        self.plan.parameters = [names.get(id(leaves[n]), "?") for n in reached]
        self.plan.bytes, self.plan.apart = self.program.arena.size, self.program.arena.total

    def run(self, batch: Sequence[Tensor]) -> Tensor:
        """Run the pass again on another batch of the same kind; return the loss, which the next run overwrites."""
        if self._add:
            for p, home in self.gradients:
                if p.grad is not home:
                    home.zero_() if p.grad is None else home.copy_(p.grad)
        for own, given in zip(self.batch, batch):
            own.copy_(given)
        if self.written:
            torch._foreach_copy_(self._before, self.written)
        self.program.run()
        for p, home in self.gradients:
            p.grad = home
        return self.loss

    def restore(self) -> None:
        """Take back what the last run wrote to the model's own tensors."""
        for tensor, before in zip(self.written, self._before):
            tensor.copy_(before)


def _whole(recorder: Recorder, places: Mapping[int, Any], homes: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return the homes that can take the place of memory in which the pass has made a gradient, and nothing else."""
    found: dict[int, Tensor] = {}
    taken = set()
    for number, place in places.items():
        home = homes[number]
        if (
            isinstance(place, Place)
            and place.memory not in taken
            and recorder.memories[place.memory].size == home.untyped_storage().nbytes()
            and place.stride == home.stride()
        ):
            taken.add(place.memory)
            found[number] = home
    return found
