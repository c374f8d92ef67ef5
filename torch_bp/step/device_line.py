"""One kind of step on CUDA: a pass, and the update after it, captured as one graph.

The first run of a kind is eager, a step like any other: it compiles kernels, lets libraries choose their own, and is
noted operation by operation (`torch_bp.step.recorder`), which tells whether values are read on the host and which of
the model's tensors are written to. The second is captured; from then on the host copies the batch to where the graph
reads it, sends the optimizer's numbers (`torch_bp.optim.captured`), and launches the graph.

Nothing of it waits for the device. Whether loss and gradients were finite is a number there: where they were not, the
kernels of the update change nothing, running statistics are put back, and the host is told when it next looks
(`torch_bp.step.outcomes`).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_bp.kernels.norm import ratio, values_of
from torch_bp.optim.captured import CapturedStep, fresh
from torch_bp.step.graph import Graph, capturing
from torch_bp.step.line import Passes, apart
from torch_bp.step.loss_scale import LossScale
from torch_bp.step.memory import Overwritten
from torch_bp.step.outcomes import NOT_FINITE, OVERFLOWED, TAKEN
from torch_bp.step.plan import Plan
from torch_bp.step.recorder import NotCapturableError, Recorder, tensors_in
from torch_bp.step.snapshot import Snapshot
from torch_bp.step.unchanged import Unchanged
from torch_bp.step.update import Norm, Update
from torch_bp.step.watched import Monitor


class DeviceLine:
    """A kind of step on a device; interface as of `torch_bp.step.line.Line`.

    Args:
        passes, modules, inputs, leaves, scale, add, before: as of `Line`. Constructing it runs the pass, eagerly.
        update: clips and steps. None for a pass after which there is no update.
        loss_scale: that gradients are divided by before the update. None for none.
        pool: memory that the graphs of one step share.
        bad: an int32 on the device, what became of the window so far.
        monitor: hears the pass. None for none.

    Attributes:
        updates: True if the update is in the graph.
        replayed: True once the graph has run.
        heard: what the monitor is to measure after a run.
        bytes: of memory that the graph has added to what the device keeps.
        batch_bytes: of a batch.
    """

    def __init__(
        self,
        passes: Passes,
        modules: Sequence[torch.nn.Module],
        inputs: Any,
        leaves: Sequence[Tensor],
        scale: float,
        add: bool,
        before: Snapshot,
        update: Update | None,
        loss_scale: LossScale | None,
        pool: Any,
        bad: Tensor,
        monitor: Monitor | None = None,
    ) -> None:
        self.unchanged = Unchanged(modules, leaves)
        self.plan = Plan()
        inputs, batch, shared = apart(inputs, modules)
        with Recorder(batch) as recorder:
            hearing = None if monitor is None else monitor.hearing()
            try:
                loss, found = passes.run(inputs, leaves, scale, self.plan.noting(passes.path.of), hearing=hearing)
                _refuse_the_host(recorder, leaves)
            except BaseException:
                recorder.rewind()
                raise
        self._monitor, self.heard, self._overwritten = monitor, (), frozenset[int]()
        if hearing is not None:
            self.heard, self._overwritten = hearing.heard, hearing.overwritten
        if not self.unchanged.holds():
            recorder.rewind()
            raise NotCapturableError("the forward changes attributes or buffers of a module, which decide what it does")
        if shared and recorder.writes_to_batch:
            recorder.rewind()
            raise NotCapturableError("the forward writes to inputs that share their memory")
        self.unchanged.watch(recorder.outside.values())
        self._passes, self._inputs, self._leaves, self._scale, self._add = passes, inputs, list(leaves), scale, add
        self._batch, self._generators = batch, recorder.generators
        self.batch_bytes = sum(t.numel() * t.element_size() for t in batch)
        self._update, self._loss_scale, self._pool, self._bad = update, loss_scale, pool, bad
        self._limits: tuple[float | None, float | None] = (None, None)
        self._total: Tensor | None = None  # the norm before clipping by it
        self.reached = [p for p, gradient in zip(leaves, found) if gradient is not None]
        reached = set(self.reached)
        every = dict.fromkeys([*leaves, *(p for m in modules for p in m.parameters())])
        self._others = [p for p in every if p not in reached]
        names = {id(p): name for module in modules for name, p in module.named_parameters()}
        self.plan.parameters = [names.get(id(p), "?") for p in self.reached]
        self.written, self._touched = recorder.written, recorder.touched
        self._modules = list(modules)
        self._before = [torch.empty_like(t) for t in self.written]
        self.output = tree_map_only(Tensor, Tensor.clone, passes.output)
        passes.output = None
        self.loss = loss
        self._graph: Graph | None = None
        self._first: tuple[Snapshot, Overwritten] | None = before, recorder.overwritten  # until there is a graph
        self.replayed = False
        self._step: CapturedStep | None = None
        self._made: list[Tensor] = []
        self.bytes = 0
        self.gradients: list[Tensor] = []
        self._deliver([_own(p, g) for p, g in zip(self.reached, (g for g in found if g is not None))])

    @property
    def updates(self) -> bool:
        return self._step is not None

    def run(self, batch: Sequence[Tensor], own: bool = False) -> Tensor:
        """Do the step on another batch; return the loss, which the next run overwrites."""
        with _current(self._bad.device):
            return self._run(batch, own)

    def _run(self, batch: Sequence[Tensor], own: bool) -> Tensor:
        if self._graph is None:
            self._capture()
            self._first, self.replayed = None, True
        for static, given in zip(self._batch, batch):
            if static is not given:
                static.copy_(given, non_blocking=True)
        if self._step is not None:
            if self._monitor is not None:
                self._monitor.updating(inside=True)
            self._step.send()
        self._graph.replay()  # type: ignore[union-attr]
        torch._C._increment_version(self._touched)
        if self._step is not None:
            self._step.ran()
            if self._monitor is not None and self._limits[0] is not None:
                self._monitor.clipped(self._total, self._limits[0])
        elif not self._add:
            self._deliver([g.clone() for g in self._made] if own else self._made)
        return self.loss

    def intact(self) -> bool:
        """True if the graph still does what is wanted: gradients are added to the same memory, the update is the same.

        Before anything was captured: true if it can be.
        """
        if self._graph is None:
            if self._update is not None and fresh(self._update.optimizer):
                return False  # an update that makes state is no graph yet: another eager step
            return not self._add or all(p.grad is not None for p in self.reached)
        if self._add:
            if not _same([p.grad for p in self.reached], self.gradients):
                return False
        elif self._step is not None:
            self._deliver(self._made)  # others may have put theirs there since
        return self._step is None or (self._limits == _limits(self._update) and self._step.ready())

    def restore(self) -> None:
        """Take back what the last run wrote to the model's own tensors."""
        if self._first is not None:
            snapshot, overwritten = self._first
            overwritten.restore()
            snapshot.restore(random=False)
            return
        for tensor, before in zip(self.written, self._before):
            tensor.copy_(before)

    def take_back(self) -> None:
        """Note on the host that the device has not taken one of the steps."""
        if self._step is not None:
            self._step.take_back(1)

    def _capture(self) -> None:
        # memory of the graph's own: the user's batch comes and goes
        fixed = {id(t): t.clone(memory_format=torch.preserve_format) for t in self._batch}
        self._inputs = tree_map_only(Tensor, lambda t: fixed[id(t)], self._inputs)
        self._batch = [fixed[id(t)] for t in self._batch]
        self._rehearse()
        # of gradients that stand in: those of the graph are not there yet, and nothing may be sent while it is captured
        if not self._add:
            self._deliver([torch.empty_like(p) for p in self.reached])
        self._limits = _limits(self._update)
        step = None if self._update is None else CapturedStep.of(self._update.optimizer)
        if step is not None and step.ready():
            step.prepare()
            self._step = step
        reserved = torch.cuda.memory_reserved(self._bad.device) if self._bad.is_cuda else 0
        graph = Graph(self._pool, self._bad.device, self._generators)
        with capturing():
            self.loss, made, self.output = graph.capture(self._pass, self._finish)
        self.bytes = torch.cuda.memory_reserved(self._bad.device) - reserved if self._bad.is_cuda else 0
        self._graph = graph
        if self._add:
            self._hold()
        else:
            self._made = made
            self._deliver(made)
        if self._step is not None and not self._step.ready():
            raise RuntimeError("TrainStep: the update does not fit the gradients of its graph.")

    def _rehearse(self) -> None:
        """Run the pass where the graph will read, and take it back: what is compiled for this memory is so before."""
        before = Snapshot(self._modules)
        with Recorder(self._batch) as recorder:
            try:
                hearing = None if self._monitor is None else self._monitor.hearing(self._overwritten)
                self._passes.run(self._inputs, self._leaves, self._scale, hearing=hearing)
            finally:
                self._passes.output = None
                recorder.rewind()
                before.restore()

    def _pass(self) -> tuple[Tensor, list[Tensor], Any]:
        if self.written:
            torch._foreach_copy_(self._before, self.written)
        hearing = None if self._monitor is None else self._monitor.hearing(self._overwritten)
        loss, found = self._passes.run(self._inputs, self._leaves, self._scale, hearing=hearing)
        if hearing is not None:
            self.heard = hearing.heard
        output, self._passes.output = self._passes.output, None
        return loss, _apart_from_all(self.reached, [g for g in found if g is not None], self._batch), output

    def _finish(self, made: tuple[Tensor, list[Tensor], Any]) -> None:
        """What follows the pass, in the graph: where gradients go, whether they are finite, clipping and the update."""
        loss, held, _ = made
        if self._add:
            targets = [p.grad for p in self.reached if p.grad is not None]
            torch._foreach_add_(targets, held)
            held = targets
        bad = torch.where(loss.isfinite().all(), TAKEN, NOT_FINITE)
        bad = torch.where(self._bad == NOT_FINITE, NOT_FINITE, bad) if self._add else bad
        if self._step is None:
            self._bad.copy_(bad)
            self._put_back()
            return
        if self._loss_scale is not None:
            self._loss_scale.unscale_(held)
        total = _total_norm(held)
        of_gradients: Any = NOT_FINITE
        if self._loss_scale is not None:
            of_gradients = torch.where(self._loss_scale.value > 1, OVERFLOWED, NOT_FINITE)
        self._bad.copy_(torch.where((bad == TAKEN) & ~total.isfinite(), of_gradients, bad))
        if self._loss_scale is not None:
            self._loss_scale.update_(self._bad != TAKEN)
        self._put_back()
        max_norm, max_value = self._limits
        if max_value is not None:
            torch._foreach_clamp_max_(held, max_value)
            torch._foreach_clamp_min_(held, -max_value)
        if max_norm is not None:
            total = total if max_value is None else _total_norm(held)
            self._total = total
            factor = ratio(max_norm, total).clamp(max=1.0)
            for dtype in dict.fromkeys(g.dtype for g in held):
                torch._foreach_mul_([g for g in held if g.dtype is dtype], factor.to(dtype))
        self._step.launch(self._bad)

    def _put_back(self) -> None:
        """Let running statistics be as before a batch that is not finite."""
        for tensor, before in zip(self.written, self._before):
            tensor.copy_(torch.where(self._bad == NOT_FINITE, before, tensor))

    def _deliver(self, gradients: Sequence[Tensor]) -> None:
        """Leave the gradients in `p.grad`."""
        for p, gradient in zip(self.reached, gradients):
            if self._add and p.grad is not None:
                p.grad.add_(gradient)
            else:
                p.grad = gradient
        if not self._add:
            for p in self._others:
                p.grad = None
        self._hold()

    def _hold(self) -> None:
        self.gradients = [p.grad for p in self.reached if p.grad is not None]
        self.norm = Norm(self.gradients)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the device current: streams, events and captures are of the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def serves(parameter: Tensor) -> bool:
    """True if steps of a model with this parameter are graphs of a device."""
    return parameter.is_cuda


