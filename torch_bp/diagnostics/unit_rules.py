"""Rules for units that do not pass their error signal on, sec. 8: dead rectifiers, saturated sigmoids and tanhs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.history import SATURATING, History, hidden, unfolding, update_ratios
from torch_bp.diagnostics.reading import LayerReading
from torch_bp.diagnostics.remedy import INIT, lower_rate
from torch_bp.diagnostics.thresholds import Thresholds

FEW = 16  # examples among which a unit may be inactive by chance
ALIVE = 0.5  # share of dead units up to which a layer lives
LARGE = 0.1  # of an update over the weights: the first steps of a run that is well change some hundredths


def dead_units(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Most rectifiers of a layer are 0 for all examples, sec. 8.3: they get no gradient any more."""
    now = history.now
    if unfolding(history):  # units behind weights that are still 0
        return
    for layer in hidden(now):
        if layer.activation in SATURATING or layer.dead_units is None or not layer.units:
            continue
        share = layer.dead_units / layer.units
        if now.batch is not None and now.batch < FEW and (layer.saturated or 0.0) < 0.99:
            continue
        if share < limit.dead:
            continue
        killed = _killed(history, layer.name, limit.dead)
        cause = f"{layer.dead_units} of {layer.units} units are dead{killed or _blame(layer)}"
        if killed:
            cure, action = lower_rate(history), "lr*0.1"
        elif history.early:
            cure, action = INIT, "init"
        elif layer.activation == "ReLU":
            cure, action = "use nn.LeakyReLU(0.01) instead of nn.ReLU(), eq. 15", "activation"
        else:
            cure, action = "a learning rate 10 times lower", "lr*0.1"
        severity = "error" if share == 1 else "warning"
        yield Finding("dead units", layer.name, now.step, share, limit.dead, cause, cure, severity, action=action)
        return  # layers that follow a dead one have no input


def _killed(history: History, name: str, dead: float) -> str:
    """What has killed units that were alive when the run began, where it was an update far larger than usual."""
    ratio = 0.0
    for reading in (*history.start, *history.latest):
        layer = reading.layers.get(name)
        share = layer.dead_units / layer.units if layer is not None and layer.dead_units and layer.units else 0.0
        if reading is history.first and share > ALIVE:
            return ""
        ratio = max(ratio, update_ratios(reading).get(name, 0.0))
        if share >= dead:  # later updates have killed none of them
            break
    if ratio < LARGE:
        return ""
    return f", most of which were alive at step {history.first.step}: an update was {ratio:.0%} of the weights"


def _blame(layer: LayerReading) -> str:
    if not layer.dead:
        return ""
    cause, _ = Counter(unit.cause for unit in layer.dead).most_common(1)[0]
    return {
        "input": ": their input is 0",
        "bias": ": their bias keeps them below 0",
        "weights": ": their weights keep them below 0",
    }[cause]


def saturation(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Most outputs of a layer are where its activation is flat, sec. 8.1 and 8.2."""
    now = history.now
    for layer in hidden(now):
        if layer.activation not in SATURATING or layer.saturated is None or layer.saturated < limit.saturated:
            continue
        first = layer.name == next(iter(now.layers))
        size = math.hypot(now.input.mean, now.input.std) if now.input is not None else 0.0
        if first and size > limit.input_high:
            cure, action, why = "standardize the input: x = (x - x.mean(0)) / x.std(0)", "standardize", "its input"
        elif history.early:
            cure, action, why = INIT, "init", "its weights"
        else:
            cure, action, why = "a learning rate 10 times lower", "lr*0.1", "large updates of its weights"
        cause = f"{layer.saturated:.0%} of the outputs of {layer.activation} are where it is flat; {why} to blame"
        yield Finding("saturation", layer.name, now.step, layer.saturated, limit.saturated, cause, cure, action=action)
        return
