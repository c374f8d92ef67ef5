"""Which way a pass goes: by a line that was captured for batches of its kind, one that is captured now, or as it is.

All three have what a step asks of a pass that has run: `loss`, `gradients`, `norm`, `plan`, `output`, `heard`, and
`restore`, which takes back what it wrote to the model's own tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_bp.step import device_line
from torch_bp.step.arguments import Inputs, kind_of
from torch_bp.step.device_line import DeviceLine
from torch_bp.step.line import Line
from torch_bp.step.outcomes import Outcomes
from torch_bp.step.parts import Parts
from torch_bp.step.recorder import NotCapturableError, tensors_in
from torch_bp.step.snapshot import Snapshot
from torch_bp.step.uncaptured import Uncaptured
from torch_bp.step.unchanged import hooked
from torch_bp.step.watched import Monitor, OverwrittenError

_set_recording = torch._C._set_grad_enabled
_LINES = 16  # that are kept, each with buffers of its own


class Runner:
    """Runs passes, and keeps the lines that it has captured.

    Args:
        parts: of the step; a line on a device may hold the update.

    Attributes:
        capture: as of `TrainStep`.
        outcomes: of steps that a device may still be at, None before there were any.
        trusting: True while nobody but the optimizer can have written to parameters since the last pass.
        monitor: that records the last pass, if any.
    """

    def __init__(self, parts: Parts) -> None:
        self.capture: bool | str = "auto"
        self._passes, self._modules, self._parameters = parts.passes, parts.modules, parts.parameters
        self._update, self._loss_scale = parts.update, parts.loss_scale
        self._lines: dict[Any, list[Line | DeviceLine]] = {}
        self._never: set[Any] = set()  # kinds of batches that cannot be captured
        self._device: tuple[Any, Tensor] | None = None  # memory of graphs, and what became of a window
        self.outcomes: Outcomes | None = None
        self.trusting = False
        self.monitor: Monitor | None = None

    @property
    def lines(self) -> list[Line | DeviceLine]:
        """All that are kept."""
        return [line for kept in self._lines.values() for line in kept]

    @property
    def window(self) -> Tensor | None:
        """What became of the window so far, an int32 on the device that it is run on."""
        return None if self._device is None else self._device[1]

    def reset(self) -> None:
        """Forget what was captured."""
        self._lines.clear()
        self._never.clear()
        if self._passes.copies is not None:
            self._passes.copies.clear()

    def run(
        self, inputs: Inputs, add: bool, scale: float, own: bool = False, final: bool = False
    ) -> Line | DeviceLine | Uncaptured:
        """Run a pass, which leaves gradients in `p.grad`; the next one overwrites what it gives.

        Args:
            inputs: the arguments of model and loss.
            add: to the gradients that are there.
            scale: the error signal at the loss.
            own: give the gradients memory of their own; they are not scaled then by anything else.
            final: an update follows at once.
        """
        inputs, batch, kind = kind_of(inputs, add, scale)
        passes, update = self._passes, self._update
        self.monitor = update.monitor if update.monitor and update.monitor.recording else None
        if kind is not None and self.monitor is not None:
            kind = (*kind, "watched")
        passes.loss_scale = None
        if self._loss_scale is not None and not own and batch:
            self._loss_scale.to_(batch[0].device)
            passes.loss_scale = self._loss_scale.value
        if kind is not None and self._loss_scale is not None:
            kind = (*kind, own)
        if kind is not None and (not batch or device_line.serves(batch[0])):
            kind = (*kind, own, final)
        if passes.copies is not None:
            passes.copies.refresh(self.trusting)
        scaled_by = None  # before an update inside a graph has found another
        if self.monitor is not None and passes.loss_scale is not None:
            scaled_by = passes.loss_scale.clone()
        recording = torch.is_grad_enabled()
        _set_recording(False)  # as no_grad, which takes a microsecond
        try:
            ran: Line | DeviceLine | Uncaptured | None = self._again(kind, batch, own)
            if ran is None:
                ran = self._first(inputs, kind, add, scale, own, final)
        finally:
            _set_recording(recording)
        if self.monitor is not None:
            self.monitor.ran(passes.model, *inputs, passes.loss_fn)
            self.monitor.heard(ran.heard, ran.loss, scaled_by)
        return ran

    def _again(self, kind: Any, batch: Sequence[Tensor], own: bool) -> Line | DeviceLine | None:
        """Run the line for a kind of batch, if there is one that still does what the model does."""
        for line in self._lines.get(kind, ()):
            if line.unchanged.holds() and line.intact():
                try:
                    line.run(batch, own)
                except NotCapturableError:  # a graph, at its first replay
                    del self._lines[kind]
                    if self._device is not None and self._device[1].is_cuda:  # its memory may be left as it was
                        self._device = torch.cuda.graph_pool_handle(), self._device[1]
                    self._cannot(kind)
                    return None
                except BaseException:
                    line.restore()
                    raise
                return line
        return None

    def _cannot(self, kind: Any) -> None:
        """Remember that a kind of batch cannot be captured; raise where it must be."""
        if self.capture is True:
            raise
        self._never.add(kind)

    def _first(
        self, inputs: Inputs, kind: Any, add: bool, scale: float, own: bool, final: bool
    ) -> Line | DeviceLine | Uncaptured:
        """Run a pass of a kind that was not captured, and capture it if that can be done."""
        before = Snapshot(self._modules)
        leaves = self._parameters()
        try:
            if self.capture is True or (self.capture and kind not in self._never):
                try:
                    return self._captured(inputs, kind, leaves, add, scale, own, final, before)
                except NotCapturableError:
                    before.restore()
                    self._cannot(kind)
            return Uncaptured(self._passes, self._modules, inputs, leaves, scale, add, before, self.monitor)
        except BaseException:
            before.restore()
            raise

    def _captured(
        self,
        inputs: Inputs,
        kind: Any,
        leaves: list[Tensor],
        add: bool,
        scale: float,
        own: bool,
        final: bool,
        before: Snapshot,
    ) -> Line | DeviceLine:
        if kind is None:
            raise NotCapturableError(
                "an argument cannot be compared with the next one (it is no tensor and has no hash, or a sparse or "
                "nested tensor or one around others), or a mode, a transform or a tracer watches"
            )
        if hooked(self._modules):
            raise NotCapturableError("hooks on modules or parameters would miss the calls of a captured step")
        serves = device_line.serves(leaves[0])
        make: Any = functools.partial(
            DeviceLine if serves else Line, self._passes, self._modules, inputs, leaves, scale, add, before
        )
        line: Line | DeviceLine
        if serves:
            if not all(map(device_line.serves, tensors_in(tree_leaves(inputs)))):
                raise NotCapturableError("inputs and targets must be where the parameters are")
            update = self._update if final else None
            scales = None if own else self._loss_scale
            line = make(update, scales, *self._on_device(leaves[0]), self.monitor)
        else:
            line = self._line(make, before, own)
        kept = self._lines.setdefault(kind, [])
        if serves:  # a graph that no longer holds is of no use; a line may be, when a model is put back
            kept.clear()
        kept.append(line)
        while sum(map(len, self._lines.values())) > _LINES:
            oldest = next(iter(self._lines))
            del self._lines[oldest][0]
            if not self._lines[oldest]:
                del self._lines[oldest]
        return line

    def _line(self, make: Callable[..., Line], before: Snapshot, own: bool) -> Line:
        """Capture a pass on the CPU; what a monitor hears is copied where the pass writes to it later."""
        if self.monitor is None:
            return make(own)
        copied: frozenset[int] = frozenset()
        while True:
            try:
                return make(own, self.monitor.hearing(copied), copied)
            except OverwrittenError as error:
                before.restore()
                copied = error.which

    def _on_device(self, leaf: Tensor) -> tuple[Any, Tensor]:
        """Return what the graphs of one device share."""
        if self._device is None or self._device[1].device != leaf.device:
            pool = torch.cuda.graph_pool_handle() if leaf.is_cuda else None
            self._device = pool, torch.zeros((), dtype=torch.int32, device=leaf.device)
            self.outcomes = Outcomes(leaf.device)
        return self._device
