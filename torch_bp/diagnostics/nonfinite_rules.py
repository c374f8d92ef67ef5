"""NaN and infinities, sec. 10.2, item 2: where the first one came from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.history import SATURATING, History
from torch_bp.diagnostics.reading import PLACES, Finiteness, Reading
from torch_bp.diagnostics.remedy import INIT, lower_rate
from torch_bp.diagnostics.thresholds import Thresholds

# Activations that make no NaN of a finite number.
_SAFE = (
    None,
    *SATURATING,
    "ReLU",
    "ReLU6",
    "LeakyReLU",
    "PReLU",
    "ELU",
    "SELU",
    "CELU",
    "GELU",
    "SiLU",
    "Mish",
    "Softplus",
)


@dataclass(frozen=True, slots=True)
class _Origin:
    layer: str
    what: str  # "input", "weight", "forward", "loss", "backward"
    found: Finiteness | None


def nonfinite(history: History, limit: Thresholds) -> Iterator[Finding]:
    """The first origin; what it spreads to later is not named again."""
    del limit
    for reading in history.latest[:-1][::-1]:
        if first_origin(reading) is None:
            break
    else:
        reading = None  # type: ignore[assignment]
    run = [r for r in history.latest if reading is None or r.step > reading.step]
    origin = first_origin(run[0]) if run and first_origin(history.now) is not None else None
    if origin is None:
        return
    skipped = origin.what == "backward" and all(x.update_norm == 0 for x in run[0].layers.values())
    cause, cure, action = _explain(origin, history, run[0].step, None if reading is None else reading.step)
    if skipped:
        cause, cure, action = (
            f"{cause}; the step was skipped",
            "none needed, unless it goes on: GradScaler does this",
            "",
        )
    count = float(origin.found.nan + origin.found.inf) if origin.found is not None else 1.0
    yield Finding(
        "NaN or Inf",
        origin.layer,
        run[0].step,
        count,
        0.0,
        cause,
        cure,
        "info" if skipped else "error",
        last_step=history.now.step,
        action=action,
    )


def first_origin(reading: Reading) -> _Origin | None:
    """Where the first NaN or infinity of this step is: in the order in which a step computes."""
    given, values = reading.input_finite, reading.input
    if given is not None and not given.ok:
        return _Origin("", "input", given)
    if given is None and values is not None and not math.isfinite(values.mean + values.std):
        return _Origin("", "input", None)
    for what in ("weight", "forward"):
        for number, layer in enumerate(reading.layers.values()):
            found = getattr(layer, what)
            if found is not None and not found.ok:
                # finite inputs and weights can overflow in a linear map, and give infinities; not NaN alone
                taken_in = what == "forward" and number == 0 and found.nan and not found.inf and given is None
                return _Origin(layer.name, "input" if taken_in and layer.activation in _SAFE else what, found)
    if reading.loss is not None and not math.isfinite(reading.loss):
        return _Origin("", "loss", None)
    for layer in list(reading.layers.values())[::-1]:
        if layer.backward is not None and not layer.backward.ok:
            return _Origin(layer.name, "backward", layer.backward)
    norm = reading.grad_norm
    return _Origin("", "backward", None) if norm is not None and not math.isfinite(norm) else None


def _explain(origin: _Origin, history: History, step: int, well: int | None) -> tuple[str, str, str]:
    """Cause, cure and what can be tried; `step` is that of the first one, `well` that of the record before it."""
    found, which = origin.found, "values"
    if found is not None:
        which = " and ".join(f"{n} {what}" for n, what in ((found.nan, "NaN"), (found.inf, "infinite")) if n)
        which += f" of {found.count}"
    where = _examples(found)
    if origin.what == "input":
        if origin.layer:
            cause = f"the first layer's outputs have {which} and its weights none: they come with the input"
        else:
            cause = f"the input has {which}{where}"
        return cause, "x = torch.nan_to_num(x), or drop such examples", ""
    if origin.what == "weight":
        return _of_weights(found, history, step, well)
    if origin.what == "forward":
        why = "it overflows" if found is not None and found.inf else "its input and weights are finite"
        return f"the forward pass first has {which} here{where}, {why}", lower_rate(history), "lr*0.1"
    if origin.what == "loss":
        cure = "check the targets, and take a loss on logits: it has no log of 0"
        return "the loss is not finite while all activations are: its targets, or a logarithm of 0", cure, ""
    cure = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), and no sqrt or log of 0 behind this layer"
    return f"the backward pass first has {which} here{where}, all before it is finite", cure, "clip"


def _of_weights(found: Finiteness | None, history: History, step: int, well: int | None) -> tuple[str, str, str]:
    which = " and ".join(what for n, what in ((found.nan, "NaN"), (found.inf, "infinities")) if n) if found else "NaN"
    if step <= history.first.step:
        cure = f"load another checkpoint, or {INIT}"
        return f"the weights have {which}: the run began with them", cure, "init"
    why, cure = "the step before made them", lower_rate(history)
    if well is not None and step - well > 1:  # whatever came with one of these batches was not seen
        why = f"a step after step {well} made them, and was not recorded"
        cure = f"watch(..., every=1, budget=None) to see whether an input brought them; if none did, {cure}"
    return f"the weights have {which}: {why}", cure, "lr*0.1"


def _examples(found: Finiteness | None) -> str:
    """Which examples of the batch hold them, where that is known and says something: not all of them."""
    if found is None or not 0 < len(found.examples) < PLACES:
        return ""
    return f" (example{'s' * (len(found.examples) > 1)} {', '.join(map(str, found.examples))} of the batch)"
