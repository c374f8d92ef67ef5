"""Sums over the signals of a step, in buffers that add up over its micro-batches and are copied to the host at once.

A signal is one of a layer's tensors: its activation a, its error signal dz, the one behind the activation, da, and the
one before it where a normalisation lies between. Each adds a row (count, sum, square, nan, inf) to the buffer. Tensors
are collected and summed together, one call of a kernel for all of a small network; what is held for that is bounded.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_bp.diagnostics import quantities
from torch_bp.diagnostics.derivative import SATURATED, active_counts, differentiable, from_output
from torch_bp.diagnostics.layer import Layer
from torch_bp.kernels import Table
from torch_bp.kernels.totals import Totals

FORWARD, BACKWARD, AFTER, BEFORE = range(4)  # a, dz, da, and the gradient at the input of the activation
KINDS = 4
HELD = 64 << 20  # bytes of signals that wait to be summed together
TABLES = 16  # of addresses, kept for as many sets of sizes


@dataclass(frozen=True)
class Detail:
    """What is measured beside norms and counts of what is not finite.

    Attributes:
        units: counts of active examples for each unit: saturation, dead units.
        causes: what tells why a unit is dead.
        places: of which examples an activation, an error signal or the input is not finite.
        histograms: of activations and error signals.
        per_example: norms of the gradients of single examples.
    """

    units: bool = False
    causes: bool = False
    places: bool = False
    histograms: bool = False
    per_example: bool = False


class _Batch:
    """Sums of signals of the same slots and sizes, again and again.

    Args:
        key: their rows of the buffer, and how many numbers each has.
        device: of the buffer.
    """

    def __init__(self, key: tuple[tuple[int, ...], tuple[int, ...]], device: torch.device) -> None:
        slots, sizes = key
        self._moments, self._table = Totals(quantities.moments_of), Table()
        self._where = torch.tensor(slots, device=device)
        self._counts = torch.tensor(sizes, dtype=torch.float64, device=device)[:, None]
        self._rows = np.array(sizes, np.float64)[:, None].repeat(3, axis=1)
        self._light = torch.from_numpy(self._rows)

    def add(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        """Add to the buffer.

        On the CPU the sum and the sum of squares alone, and that they are finite, tell most: it costs less to look at
        the numbers again where they are not than to count in every pass what is finite.
        """
        if values.is_cpu and tensors[0].is_floating_point():
            found = self._moments(tensors)
            if found is not None and np.isfinite(found).all():
                self._rows[:, 1:] = found
                values[:, :3].index_add_(0, self._where, self._light)
                return
        sums = quantities.sums(tensors, self._table).to(values.device)
        values.index_add_(0, self._where, torch.cat([self._counts, sums], dim=1))


class Measurements:
    """What layers have been heard to say since `begin`.

    Args:
        layers: of one model.
        detail: what is measured.
        device: of the buffers.
        threshold: see `active_counts`.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        detail: Detail,
        device: torch.device,
        threshold: float = SATURATED,
    ) -> None:
        self.layers, self.detail, self.device, self.threshold = layers, detail, device, threshold
        self.values = torch.zeros(KINDS * len(layers) + 1, 5, dtype=torch.float64, device=device)  # the last: the input
        owners = Counter(id(p) for layer in layers for p in layer.params)
        self._tied = {p for p, count in owners.items() if count > 1}
        self.units: dict[int, Tensor] = {}  # (O) examples for which a unit is active
        self.rows: dict[int, int] = {}  # examples and steps of sequences that were counted there
        self.causes: dict[int, Tensor] = {}  # (4, O): largest z, largest |z - b|, active without bias, weight norm
        self.histograms: dict[tuple[int, int], Tensor] = {}
        self.examples: dict[int, list[Tensor]] = {}  # (N) of each micro-batch
        self.inputs: dict[int, list[Tensor]] = {}  # that wait for their error signal
        self.not_finite: dict[int, list[Tensor]] = {}  # how many numbers of each example (N), of each micro-batch
        self._pending: list[tuple[int, Tensor, int]] = []
        self._bytes = 0
        self._batches: dict[tuple[tuple[int, ...], tuple[int, ...]], _Batch] = {}  # for the same slots and sizes
        # of calls that come again, by their id: themselves, what sums their tensors, and these
        self._again: dict[int, tuple[Any, _Batch | None, tuple[Tensor, ...]]] = {}

    def begin(self) -> None:
        """Forget: a new step begins. Buffers keep their addresses."""
        self.values.zero_()
        for counts in self.units.values():
            counts.zero_()
        self.rows.clear()
        self._pending.clear()
        self._bytes = 0
        for kept in (self.causes, self.histograms, self.examples, self.inputs, self.not_finite):
            kept.clear()  # type: ignore[attr-defined]

    def observe_input(self, x: Tensor) -> None:
        """The model's input."""
        self._add(KINDS * len(self.layers), x)
        self._look(KINDS * len(self.layers), x)

    def observe_forward(self, layer: Layer, input: Tensor | None, z: Tensor, output: Tensor) -> None:
        """A layer has run: z is what its activation got, or its own output, and `output` what the activation made.

        Args:
            layer: one of `layers`, whose `activation` is set if it has one.
            input: what the layer got; kept for `observe_backward` where norms of single examples are wanted.
            z, output: the same tensor where there is no activation.
        """
        self._add(KINDS * layer.index + FORWARD, output)
        self._look(KINDS * layer.index + FORWARD, output)
        if self._by_example(layer) and input is not None and input.is_floating_point():
            self.inputs.setdefault(layer.index, []).append(input.detach())
        if self.detail.histograms:
            self._histogram(layer, FORWARD, output)
        activation = layer.activation
        if self.detail.units and layer.chained and activation is not None and differentiable(activation):
            saved = output if from_output(activation) else z
            counts = active_counts(activation, saved.movedim(layer.unit_dim, -1), self.threshold)
            known = self.units.get(layer.index)
            if known is None:
                self.units[layer.index] = counts.double()
            else:
                known += counts
            self.rows[layer.index] = self.rows.get(layer.index, 0) + saved.numel() // max(counts.numel(), 1)
            if self.detail.causes and z is not output:
                self._why(layer, z.detach().movedim(layer.unit_dim, -1))

    def observe_backward(self, layer: Layer, dz: Tensor, da: Tensor | None = None) -> None:
        """The error signals of a layer are there; `da` is the one behind its activation, if that is known."""
        self._add(KINDS * layer.index + BACKWARD, dz)
        self._look(KINDS * layer.index + BACKWARD, dz)
        if da is not None:
            self._add(KINDS * layer.index + AFTER, da)
        if self.detail.histograms:
            self._histogram(layer, BACKWARD, dz)
        if self.detail.per_example and (waiting := self.inputs.get(layer.index)):
            squares = quantities.per_example_squares(waiting.pop(), dz, layer.module.bias is not None)
            self.examples.setdefault(layer.index, []).append(squares)

    def observe_gradient(self, layer: Layer, kind: int, gradient: Tensor) -> None:
        """The gradient AFTER the activation of a layer, or BEFORE it."""
        self._add(KINDS * layer.index + kind, gradient)

    def keep_examples(self, batch: int) -> None:
        """Drop norms of single examples of layers that have not seen each of the batch once: called several times, or
        with rows of another kind, such as the steps of a sequence.
        """
        found = self.examples.items()
        self.examples = {index: squares for index, squares in found if sum(s.numel() for s in squares) == batch}

    def flush(self) -> None:
        """Sum what has been waiting."""
        if not self._pending:
            return
        pending, self._pending, self._bytes = self._pending, [], 0
        # memory that has been written to since does not hold the signal any more
        there = [(slot, t) for slot, t, version in pending if version < 0 or t._version == version]
        if there:
            tensors = [t for _, t in there]
            self._batch(tuple(slot for slot, _ in there), tensors).add(tensors, self.values)

    def sum_again(self, calls: Sequence[tuple[str, Any, tuple[Any, ...]]]) -> None:
        """Make these calls of `observe_...` and sum at once; fast where the same object has come before.

        Args:
            calls: method, layer or None, and the other arguments: tensors that stay the same.
        """
        if self.detail != Detail():
            for method, layer, arguments in calls:
                call: Callable[..., None] = getattr(self, method)
                call(*arguments) if layer is None else call(layer, *arguments)
            self.flush()
            return
        known = self._again.get(id(calls))
        if known is None or known[0] is not calls:
            if len(self._again) >= TABLES:
                self._again.clear()
            held = self._pending
            self._pending, self._bytes = [], -sys.maxsize  # nothing is summed in between
            for method, layer, arguments in calls:
                call = getattr(self, method)
                call(*arguments) if layer is None else call(layer, *arguments)
            tensors = tuple(t for _, t, _ in self._pending)
            batch = self._batch(tuple(slot for slot, _, _ in self._pending), tensors) if tensors else None
            known = self._again[id(calls)] = calls, batch, tensors
            self._pending, self._bytes = held, 0
        self.flush()
        _, batch, tensors = known
        if batch is not None:
            batch.add(tensors, self.values)

    def _by_example(self, layer: Layer) -> bool:
        """Whether norms of the gradients of single examples are measured; a tied weight gets more than this layer's."""
        return self.detail.per_example and layer.linear and not any(id(p) in self._tied for p in layer.params)

    def _batch(self, slots: tuple[int, ...], tensors: Sequence[Tensor]) -> _Batch:
        key = slots, tuple(t.numel() for t in tensors)
        if key not in self._batches:
            if len(self._batches) >= TABLES:
                self._batches.clear()
            self._batches[key] = _Batch(key, self.device)
        return self._batches[key]

    def _add(self, slot: int, x: Tensor) -> None:
        x = x.detach() if x.requires_grad else x  # the same object: what a captured step reads may be put elsewhere
        self._pending.append((slot, x, -1 if x.is_inference() else x._version))
        self._bytes += x.nbytes
        if self._bytes > HELD:
            self.flush()

    def _look(self, slot: int, x: Tensor) -> None:
        if self.detail.places and not x.is_complex() and x.layout is torch.strided:
            self.not_finite.setdefault(slot, []).append(quantities.examples_not_finite(x))

    def _histogram(self, layer: Layer, kind: int, x: Tensor) -> None:
        # of the last micro-batch: bins of several would not have the same edges
        self.histograms[layer.index, kind] = quantities.histogram(x)

    def _why(self, layer: Layer, z: Tensor) -> None:
        z = z.reshape(-1, z.shape[-1])
        if not len(z):
            return
        source = layer.module if layer.norm is None else layer.norm
        bias = getattr(source, "bias", None)
        alone = z if bias is None else z - bias.detach().to(z.dtype)
        with torch.no_grad():
            a = layer.activation(alone.clone())  # type: ignore[misc]
        free = active_counts(layer.activation, a if from_output(layer.activation) else alone, self.threshold)  # type: ignore[arg-type]
        weight: Tensor = layer.module.weight.detach()  # type: ignore[operator,assignment]
        transposed = getattr(layer.module, "transposed", False)
        norms = (weight.transpose(0, 1) if transposed else weight).flatten(1).norm(dim=1)
        rows = [z.amax(0), alone.abs().amax(0), free]
        if norms.numel() == z.shape[-1]:
            rows.append(norms)
        found = torch.stack([t.double() for t in rows])
        known = self.causes.get(layer.index)
        self.causes[layer.index] = found if known is None else torch.maximum(known, found)
