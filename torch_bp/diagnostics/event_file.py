"""Readings out of TensorBoard's event files: the scalars of `watch`, and what loops commonly call their losses.

They say less than `readings.jsonl`: a scalar has no factors, units or activations.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch_bp.diagnostics.reading import LayerReading, Reading
from torch_bp.diagnostics.tags import LOSSES, OF_LAYER, OF_RUN, VALIDATIONS

PATTERN = "events.out.tfevents.*"
_OF_LAYER = {tag: field for tag, field in OF_LAYER.items() if tag != "dead"}  # which says nothing without the width


def read_events(folder: str | Path) -> list[Reading]:
    """The readings of a folder of event files, one a step that has any known scalar, in order.

    Raises:
        ImportError: TensorBoard is not installed.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})  # all of them
    events.Reload()
    tags = events.Tags()[SCALARS]
    steps: dict[int, dict[str, Any]] = defaultdict(lambda: {"layers": defaultdict(dict), "lr": {}})
    named = _names(tags)
    for tag in tags:
        family, _, rest = tag.partition("/")
        for event in events.Scalars(tag):
            values = steps[event.step]
            if tag in named:
                values[named[tag]] = event.value
            elif family in _OF_LAYER:
                values["layers"][rest][_OF_LAYER[family]] = event.value
            elif family == "lr" or tag.startswith("lr-"):  # as Lightning's LearningRateMonitor calls it
                values["lr"][tag] = event.value
    known = {step: values for step, values in steps.items() if len(values) > 2 or any(values.values())}
    return [_reading(step, known[step]) for step in sorted(known)]


def _names(tags: list[str]) -> dict[str, str]:
    """The field of each tag of a run; of several names for one thing the first that is there."""
    named = {tag: field for tag, field in OF_RUN.items() if tag in tags}
    for choices, field in ((LOSSES, "loss"), (VALIDATIONS, "validation_loss")):
        named |= dict.fromkeys([tag for tag in choices if tag in tags][:1], field)
    return named


def _reading(step: int, values: dict[str, Any]) -> Reading:
    layers = {name: LayerReading(name, "unknown", **of) for name, of in values.pop("layers").items()}
    return Reading(step, layers=layers, lr=tuple(values.pop("lr").values()), **values)
