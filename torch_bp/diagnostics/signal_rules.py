"""Rules for the error signal on its way back, sec. 9: vanishing, exploding, and an initialization that is to blame.

Each layer multiplies the signal by two factors, sec. 3.1: by what the next layer's weights do to it, and by the
derivative of the activation. Over many layers the product of one of them is what vanishes or explodes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.history import SATURATING, UNFOLDING, History, hidden, signals, unfolding
from torch_bp.diagnostics.reading import LayerReading, Reading
from torch_bp.diagnostics.remedy import INIT
from torch_bp.diagnostics.thresholds import Thresholds

BYPASS = 10.0  # a signal of the first layer that is larger has not come through the layers where it is least


def vanishing(history: History, limit: Thresholds) -> Iterator[Finding]:
    """The error signal of a layer is next to nothing of the last layer's, sec. 9.1."""
    layers = _live(history.now)
    ratios = _ratios(layers)
    if not ratios or min(ratios.values()) >= limit.vanishing or unfolding(history) or _blocked(history):
        return
    if ratios[layers[0].name] > BYPASS * limit.vanishing:  # it reaches the first layer by another way
        return
    name = min(ratios, key=lambda each: ratios[each])
    by_weights, by_derivatives = _factors(layers, name)
    text = f"the error signal of the first layers is {ratios[name]:.2g} of the last layer's"
    if by_derivatives < by_weights:
        worst = min(layers[:-1], key=lambda x: x.derivative_factor or math.inf)
        flat = f", {worst.saturated:.0%} of it saturated" if worst.saturated else ""
        cause = f"{text}; the derivative of {worst.activation} is to blame (layer {worst.name}{flat})"
        better = "ReLU" if worst.activation in SATURATING else "LeakyReLU"
        remedy, action = f"use nn.{better}() instead of nn.{worst.activation}(), and {INIT}", "activation"
    else:
        cause, remedy, action = f"{text}; small weights are to blame", INIT, "init"
    yield Finding(
        "vanishing gradient", name, history.now.step, ratios[name], limit.vanishing, cause, remedy, action=action
    )


def exploding(history: History, limit: Thresholds) -> Iterator[Finding]:
    """The error signal grows on its way back, sec. 9.4."""
    layers = _live(history.now)
    ratios = _ratios(layers)
    if not ratios or max(ratios.values()) <= limit.exploding:
        return
    name = max(ratios, key=lambda each: ratios[each])
    cause = f"the error signal is {ratios[name]:.2g} times the last layer's; large weights are to blame"
    cure = INIT if history.early else "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) before optimizer.step()"
    action = "init" if history.early else "clip"
    yield Finding(
        "exploding gradient", name, history.now.step, ratios[name], limit.exploding, cause, cure, "error", action=action
    )


def initialization(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Weights of the wrong scale, seen in the very first step: sec. 9.3, item 2, and sec. 9.5, item 1."""
    if not history.at_start:
        return
    now = history.now
    found = next(_zero(now), None) or next(_scale(now, limit), None) or next(_spread(now, limit), None)
    if found is not None:
        name, value, threshold, cause = found
        yield Finding("bad initialization", name, now.step, value, threshold, cause, INIT, "error", action="init")


def _zero(now: Reading) -> Iterator[tuple[str, float, float, str]]:
    for layer in now.layers.values():
        # the last layer of a branch that begins as the identity is 0, and has a gradient; and what is added, such as
        # positions, or scales has no units that could learn the same
        if layer.weight_norm == 0 and not layer.grad_norm and layer.activation_mean is not None:
            yield layer.name, 0.0, 0.0, "all weights are 0, so that its units learn the same, or nothing"


def _scale(now: Reading, limit: Thresholds) -> Iterator[tuple[str, float, float, str]]:
    """The layer whose weights change the scale of the signal most: that of the error, or for the first of the input."""
    layers = list(now.layers.values())
    factors = {after.name: before.weight_factor for before, after in itertools.pairwise(layers)}
    # a normalisation behind them takes the scale of weights out again
    normed = {layer.name for layer, after in itertools.pairwise(layers) if "Norm" in after.kind}
    if layers and now.input is not None and layers[0].activation_var is not None:
        size = math.hypot(now.input.mean, now.input.std)
        if size > 0 and layers[0].activation not in SATURATING:
            # the input's scale is divided out; a rectifier takes less than half
            factors = {layers[0].name: math.sqrt(layers[0].activation_var) / size, **factors}
    known = {name: f for name, f in factors.items() if f is not None and 0 < f < math.inf and name not in normed}
    if not known:
        return
    name = max(known, key=lambda each: abs(math.log(known[each])))
    low, high = limit.weight_factor_low, limit.weight_factor_high
    if not low <= known[name] <= high:
        large = known[name] > high
        cause = f"its weights are too {'large' if large else 'small'}: they change the signal {known[name]:.2g} times"
        yield name, known[name], high if large else low, cause


def _spread(now: Reading, limit: Thresholds) -> Iterator[tuple[str, float, float, str]]:
    """Activations that fade or grow from layer to layer."""
    spreads = {x.name: math.sqrt(x.activation_var) for x in hidden(now) if x.activation_var}
    spreads = {name: spread for name, spread in spreads.items() if math.isfinite(spread)}
    if len(spreads) < 2:
        return
    ratio = max(spreads.values()) / min(spreads.values())
    if ratio > limit.activation_ratio:
        name = list(spreads)[-1]
        grows = max(spreads, key=lambda each: spreads[each]) == name
        cause = f"activations {'grow' if grows else 'fade'} {ratio:.2g} times from layer to layer"
        yield name, ratio, limit.activation_ratio, cause


def _blocked(history: History) -> bool:
    """Whether, in the first steps of a run, the signal grows from nothing, as that of a head that began as 0."""
    first = history.first.layers.values()
    dead = any(x.dead_units and x.dead_units == x.units for x in first)
    return not dead and history.span <= UNFOLDING and any(x.signal_norm == 0 for x in first) and not history.first.step


def _live(now: Reading) -> list[LayerReading]:
    """Layers with a signal, those from the last dead one on: that nothing passes a dead layer is no vanishing."""
    layers = signals(now)
    dead = [n for n, x in enumerate(layers) if not x.signal_norm]
    return layers[dead[-1] + 1 :] if dead else layers


def _ratios(layers: list[LayerReading]) -> dict[str, float]:
    """|dz| of each layer over that of the last."""
    if len(layers) < 2 or not layers[-1].signal_norm:
        return {}
    return {x.name: (x.signal_norm or 0.0) / layers[-1].signal_norm for x in layers[:-1]}


def _factors(layers: list[LayerReading], name: str) -> tuple[float, float]:
    """Logarithms of both products from this layer to the last: of the weights' and of the derivatives' factors."""
    names = [x.name for x in layers]
    passed = layers[names.index(name) : -1]
    weights = [math.log(x.weight_factor) for x in passed if x.weight_factor]
    derivatives = [math.log(x.derivative_factor) for x in passed if x.derivative_factor]
    return sum(weights), sum(derivatives)