def _limits(update: Update | None) -> tuple[float | None, float | None]:
    return (None, None) if update is None else (update.max_norm, update.max_value)


def _same(new: Sequence[Any], old: Sequence[Any]) -> bool:
    return len(new) == len(old) and all(map(operator.is_, new, old))


def _own(p: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in memory of its own, laid out as its parameter."""
    return torch.empty_like(p).copy_(gradient)


def _apart_from_all(params: Sequence[Tensor], gradients: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients laid out as their parameters, each in memory that is nobody else's: as they are, or copies."""
    storages = [t.untyped_storage()._cdata for t in (*gradients, *others, *params)]
    return [
        g if g.stride() == p.stride() and storages.count(g.untyped_storage()._cdata) == 1 else _own(p, g)
        for p, g in zip(params, gradients)
    ]


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    norms = torch._foreach_norm(list(map(values_of, gradients)), 2, torch.float64)  # type: ignore[call-overload]
    return torch.stack(norms).square().sum().sqrt()


def _refuse_the_host(recorder: Recorder, leaves: Sequence[Tensor]) -> None:
    """Raise where a pass takes numbers from the host's memory, which a graph would freeze, or uses several devices."""
    if len({p.device for p in leaves}) > 1:
        raise NotCapturableError("the parameters are on several devices, which no graph can be of")
    if leaves[0].device.type == "cpu":
        return
    for call in recorder.calls:
        if any(t.device.type == "cpu" for t in tensors_in(tree_leaves((call.args, call.keywords)))):
            raise NotCapturableError(f"{call.operation} takes a tensor of the host's, whose values would be frozen")
