"""Rules for the course of the loss, sec. 10.2, items 1 and 4."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.history import History, classes, update_ratios
from torch_bp.diagnostics.remedy import INIT
from torch_bp.diagnostics.thresholds import Thresholds

NOISE = 0.2  # by which the least of many losses of batches may lie below their mean


def initial_loss(history: History, limit: Thresholds) -> Iterator[Finding]:
    """A classifier that knows nothing has a loss of log(classes), eq. 4 of equal probabilities; not far more."""
    number, loss = classes(history.now), history.now.loss
    if not history.at_start or number is None or loss is None or not math.isfinite(loss):
        return
    excess = loss - math.log(number)
    if excess > limit.initial_loss:
        cause = f"the first loss is {loss:.3g}, that of chance log({number}) = {math.log(number):.3g}"
        name = list(history.now.layers)[-1]
        yield Finding(
            "bad initialization",
            name,
            history.now.step,
            excess,
            limit.initial_loss,
            f"{cause}: outputs too large",
            INIT,
            action="init",
        )


def not_falling(history: History, limit: Thresholds) -> Iterator[Finding]:
    """After some tens of steps the loss is where it was. A loss that has fallen once is no longer judged by this."""
    start, latest = history.median_loss(5), history.median_loss(-10)
    if history.span < limit.stuck_steps or len(history.losses(-10)) < 10 or not start > 0:
        return
    decrease = 1 - latest / start
    if max(decrease, 1 - history.best_loss / start) >= limit.stuck_decrease:
        return
    cause = f"in {history.span} steps the loss fell by {decrease:.1%}"
    cure = "a rate found by torch-bp lr-find CONFIG; check too that inputs belong to their targets"
    yield Finding(
        "loss does not fall", "", history.now.step, decrease, limit.stuck_decrease, cause, cure, action="lr*10"
    )


def unrelated_labels(history: History, limit: Thresholds) -> Iterator[Finding]:
    """A classifier whose weights move and whose loss stays that of chance, log(classes), from where it falls at once
    if labels have to do with inputs. It is judged by twice the steps, as slow runs begin like this.
    """
    number, latest = classes(history.now), history.median_loss(-10)
    if number is None or history.span < 2 * limit.stuck_steps or len(history.losses(-10)) < 10:
        return
    level = min(latest, history.best_loss + NOISE) / math.log(number)
    if level < limit.chance or max(update_ratios(history.now).values(), default=0) < limit.update_ratio_low:
        return
    cause = (
        f"after {history.span} steps the loss, {latest:.3g}, is that of chance, log({number}) = {math.log(number):.3g}"
        ", though weights move: labels do not belong to their inputs, or say nothing that this model could learn"
    )
    cure = "check that x[i] belongs to y[i]: index both with the same permutation"
    yield Finding("labels unrelated to inputs", "", history.now.step, level, limit.chance, cause, cure)


def plateau(history: History, limit: Thresholds) -> Iterator[Finding]:
    """The loss has fallen, and no longer does, far from 0."""
    window = limit.plateau_steps
    if history.span < 1.5 * window:
        return
    half = history.now.step - window // 2
    late, both = history.losses_since(half), history.losses_since(history.now.step - window)
    early = both[: len(both) - len(late)]
    start = history.median_loss(5)
    if min(len(late), len(early)) < 10 or not start > 0:
        return
    before, after = statistics.fmean(early), statistics.fmean(late)
    # what the mean of so many losses may be off by, so that a slow fall is not lost in their noise
    noise = math.sqrt(statistics.fmean([(loss - after) ** 2 for loss in late]) / (len(late) - 1))
    if (
        not limit.plateau_level * start < after < 0.98 * start
        or before - after > limit.plateau_decrease * before + noise
    ):
        return
    cause = f"the loss stays at {after:.3g}, {after / start:.0%} of its first value, for {window} steps"
    cure = "a wider model, or torch_bp.optim.lr_scheduler.ReduceLROnPlateau"
    yield Finding("plateau", "", history.now.step, 1 - after / before, limit.plateau_decrease, cause, cure, "info")


def overfitting(history: History, limit: Thresholds) -> Iterator[Finding]:
    """The validation loss rises while the training loss falls, sec. 10.2, item 4."""
    losses = [loss for _, loss in history.validations if math.isfinite(loss)]
    if len(losses) < 4 or history.now.validation_loss is None:
        return
    best = min(losses)
    rise = limit.overfitting_rise * history.median_loss(5)  # against what a model has that knows nothing
    if best <= 0 or not min(losses[-3:]) > max(limit.overfitting * best, best + rise):
        return
    step = next(step for step, loss in history.validations if loss == best)
    before = [r.loss for r in history.latest if r.loss is not None and r.step <= step][-10:]
    if not before or history.median_loss(-10) >= statistics.median(before):
        return
    cause = f"the validation loss has risen from {best:.3g} at step {step} to {losses[-1]:.3g}, the training loss fell"
    cure = f"stop at step {step} (EarlyStopping), or weight_decay=1e-2 in AdamW, or nn.Dropout(0.5)"
    yield Finding("overfitting", "", history.now.step, losses[-1] / best, limit.overfitting, cause, cure)
