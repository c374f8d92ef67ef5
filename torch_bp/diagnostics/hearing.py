"""How a monitor hears a pass without autograd, which a `TrainStep` runs, captures, and runs again without Python.

The probe is attached for the one pass that is captured, and what it hears are tensors: they stay where they are when
the pass runs again, and are measured after it, as those of any other pass. So nothing of a measurement is captured, a
run costs the reading of these tensors alone, and whatever a level measures may look at values and make decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_bp.autograd.entry import version
from torch_bp.diagnostics.derivative import differentiable, from_output
from torch_bp.diagnostics.layer import Layer
from torch_bp.diagnostics.measurements import Detail, Measurements
from torch_bp.diagnostics.probe import EagerProbe


class Notes:
    """Stands where `Measurements` does while a pass is captured: keeps the tensors that are to be measured.

    Args:
        detail: what will be measured; other tensors are not kept.
        copied: numbers of the tensors that are kept as copies, as something writes to them later in the pass. None for
            all.
    """

    def __init__(self, detail: Detail, copied: frozenset[int] | None) -> None:
        self.calls: list[tuple[str, Any, tuple[Any, ...]]] = []
        self._detail, self._copied = detail, copied
        self._versions: list[tuple[Tensor, int]] = []

    def observe_input(self, x: Tensor) -> None:
        self.calls.append(("observe_input", None, (self._kept(x),)))

    def observe_forward(self, layer: Layer, input: Tensor | None, z: Tensor, output: Tensor) -> None:
        activation = layer.activation
        needed = z is not output and self._detail.units and activation is not None and differentiable(activation)
        if needed and not self._detail.causes and from_output(activation):  # type: ignore[arg-type]
            needed = False
        kept = self._kept(output)
        before = self._kept(z) if needed else kept
        given = self._kept(input) if self._detail.per_example and layer.linear and input is not None else None
        self.calls.append(("observe_forward", layer, (given, before, kept)))

    def observe_backward(self, layer: Layer, dz: Tensor, da: Tensor | None = None) -> None:
        self.calls.append(("observe_backward", layer, (self._kept(dz),)))

    def observe_gradient(self, layer: Layer, kind: int, gradient: Tensor) -> None:
        self.calls.append(("observe_gradient", layer, (kind, self._kept(gradient))))

    def begin(self) -> None:
        """A pass ends with its step."""

    def flush(self) -> None:
        """Nothing is measured here."""

    def _kept(self, x: Tensor) -> Tensor:
        x = x.detach()
        number = len(self._versions)
        self._versions.append((x, version(x)))
        return x.clone() if self._copied is None or number in self._copied else x

    def overwritten(self) -> frozenset[int]:
        """Numbers of the tensors that have been written to since they were heard."""
        return frozenset(k for k, (x, before) in enumerate(self._versions) if version(x) != before)


class Hearing:
    """One monitor's ear for one explicit pass: `attach`, the pass, `detach`; then `heard` is what there is to measure.

    Args:
        probe: of the monitor, not attached.
        measurements: that the monitor reads.
        copied: see `Notes`.

    Attributes:
        heard: calls of `Measurements`, the examples of the batch, and what the loss compared; tensors in any nesting,
            in whose place others may be put.
        overwritten: numbers of what the pass has written to after it was heard, which must be `copied`; as a rule none.
    """

    def __init__(self, probe: EagerProbe, measurements: Measurements, copied: frozenset[int] | None) -> None:
        self._probe, self._measurements = probe, measurements
        self._notes = Notes(measurements.detail, copied)
        self._earlier = 0, False
        self._compared: tuple[Any, Any] = (None, None)
        self.heard: tuple[Any, ...] = ()
        self.overwritten: frozenset[int] = frozenset()

    def attach(self, model: nn.Module) -> None:
        probe = self._probe
        self._earlier = probe.batch, probe.answered  # of other passes of the step
        probe.measurements = self._notes
        probe.forget()
        probe.attach(model)

    def compared(self, output: Any, targets: Sequence[Any]) -> None:
        """What the model has returned, and the targets."""
        if isinstance(output, Tensor) and self._measurements.detail.units:
            target = targets[0] if targets and isinstance(targets[0], Tensor) else None
            self._compared = output.detach(), target

    def detach(self) -> None:
        probe = self._probe
        examples, answered = probe.batch, probe.answered
        try:
            probe.finish()
            probe.detach()
        finally:
            probe.measurements = self._measurements
            probe.batch, probe.answered = self._earlier
        self.heard = (self._notes.calls, examples, answered, self._compared)
        self.overwritten = self._notes.overwritten()


def measure(heard: tuple[Any, ...], probe: EagerProbe, measurements: Measurements, losses: Any) -> None:
    """Measure what was heard, and sum it: the next pass writes over it."""
    calls, examples, answered, (output, target) = heard
    measurements.sum_again(calls)
    probe.batch += examples
    probe.answered |= answered
    if output is not None:
        with torch.no_grad():
            losses.compared(output, target)
