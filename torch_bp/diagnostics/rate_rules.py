"""Rules for the size of steps: learning rate, divergence, clipping (sec. 5.1, 9.5)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.history import History, update_ratios
from torch_bp.diagnostics.remedy import lower_rate
from torch_bp.diagnostics.thresholds import Thresholds

BEYOND = 5.0  # times too high: one step replaces what was there
HOPELESS = 100.0  # times worse than divergence: no second look is needed
START = 100  # steps in which tiny updates are no success


def rate_too_high(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Steps as large as the weights themselves; or half of that, with a loss that has risen."""
    ratios = update_ratios(history.now)
    if not ratios:
        return
    name = max(ratios, key=lambda each: ratios[each])
    ratio, risen = ratios[name], history.median_loss(-3) > 1.2 * history.median_loss(1)
    threshold = limit.update_ratio_high / 2 if risen and history.span > 1 else limit.update_ratio_high
    # the first steps of a run may be too long, for a step or two
    lately = [max(update_ratios(reading).values(), default=0.0) for reading in history.latest[-3:]]
    lasting = len(lately) == 3 and min(lately) > threshold
    at_once = ratio > BEYOND * limit.update_ratio_high
    # of weights that are next to nothing any step is a multiple
    if not (lasting or at_once) or not (history.now.layers[name].weight_norm or 0.0) > 1e-3:
        return
    cause = f"one step changes layer {name} by {ratio:.0%} of its weights{', and the loss rises' if risen else ''}"
    yield Finding(
        "rate too high",
        "",
        history.now.step,
        ratio,
        threshold,
        cause,
        lower_rate(history),
        severity="error" if risen else "warning",
        action="lr*0.1",
    )


def rate_too_low(history: History, limit: Thresholds) -> Iterator[Finding]:
    """No layer moves by more than a ten-thousandth a step, in the start of a run and not in a warm-up."""
    latest = history.latest[-3:]
    # of three steps: one whose gradients are 0, as of a batch without examples, says nothing of the rate
    ratios = [ratio for reading in latest for ratio in update_ratios(reading).values()]
    rates = [max(reading.lr, default=0.0) for reading in latest]
    if not update_ratios(history.now) or len(rates) < 3 or history.span > START or history.now.step > 2 * START:
        return
    # a loss that is next to nothing leaves no gradient to move by
    learned = history.median_loss(-3) < 0.5 * history.median_loss(3)
    warming, decayed = rates[-1] > rates[0], rates[-1] < history.top_lr / 2
    no_gradient = rates[-1] > 0 and all(reading.grad_norm == 0 for reading in latest)
    if learned or warming or decayed or no_gradient or max(ratios) >= limit.update_ratio_low:
        return
    cause = f"no layer changes by more than {max(ratios):.1g} of its weights a step, lr={rates[-1]:g}"
    if rates[-1] == 0:
        cause = "the learning rate is 0"
    yield Finding(
        "rate too low",
        "",
        history.now.step,
        max(ratios),
        limit.update_ratio_low,
        cause,
        f"a learning rate 10 times higher: lr={10 * rates[-1]:g}" if rates[-1] else "set lr, such as lr=1e-3",
        action="lr*10" if rates[-1] else "",
    )


def divergence(history: History, limit: Thresholds) -> Iterator[Finding]:
    """The loss has left its first value behind, upwards: sec. 9.4."""
    first, losses = history.median_loss(1), history.losses(-5)
    if not first > 0 or history.span < 1 or not losses:
        return
    # odd batches, and first steps that are too long, are over after a few steps
    latest = min(losses) if len(losses) == 5 else losses[-1] / HOPELESS
    if latest <= limit.divergence * first:
        return
    latest = losses[-1]
    cause = f"the loss has risen from {first:.3g} to {latest:.3g}"
    yield Finding(
        "divergence",
        "",
        history.now.step,
        latest / first,
        limit.divergence,
        cause,
        lower_rate(history),
        severity="error",
        action="lr*0.1",
    )


def clipped_always(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Clipping in every step: the rate no longer means what it says, as only directions of gradients are left."""
    now = history.now
    if now.clip_rate is None or now.step < limit.clip_steps or now.clip_rate < limit.clip_rate:
        return
    norms = [r.grad_norm_before for r in history.latest[-50:] if r.grad_norm_before is not None]
    norms = [norm for norm in norms if math.isfinite(norm)]
    cure = "raise max_norm of clip_grad_norm_"
    if norms:
        cure += f" to {2 * statistics.median(norms):.2g}, twice the usual norm"
    cause = f"{now.clip_rate:.0%} of all steps were clipped"
    yield Finding("always clipped", "", now.step, now.clip_rate, limit.clip_rate, cause, cure)
