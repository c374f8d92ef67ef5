"""One explicit pass over one kind of batch: as it is, or captured.

The pass is forward, loss, and the error signals back to the first layer, all on a tape. `Passes` makes it from a model
and a loss; `Line` is one that has been captured.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_bp.autograd.entry import Entry
from torch_bp.autograd.tape import Tape
from torch_bp.optim.copies import Copies
from torch_bp.step.explicit import Explicit, Paths
from torch_bp.step.memory import copied as copy_of
from torch_bp.step.memory import number
from torch_bp.step.plan import Plan
from torch_bp.step.program import Program
from torch_bp.step.recorder import NotCapturableError, Place, Recorder
from torch_bp.step.snapshot import Snapshot
from torch_bp.step.unchanged import Unchanged
from torch_bp.step.update import Norm
from torch_bp.step.watched import Hearing, OverwrittenError, heard_by

_place_of, _grad_of = Tensor.data_ptr, operator.attrgetter("grad")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Passes:
    """Runs a model and a loss explicitly.

    Args:
        model: called with the inputs.
        loss_fn: called with what the model returns and the targets; gives a number.
        fallback: let autograd do what has no explicit backward.
        keep_output: keep what the model returns.
        precision: None, "bf16" or "fp16".

    Attributes:
        loss_scale: multiplies the error signal at the loss besides, None for 1.
        copies: of parameters, for products in another precision; None to cast them in every pass.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        loss_fn: Callable[..., Any],
        fallback: bool,
        keep_output: bool = False,
        precision: str | None = None,
    ) -> None:
        self.model, self.loss_fn, self.fallback, self._keep_output = model, loss_fn, fallback, keep_output
        self.precision = precision
        self.path = Paths({"": model, "loss": loss_fn})
        self.loss_scale: Tensor | None = None
        self.copies: Copies | None = None
        self.output: Any = None  # what the model returned last, if it is kept

    def run(
        self,
        inputs: tuple[tuple[Any, ...], tuple[Any, ...]],
        leaves: Sequence[Tensor],
        scale: float,
        noted: Callable[[Entry], None] | None = None,
        seen: Callable[[Entry, Sequence[Any]], None] | None = None,
        hearing: Hearing | None = None,
        writing: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss, and the gradients of `leaves` times `scale`.

        Args:
            inputs: the arguments of the model, and the targets.
            leaves: the tensors that gradients are for.
            scale: the error signal at the loss.
            noted: called with each entry as it has run forward.
            seen: called with each entry as it has run backward, and the gradients that it gave.
            hearing: of a monitor, for this pass alone.
            writing: called with each tensor that the forward is about to write to.

        Raises:
            TypeError, ValueError: the loss is no tensor, or no number.
        """
        with torch.no_grad(), heard_by(hearing, self.model), Tape(leaves, noted, whole=seen is not None) as tape:
            tape.copies = self.copies
            # As in training through autograd, for what asks, and for no_grad inside.
            with torch.enable_grad(), Explicit(tape, self.fallback, self.path, writing), self.autocast(leaves):
                output = self.model(*inputs[0])
                loss = self.loss_fn(output, *inputs[1])
            if hearing is not None:
                hearing.compared(output, inputs[1])
            self.output = output if self._keep_output else None
            if not isinstance(loss, Tensor):
                raise TypeError(f"TrainStep: loss_fn must return a tensor, got {type(loss).__name__}.")
            if loss.numel() != 1:
                raise ValueError(
                    f"TrainStep: loss_fn must return one number, got shape {tuple(loss.shape)}; give the loss "
                    'reduction="mean" or "sum".'
                )
            dy = torch.ones_like(loss) if scale == 1 else torch.full_like(loss, scale)
            if self.loss_scale is not None:
                dy = dy * self.loss_scale
            return loss, tape.backward(loss, dy, seen)

    def autocast(self, leaves: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
        """The context for the precision of the products."""
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(leaves[0].device.type, DTYPES[self.precision])


class Line:
    """A captured pass.

    Args:
        passes: what to capture. It runs once, to be noted, and what it did is taken back.
        modules: whose state decides what it does.
        inputs: the arguments of the model, and the targets.
        leaves: the tensors that gradients are for.
        scale: the error signal at the loss.
        add: add to the gradients that are there.
        before: brings back what a pass changes besides.
        own: give the first gradients memory of their own.
        hearing: of a monitor, for this pass; it has `copied` what the pass writes to.

    Attributes:
        loss: of the last run; `output` is what the model returned.
        gradients: of the parameters in `reached`.
        norm: gives the norm of all gradients.
        program: what runs.
        plan: what it does.
        written: the model's own tensors that a run writes to, as running statistics.
        heard: what the monitor is to measure after a run.

    Raises:
        NotCapturableError: what the pass does depends on values.
        OverwrittenError: more must be copied.
    """

    replayed = updates = False  # what only a graph of a device does

    def __init__(
        self,
        passes: Passes,
        modules: Sequence[torch.nn.Module],
        inputs: tuple[tuple[Any, ...], tuple[Any, ...]],
        leaves: Sequence[Tensor],
        scale: float,
        add: bool,
        before: Snapshot,
        own: bool = False,
        hearing: Hearing | None = None,
        copied: frozenset[int] = frozenset(),
    ) -> None:
        self.unchanged = Unchanged(modules, leaves)
        self.plan = Plan()
        inputs, batch, shared = apart(inputs, modules)
        with Recorder(batch) as recorder:
            try:
                loss, found = passes.run(inputs, leaves, scale, self.plan.noting(passes.path.of), hearing=hearing)
            except BaseException:
                recorder.rewind()
                raise
        if hearing is not None and not hearing.overwritten <= copied:
            recorder.rewind()
            raise OverwrittenError(hearing.overwritten)
        if not self.unchanged.holds():
            recorder.rewind()
            raise NotCapturableError("the forward changes attributes or buffers of a module, which decide what it does")
        self._writes_to_batch = recorder.writes_to_batch
        if self._writes_to_batch and shared:
            recorder.rewind()
            raise NotCapturableError("the forward writes to inputs that share their memory")
        self.unchanged.watch(recorder.outside.values())
        self.reached = [p for p, gradient in zip(leaves, found) if gradient is not None]
        places = [recorder.place(gradient) for gradient in found if gradient is not None]
        heard = () if hearing is None else tree_map_only(Tensor, recorder.place, hearing.heard)
        output, loss_at = tree_map_only(Tensor, recorder.place, passes.output), recorder.place(loss)
        # What was noted ran for its notes alone: its memory is given back before that of the program is asked for.
        passes.output = found = loss = hearing = None  # type: ignore[assignment]
        before.restore()
        recorder.rewind()
        with torch._C.DisableTorchFunction():  # a default device is none of the memory's
            self.program = Program(recorder, [loss_at, *places, *tree_leaves((output, heard))])
        self.heard: Any = tree_map_only(Place, self.program.tensor, heard)
        self.output = tree_map_only(Place, self.program.tensor, output)
        self._made = [self.program.tensor(place) for place in places]
        self._places = list(map(_place_of, self._made))
        self.loss = self.program.tensor(loss_at)
        self.written = self.program.written
        self._before = [torch.empty_like(t) for t in self.written]
        self._add = add
        # A gradient can be handed out where the pass makes it, unless it is not memory of its own, as its parameter's.
        taken = [place.memory for place in places if isinstance(place, Place)]
        self._handed_out = [
            self.program.owns(place) and taken.count(place.memory) == 1 and t.stride() == p.stride()
            for p, t, place in zip(self.reached, self._made, places)
        ]
        self.gradients: list[Tensor] = []
        self._there = False  # True if `gradients` are where the pass makes them, and what the next one gives
        reached = set(self.reached)
        every = dict.fromkeys([*leaves, *(p for m in modules for p in m.parameters())])  # those of the optimizer too
        self._others = [p for p in every if p not in reached]
        self._at = self.program.arena.storage.data_ptr()
        self._end = self._at + self.program.arena.size
        names = {id(p): name for module in modules for name, p in module.named_parameters()}
        self.plan.parameters = [names.get(id(p), "?") for p in self.reached]
        self.plan.bytes, self.plan.apart = self.program.arena.size, self.program.arena.total
        self.run(batch, own)

    def run(self, batch: Sequence[Tensor], own: bool = False) -> Tensor:
        """Run the pass again on another batch of the same kind; return the loss, which the next run overwrites.

        So it does with gradients, unless they are to be in memory of their `own`.
        """
        at, end = self._at, self._end
        for t in batch:
            if at <= t.data_ptr() < end:  # a gradient that was handed out, say
                batch = [copy_of(t) if at <= t.data_ptr() < end else t for t in batch]
                break
        if self._writes_to_batch and len(set(map(number, batch))) < len(batch):
            raise NotCapturableError("the forward writes to inputs that share their memory")
        if self.written:
            torch._foreach_copy_(self._before, self.written)
        self.program.run(batch)
        self._deliver(own, self._made)
        return self.loss

    @property
    def bytes(self) -> int:
        """Of the arena."""
        return self.program.arena.size

    def intact(self) -> bool:
        """True unless somebody has moved the arena, as `share_memory_` does, or a gradient, as `p.grad.data = ...`."""
        return self.program.arena.storage.data_ptr() == self._at and list(map(_place_of, self._made)) == self._places

    def _deliver(self, own: bool, made: Sequence[Tensor]) -> None:
        """Leave the gradients in `p.grad`."""
        if self._there and not own and all(map(operator.is_, map(_grad_of, self.reached), made)):
            for p in self._others:
                p.grad = None
            return
        if self._add:
            for p, gradient in zip(self.reached, made):
                if p.grad is None:
                    p.grad = torch.empty_like(p).copy_(gradient)
                else:
                    p.grad.add_(gradient)
        else:
            for p, gradient, as_it_is in zip(self.reached, made, self._handed_out):
                p.grad = gradient if as_it_is and not own else torch.empty_like(p).copy_(gradient)
            for p in self._others:
                p.grad = None
        gradients: list[Any] = [p.grad for p in self.reached]
        if not all(map(operator.is_, gradients, self.gradients)) or not self.gradients:
            self.gradients, norm = gradients, Norm(gradients)
            self._there = not self._add and all(map(operator.is_, gradients, made))
            self.norm: Callable[[], float] = norm.unmoved if self._there else norm  # `intact` has looked at these

    def restore(self) -> None:
        """Take back what the last run wrote to the model's own tensors."""
        for tensor, before in zip(self.written, self._before):
            tensor.copy_(before)


def apart(inputs: Any, modules: Sequence[torch.nn.Module]) -> tuple[Any, list[Tensor], bool]:
    """Return the inputs with no two tensors in one memory, nor in a parameter's, those tensors, and if any was."""
    taken = {number(t) for m in modules for t in (*m.parameters(), *m.buffers()) if t.layout is torch.strided}
    batch: list[Tensor] = []
    shared = False

    def alone(tensor: Tensor) -> Tensor:
        nonlocal shared
        if number(tensor) in taken:
            tensor, shared = copy_of(tensor), True
        taken.add(number(tensor))
        batch.append(tensor)
        return tensor

    return tree_map_only(Tensor, alone, inputs), batch, shared
