"""What one recorded training step says: plain numbers, after the one copy to the host.

A layer l is a linear map with the activation that follows it, eq. 1 and 2: z = W a_before + b, a = f(z). Its error
signal is dz, the gradient of the loss with respect to z, sec. 3.1, and da the one with respect to a. Norms are
2-norms over everything: |dz| over all examples and units of the batch. Gradients are those that the optimizer is given:
averaged over the batch as the loss is, summed over the micro-batches of an accumulation, and without the factor of a
`GradScaler`.

`None` stands for what has not been measured: at this level of detail, for this kind of layer, or because nothing of it
was there in the step, as with a frozen layer's gradient. A number that has been measured may be NaN or infinite.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from torch_bp._json import plain
from torch_bp.diagnostics.layer_reading import DeadUnit, Finiteness, Histogram, LayerReading, Spread

__all__ = ["DeadUnit", "Finiteness", "Histogram", "Labels", "LayerReading", "Reading", "Spread"]
VERSION = 1  # of the lines that `to_json` writes
PLACES = 8  # of examples that are not finite
_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class Labels:
    """Targets that are class indices, of the step's last micro-batch.

    `count` of them, `classes` different ones, and the share of the commonest.

    Attributes:
        changes: share of neighbours in the batch with different labels; near 0 the data is sorted, not shuffled.
        commonest: the commonest class, the first of several.
    """

    count: int
    classes: int
    largest_share: float
    changes: float
    commonest: int | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One training step.

    Attributes:
        step: optimizer steps before this one, from 0.
        epoch: as the loop has said it.
        loss: of the step, mean over its micro-batches.
        validation_loss: the last one that was reported, if it is new since the reading before.
        lr: of each parameter group.
        grad_norm: of all watched parameters together, before any clipping that the optimizer does itself, after
            clipping by `clip_grad_norm_`.
        grad_norm_before: before clipping, where the monitor was told of it.
        clipped: whether clipping changed the gradients in this step.
        clip_rate: share of steps clipped so far.
        batch: examples of the step.
        noise_scale: simple noise scale of McCandlish et al. (2018): the batch size from which on larger batches help
            little.
        per_example: norms of the gradients of single examples, over the layers that tell them.
        predicted_decrease: -grad . update, by how much the loss would fall if it were linear.
        achieved_decrease: loss before minus loss after the step on the same batch, where a loop tells it.
        layers: by name, in the order of the forward pass.
        unknown: layers of which only the parameters can be watched, with the reason.
        input: values of the model's first input, and `input_finite` how many of them are finite.
        output: values of the first argument of the loss function, else of what the model returned, in the last
            micro-batch.
        loss_function: name of the loss function, or of its class.
        labels: class indices among the arguments of the loss function.
        carried: norm of the gradients that lay there when the first backward pass of the step began: 0 where they had
            been cleared, and in a `TrainStep`, which writes over them. None for step 0, and where nothing told when
            that was.
        unused: parameters that are to be trained and had no gradient in this step, as of a layer that was not called.
        frozen: parameters with `requires_grad=False`.
        gradient_errors: relative errors of the gradients, by layer and of the "loss", where they were checked in this
            step: `check_every` of `watch`; those that rounding hides are left out.
        gradient_tolerance: the largest of these that is all right in this precision.
        refused: True, else None, for a batch that a `TrainStep` did not take, as its loss or gradients were not finite:
            nothing was updated, and the step has another reading if there was another batch for it.
        seconds: how long a step takes that is not recorded: the median of the latest of them.
        share: what the monitor adds to that, 0.02 for 2 %, as far as it has measured itself.
    """

    step: int
    epoch: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    lr: tuple[float, ...] = ()
    grad_norm: float | None = None
    grad_norm_before: float | None = None
    clipped: bool | None = None
    clip_rate: float | None = None
    batch: int | None = None
    noise_scale: float | None = None
    per_example: Spread | None = None
    predicted_decrease: float | None = None
    achieved_decrease: float | None = None
    layers: Mapping[str, LayerReading] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
    input: Spread | None = None
    input_finite: Finiteness | None = None
    output: Spread | None = None
    loss_function: str | None = None
    labels: Labels | None = None
    carried: float | None = None
    unused: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    gradient_errors: Mapping[str, float] = field(default_factory=dict)
    gradient_tolerance: float | None = None
    refused: bool | None = None
    seconds: float | None = None
    share: float | None = None

    @property
    def nonfinite(self) -> list[tuple[str, str]]:
        """Where there was a NaN or an infinity, by layer: "weight", "forward", "backward", in the order of the pass."""
        layers = list(self.layers.values())
        found = [(layer.name, what) for layer in layers for what in ("weight", "forward") if _bad(layer, what)]
        return found + [(layer.name, "backward") for layer in layers[::-1] if _bad(layer, "backward")]

    def to_json(self) -> str:
        """One line; NaN and infinities as the strings that `float` reads, `None` and empty left out."""
        return json.dumps({"version": VERSION, **plain(_present(asdict(self)))}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Reading:
        """The reading of such a line; names that a later version has added are ignored.

        Raises:
            ValueError: the line holds no reading.

        Example:
            >>> line = Reading(3, loss=float("nan"), lr=(0.1,)).to_json()
            >>> line
            '{"version": 1, "step": 3, "loss": "nan", "lr": [0.1]}'
            >>> Reading.from_json(line).loss
            nan
        """
        try:
            reading = _read(cls, json.loads(line))
            if isinstance(reading.step, bool) or not isinstance(reading.step, int) or reading.step < 0:
                raise TypeError(f"step must be a whole number of 0 or more, got {reading.step!r}")
            return reading
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"Reading: line must be what Reading.to_json writes, got {line[:80]!r}. Name a file of readings."
            ) from error


def _bad(layer: LayerReading, what: str) -> bool:
    found = getattr(layer, what)
    return found is not None and not found.ok


_PARTS: dict[str, Any] = {
    "forward": Finiteness,
    "backward": Finiteness,
    "weight": Finiteness,
    "histogram": Histogram,
    "signal_histogram": Histogram,
    "per_example": Spread,
    "input": Spread,
    "input_finite": Finiteness,
    "output": Spread,
    "labels": Labels,
}
_TEXTS = {"name", "kind", "activation", "cause", "unknown", "loss_function"}
_NAMES = {"unused", "frozen"}
_LISTS = {"lr", "counts", "examples"}


def _present(value: Any) -> Any:
    """Without what is absent."""
    if isinstance(value, Mapping):
        return {key: _present(each) for key, each in value.items() if each is not None and each != {} and each != ()}
    return [_present(each) for each in value] if isinstance(value, list | tuple) else value


def _read(cls: type[_Read], values: Mapping[str, Any]) -> _Read:
    known = {each.name for each in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: _read_field(name, value) for name, value in values.items() if name in known})


def _read_field(name: str, value: Any) -> Any:
    if name in _TEXTS:
        return value
    if name in _NAMES:
        return tuple(value)
    if name in _PARTS:
        return _read(_PARTS[name], value)
    if name == "layers":
        return {key: _read(LayerReading, each) for key, each in value.items()}
    if name == "gradient_errors":
        return {key: _number(each) for key, each in value.items()}
    if name == "dead":
        return tuple(_read(DeadUnit, each) for each in value)
    if name in _LISTS:
        return tuple(map(_number, value))
    return _number(value)


def _number(value: Any) -> Any:
    if value is not None and not isinstance(value, int | float | str):
        raise TypeError(f"a number is wanted, got {value!r}")
    return float(value) if isinstance(value, str) else value
