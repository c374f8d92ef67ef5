"""Rules for what goes in and what comes out: inputs, labels, and an output that does not fit its loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.history import History, classes
from torch_bp.diagnostics.thresholds import Thresholds

_CHANCE = 1e-6
_DEVIATIONS = 5.0  # by which the changes of labels must fall short: once in millions of shuffled batches


def unscaled_input(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Inputs that are far from mean 0 and variance 1, for which initial weights are made."""
    values, layers = history.now.input, list(history.now.layers.values())
    if values is None or not layers or not layers[0].kind.startswith(("Linear", "Conv", "Lazy", "MLP")):
        return
    size = math.hypot(values.mean, values.std)
    if not math.isfinite(size) and history.now.input_finite is not None and history.now.input_finite.ok:
        size = math.inf  # no value is, but squares are
    elif not math.isfinite(size):
        return
    if limit.input_low <= size <= limit.input_high:
        return
    high = size > limit.input_high
    yield Finding(
        "unscaled input",
        layers[0].name,
        history.now.step,
        size,
        limit.input_high if high else limit.input_low,
        f"inputs have mean {values.mean:.3g} and standard deviation {values.std:.3g}",
        "standardize them by the training data: x = (x - x.mean(0)) / x.std(0)",
        action="standardize",
    )


def not_shuffled(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Batches of one class, or sorted ones: with n examples of which a share p is of the commonest class, a shuffled
    batch has at least 2 p (1 - p) (n - 1) neighbours that differ, in the mean.
    """
    del limit  # by chance alone
    found = history.now.labels
    if found is None:
        return
    number = classes(history.now) or 2
    if found.classes == 1:
        changes, least = 0.0, 1.0
        if not _all_alike(history, number):
            return
        which = "" if found.commonest is None else f", {found.commonest}"
        cause = f"all {found.count} labels of the batch are the same{which}: the data is sorted, or nearly all of one "
        cause += "class"
    else:
        changes, share = found.changes * (found.count - 1), found.largest_share
        expected = 2 * share * (1 - share) * (found.count - 1)
        least = expected - _DEVIATIONS * math.sqrt(expected)
        if changes >= least:
            return
        cause = f"labels of the batch change {changes:.0f} times from one to the next, not {expected:.0f} times: "
        cause += "the data is sorted"
    yield Finding(
        "data not shuffled",
        "",
        history.now.step,
        changes,
        least,
        cause,
        "DataLoader(dataset, batch_size, shuffle=True)",
        action="shuffle",
    )


def _all_alike(history: History, number: int) -> bool:
    """Whether all batches so far are of one class each, and too many for it to be chance, were they shuffled.

    A large class explains batches of that class, not of two.
    """
    readings = {reading.step: reading for reading in (*history.start, history.now)}
    batches = [reading.labels for reading in readings.values() if reading.labels is not None]
    several = len({labels.commonest for labels in batches}) > 1
    largest = 0.8 if number == 2 and not several else 0.5  # a class as large as that is nothing unusual
    count = sum(labels.count for labels in batches)
    return all(labels.classes == 1 for labels in batches) and largest**count < _CHANCE


def output_of_loss(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Softmax or sigmoid before a loss that applies it itself (eq. 4 and 5), or probabilities where it takes logs."""
    del limit  # a matter of yes or no
    now = history.now
    last = list(now.layers.values())[-1] if now.layers else None
    probabilities = last is not None and last.activation == "Softmax"
    number = classes(now)
    output, loss_function = now.output, now.loss_function
    if output is not None and number is not None:
        bounded = output.min >= 0 and output.max <= 1
        probabilities = bounded and abs(output.mean * number - 1) < 1e-3
    sigmoid = last is not None and last.activation == "Sigmoid"
    layer = last.name if last is not None else ""
    if sigmoid and loss_function in ("BCEWithLogitsLoss", "binary_cross_entropy_with_logits"):
        yield Finding(
            "sigmoid before its loss",
            layer,
            now.step,
            2.0,
            1.0,
            "the loss applies the sigmoid again, eq. 5",
            "leave the sigmoid out: nn.BCEWithLogitsLoss()(logits, target)",
            "error",
            action="no softmax",
        )
    if not probabilities or now.loss is None or number is None:
        return
    if loss_function in ("NLLLoss", "nll_loss") or now.loss < 0:
        cause = "the loss takes log-probabilities and is given probabilities, eq. 4"
        cure, action = "nn.LogSoftmax(dim=1) instead of nn.Softmax(dim=1)", "log softmax"
    elif loss_function in ("CrossEntropyLoss", "cross_entropy") or _of_probabilities(now.loss, number):
        cause = "cross-entropy applies softmax a second time, so that no loss below "
        cause += f"{_least(number):.2f} can be reached, eq. 4"
        cure, action = "leave the softmax out: nn.CrossEntropyLoss()(logits, target)", "no softmax"
    else:
        return
    yield Finding(
        "softmax before its loss",
        layer,
        now.step,
        now.loss,
        _least(number),
        cause,
        cure,
        "error",
        action=action,
    )


def _least(number: int) -> float:
    """Cross-entropy of one-hot probabilities that are right, taken for logits."""
    return math.log(1 + (number - 1) / math.e)


def _of_probabilities(loss: float, number: int) -> bool:
    """True if the loss can be the cross-entropy of probabilities taken for logits."""
    return _least(number) <= loss <= math.log(math.e + number - 1)
