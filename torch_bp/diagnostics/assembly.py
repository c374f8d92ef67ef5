"""From the numbers of one step to a `Reading`: what follows from sums, by layer and from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torch_bp.diagnostics.dead_units import Ledger, describe
from torch_bp.diagnostics.layer import Layer
from torch_bp.diagnostics.measurements import AFTER, BACKWARD, BEFORE, FORWARD, KINDS
from torch_bp.diagnostics.parameters import COLUMNS
from torch_bp.diagnostics.quantities import mean_and_variance, noise
from torch_bp.diagnostics.reading import Finiteness, Histogram, Labels, LayerReading, Reading, Spread
from torch_bp.diagnostics.record import Record

SMOOTHING = 0.9  # of the two estimates whose ratio is the noise scale


class Assembly:
    """Makes readings of records, in their order: the ledger of dead units and the noise scale remember.

    Args:
        layers: of the model.
        rows: row of each parameter, by id.
    """

    def __init__(self, layers: Sequence[Layer], rows: Mapping[int, int]) -> None:
        self.layers = layers
        self._rows = [[rows[id(p)] for p in layer.params] for layer in layers]
        self.ledger = Ledger()
        self._noise: tuple[float, float] | None = None
        self._clips = [0, 0]  # steps whose gradients were clipped, and all

    def reading(self, record: Record, remember: bool = True) -> Reading:
        """What the record says; later ones hear nothing of it unless `remember`."""
        if not remember:
            kept = dict(self.ledger.since), self._noise, list(self._clips)
            try:
                return self.reading(record)
            finally:
                self.ledger.since, self._noise, self._clips = kept
        numbers, facts = record.numbers(), record.facts
        scale = float(numbers["scale"]) if "scale" in numbers else 1.0
        columns = [numbers[name].tolist() for name in COLUMNS if name in numbers]
        columns += [[math.nan] * len(facts["rows"])] * (len(COLUMNS) - len(columns))
        by_row = dict(zip(facts["rows"], zip(*columns)))
        signals = _Signals(numbers["signals"].tolist(), scale, _bad_examples(facts, numbers))
        order = [*facts["order"], *(layer for layer in self.layers if layer not in facts["order"])]
        chain = [layer for layer in facts["order"] if layer.chained]
        following = dict(zip(map(id, chain), chain[1:]))
        layers = {
            layer.name: self._layer(layer, following.get(id(layer)), signals, by_row, numbers, record)
            for layer in order
        }
        examples = numbers.get("examples")
        spread = None if examples is None else _spread(examples[-1].tolist(), facts, scale)
        loss = numbers["loss"].tolist() if "loss" in numbers else None
        grad = [row[0] for row in by_row.values()]
        product = [row[3] for row in by_row.values()]
        projected = sum(product) if product and not math.isnan(product[0]) else None
        return Reading(
            step=record.step,
            loss=loss,
            grad_norm=_root(sum(grad)) if grad else None,
            grad_norm_before=_optional(numbers.get("before")),
            predicted_decrease=None if projected is None else -projected,
            layers=layers,
            unknown={layer.name: layer.unknown for layer in self.layers if layer.unknown},
            input=signals.spread(KINDS * len(self.layers)),
            input_finite=signals.finiteness(KINDS * len(self.layers)),
            output=_output(numbers.get("output")),
            carried=self._carried(record.step, facts, numbers),
            per_example=spread,
            noise_scale=self._noise_scale(spread, by_row, facts, numbers),
            labels=_labels(numbers.get("labels")),
            **self._known(facts, numbers),
        )

    def _carried(self, step: int, facts: Mapping[str, Any], numbers: Mapping[str, Tensor]) -> float | None:
        if step == 0 or not facts.get("answered"):
            return None
        return float(numbers["carried"]) if "carried" in numbers else 0.0

    def _known(self, facts: Mapping[str, Any], numbers: Mapping[str, Tensor]) -> dict[str, Any]:
        names = ["epoch", "batch", "seconds", "share", "loss_function", "unused", "frozen", "refused"]
        names += ["gradient_errors", "gradient_tolerance"]
        found = {name: facts[name] for name in names if facts.get(name) is not None}
        found["lr"] = tuple(numbers["lr"].tolist()) if "lr" in numbers else facts.get("lr", ())
        for name in ("validation_loss", "achieved_decrease"):
            if name in numbers:
                found[name] = float(numbers[name])
        if "before" in numbers:
            found["clipped"] = bool(numbers["before"] > numbers["clipped norm"])
            self._clips = [self._clips[0] + found["clipped"], self._clips[1] + 1]
            found["clip_rate"] = self._clips[0] / self._clips[1]
        return found

    def _layer(
        self,
        layer: Layer,
        following: Layer | None,
        signals: _Signals,
        by_row: Mapping[int, Sequence[float]],
        numbers: Mapping[str, Tensor],
        record: Record,
    ) -> LayerReading:
        first = KINDS * layer.index
        of_params = [by_row[row] for row in self._rows[layer.index] if row in by_row]
        norms: list[Any] = [_root(sum(column)) for column in list(zip(*of_params))[:3]] or [None] * 3
        signal, after = signals.norm(first + BACKWARD), signals.norm(first + AFTER)
        before = signals.norm(first + BEFORE)
        ahead = None if following is None else signals.norm(KINDS * following.index + BACKWARD)
        mean, variance = signals.moments(first + FORWARD)
        if not layer.chained:
            mean = variance = None
        weights = sum(row[1] for row in of_params)
        count = sum(p.numel() for p, row in zip(layer.params, self._rows[layer.index]) if row in by_row)
        return LayerReading(
            layer.name,
            layer.kind,
            activation=None if layer.activation is None else type(layer.activation).__name__,
            units=record.facts.get("widths", {}).get(layer.index),
            grad_norm=norms[0],
            weight_norm=norms[1],
            update_norm=(norms[2] if of_params else record.facts["idle"]) if record.facts["updated"] else None,
            update_ratio=_ratio(norms[2], norms[1]) if record.facts["updated"] else None,
            signal_norm=signal,
            signal_ratio=_ratio(signal, ahead),
            weight_factor=_ratio(after, ahead),
            derivative_factor=_ratio(signal if before is None else before, after),
            activation_mean=mean,
            activation_var=variance,
            forward=signals.finiteness(first + FORWARD),
            backward=signals.finiteness(first + BACKWARD),
            weight=Finiteness(count, int(math.isnan(weights)), int(math.isinf(weights))) if of_params else None,
            **self._units(layer, numbers, record),
            **self._histograms(layer, numbers),
            per_example=_of_layer(layer, numbers, record.facts, signals.scale),
        )

    def _units(self, layer: Layer, numbers: Mapping[str, Tensor], record: Record) -> dict[str, Any]:
        counts = numbers.get(f"units {layer.index}")
        examples = numbers.get(f"rows {layer.index}")
        if counts is None or examples is None or not float(examples):
            return {}
        since = self.ledger.update(layer.name, record.step, counts)
        found: dict[str, Any] = {"dead_units": int((counts == 0).sum())}
        found["saturated"] = 1 - float(counts.mean()) / float(examples)
        causes = numbers.get(f"causes {layer.index}")
        if causes is not None:
            found["dead"] = describe(since, causes, numbers.get(f"bias {layer.index}"))
        return found

    def _histograms(self, layer: Layer, numbers: Mapping[str, Tensor]) -> dict[str, Any]:
        found = {}
        for name, kind in (("histogram", FORWARD), ("signal_histogram", BACKWARD)):
            values = numbers.get(f"histogram {layer.index} {kind}")
            if values is not None:
                low, high, *counts, mean, square, nan, inf = values.tolist()
                found[name] = Histogram(low, high, tuple(map(int, counts)), mean, square, int(nan), int(inf))
        return found

    def _noise_scale(
        self,
        spread: Spread | None,
        by_row: Mapping[int, Sequence[float]],
        facts: Mapping[str, Any],
        numbers: Mapping[str, Tensor],
    ) -> float | None:
        """The ratio of smoothed estimates, as those of one step are noise; McCandlish et al. (2018), appendix A.1."""
        if spread is None or spread.count < 2:
            return None
        rows = {row for index in facts["examples"] for row in self._rows[index]}
        square = sum(by_row[row][0] for row in rows if row in by_row)
        if "before" in numbers and "clipped norm" in numbers:  # of the gradient before clipping
            factor = float(numbers["before"]) / max(float(numbers["clipped norm"]), 1e-300)
            square *= factor * factor
        mean_square = spread.std * spread.std + spread.mean * spread.mean  # `**` would raise where it is infinite
        found = noise(mean_square, square, spread.count)
        if not all(map(math.isfinite, found)):
            return None
        if self._noise is not None:
            found = tuple(SMOOTHING * a + (1 - SMOOTHING) * b for a, b in zip(self._noise, found))  # type: ignore[assignment]
        self._noise = found
        return found[0] / found[1] if found[1] > 0 else math.inf


class _Signals:
    """Rows (count, sum, square, nan, inf) of the buffer; gradients without the factor of a GradScaler."""

    def __init__(self, rows: Sequence[Sequence[float]], scale: float, examples: Mapping[int, tuple[int, ...]]) -> None:
        self._all, self.scale, self._examples = rows, scale, examples

    def norm(self, slot: int) -> float | None:
        """NaN where a number is, else infinite where one is."""
        count, _, square, nan, inf = self._all[slot]
        if not count:
            return None
        return math.nan if nan else math.inf if inf else _root(square) / self.scale

    def moments(self, slot: int) -> tuple[float | None, float | None]:
        count, total, square, nan, inf = self._all[slot]
        return mean_and_variance(count - nan - inf, total, square) if count else (None, None)

    def finiteness(self, slot: int) -> Finiteness | None:
        count, nan, inf = (int(self._all[slot][column]) for column in (0, 3, 4))  # the sums may be infinite
        return Finiteness(count, nan, inf, self._examples.get(slot, ())) if count else None

    def spread(self, slot: int) -> Spread | None:
        count = int(self._all[slot][0])
        mean, variance = self.moments(slot)
        if mean is None or variance is None:
            return None
        return Spread(count, mean, math.sqrt(variance), math.nan, math.nan)


def _of_layer(layer: Layer, numbers: Mapping[str, Tensor], facts: Mapping[str, Any], scale: float) -> Spread | None:
    if layer.index not in facts.get("examples", ()):
        return None
    return _spread(numbers["examples"][facts["examples"].index(layer.index)].tolist(), facts, scale)


def _spread(row: Sequence[float], facts: Mapping[str, Any], scale: float) -> Spread | None:
    """Of norms: count, sum, sum of squares, least and largest; times the examples that a mean loss divides by."""
    count, total, square, low, high = row
    if not count:
        return None
    share = facts["mean over"]
    factor = (1 if share is None else count * share) / scale
    mean, variance = mean_and_variance(count, total * factor, square * factor * factor)
    return Spread(int(count), mean, math.sqrt(variance), low * factor, high * factor)


def _labels(numbers: Tensor | None) -> Labels | None:
    if numbers is None:
        return None
    count, classes, largest, changes, commonest = numbers.tolist()
    if not count:
        return None
    return Labels(int(count), int(classes), largest / count, changes / max(count - 1, 1), int(commonest))


def _output(numbers: Tensor | None) -> Spread | None:
    if numbers is None:
        return None
    count, total, square, low, high = numbers.tolist()
    mean, variance = mean_and_variance(count, total, square)
    return Spread(int(count), mean, math.sqrt(variance), low, high)


def _bad_examples(facts: Mapping[str, Any], numbers: Mapping[str, Tensor]) -> dict[int, tuple[int, ...]]:
    """Places of examples that are not finite, of each signal; those of none are infinite."""
    if "bad examples" not in numbers:
        return {}
    rows = numbers["bad examples"].tolist()
    return {slot: tuple(int(i) for i in row if math.isfinite(i)) for slot, row in zip(facts["looked at"], rows)}


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan


def _ratio(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return a / b if b else (math.nan if not a else math.inf)


def _optional(value: Tensor | None) -> float | None:
    return None if value is None else float(value)
