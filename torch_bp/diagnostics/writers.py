"""Where readings go: TensorBoard, whatever else has `add_scalar`, and a file of lines beside it.

Tags group cards by their first part. There are at most `MOST` scalars: what has more layers shows some of them as
scalars, evenly chosen, and all of them in the pictures, a row a layer and a column a reading.

    loss/train loss/val lr/<group> grad/total nonfinite/forward nonfinite/backward nonfinite/weight noise/scale
    clip/rate decrease/predicted decrease/achieved delta/<layer> update_ratio/<layer> weight/<layer> dead/<layer>
    gradcheck/<layer>
    signals/picture dead/picture    histograms: activations/<layer> errors/<layer>    texts: by their own tags

A writer that fails does not stop the training: it warns once, and is tried again with the next reading.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torch_bp.diagnostics.picture import heat_map
from torch_bp.diagnostics.reading import Histogram, Reading
from torch_bp.diagnostics.reading_file import READINGS, JsonLines
from torch_bp.diagnostics.tags import OF_LAYER, OF_RUN

MOST = 100  # scalars of a run
_PICTURE_EVERY = 20  # readings
_PICTURES = {  # by tag: which numbers, and what they are
    "signals/picture": (0, "log10 of the error signal of each layer"),
    "dead/picture": (1, "share of dead units of each layer"),
}
_COLUMNS = 1600  # of a picture; then every second one is dropped
_logger = logging.getLogger(__name__)

_BASE = 16  # scalars that are not of layers, at most
_LAYOUT = {
    "training": {
        "loss": ["Multiline", ["loss/train", "loss/val"]],
        "error signals (see on a logarithmic axis)": ["Multiline", ["delta/.*"]],
        "updates over weights": ["Multiline", ["update_ratio/.*"]],
    }
}


class Scalars:
    """Writes to an object with `add_scalar`, and pictures, histograms and texts if it takes them as TensorBoard does.

    Args:
        open: returns the object; called again after it has failed, if `owned`.
        owned: it is closed in the end.
        tags: other names for tags.
    """

    def __init__(self, open: Callable[[], Any], owned: bool, tags: Mapping[str, str]) -> None:
        self._open, self._owned, self._tags = open, owned, tags
        self._writer: Any = None
        self._laid_out = False
        self._names: list[str] | None = None  # of layers that are shown as scalars
        self._rows: list[str] = []
        self._columns: list[tuple[int, list[float], list[float]]] = []  # step, and numbers of each layer
        self._dying: set[str] = set()  # layers that have had a dead unit: others have no curve of them
        self._drawn = self._written = 0
        self._step = 0

    def write(self, reading: Reading) -> None:
        self._step = reading.step
        self._collect(reading)
        writer = self._ready()
        if not self._laid_out and hasattr(writer, "add_custom_scalars"):
            layout = {
                c: {n: [k, [self._tag(t) for t in tags]] for n, (k, tags) in of.items()} for c, of in _LAYOUT.items()
            }
            writer.add_custom_scalars(layout)
        self._laid_out = True
        for tag, value in self._scalars(reading):
            writer.add_scalar(self._tag(tag), value, reading.step)
        if hasattr(writer, "add_histogram_raw"):
            for layer in reading.layers.values():
                _add_histogram(writer, f"activations/{_shown(layer.name)}", layer.histogram, reading.step)
                _add_histogram(writer, f"errors/{_shown(layer.name)}", layer.signal_histogram, reading.step)
        self._written += 1
        if self._written % _PICTURE_EVERY == 0:
            self._draw()

    def text(self, tag: str, markdown: str, step: int) -> None:
        if hasattr(writer := self._ready(), "add_text"):
            writer.add_text(self._tag(tag), markdown, step)

    def hparams(self, hparams: dict[str, Any], metrics: dict[str, float]) -> None:
        if hasattr(writer := self._ready(), "add_hparams"):
            known = {
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in hparams.items()
            }
            writer.add_hparams(known, metrics, run_name=".", global_step=self._step)

    def fail(self) -> None:
        """What has failed may not recover: take a new one, if it is ours."""
        if self._owned:
            self._writer = None
            self._laid_out = False

    def close(self) -> None:
        if self._written > self._drawn:
            self._draw()
        if self._writer is None:
            return
        if self._owned:
            self._writer.close()
        elif hasattr(self._writer, "flush"):
            self._writer.flush()

    def _ready(self) -> Any:
        if self._writer is None:
            self._writer = self._open()
        return self._writer

    def _tag(self, tag: str) -> str:
        return self._tags.get(tag, tag)

    def _scalars(self, reading: Reading) -> list[tuple[str, float]]:
        layers = list(reading.layers.values())
        found: list[tuple[str, float | None]] = [(tag, getattr(reading, field)) for tag, field in OF_RUN.items()]
        for what in ("forward", "backward", "weight"):
            counted = [getattr(layer, what) for layer in layers]
            found.append((f"nonfinite/{what}", sum(c.nan + c.inf for c in counted if c is not None)))
        found += [(f"lr/{number}", rate) for number, rate in enumerate(reading.lr[: _BASE - len(found)])]
        self._dying |= {name for name, layer in reading.layers.items() if layer.dead_units}
        for family, field in OF_LAYER.items():
            names = [name for name in self._shown_layers(reading) if family != "dead" or name in self._dying]
            found += [(f"{family}/{_shown(name)}", getattr(reading.layers[name], field)) for name in names]
        checked = [*self._shown_layers(reading), *(set(reading.gradient_errors) - set(reading.layers) - {"loss"})]
        found += [(f"gradcheck/{_shown(name)}", reading.gradient_errors.get(name)) for name in ("loss", *checked)]
        return [(tag, float(value)) for tag, value in found if value is not None]

    def _shown_layers(self, reading: Reading) -> list[str]:
        if self._names is None:
            names = list(reading.layers)
            families = len(OF_LAYER) + bool(reading.gradient_errors)
            room = (MOST - _BASE) // families - bool(reading.gradient_errors)  # one more for the loss
            if len(names) > room:
                names = [names[i] for i in np.linspace(0, len(names) - 1, room).round().astype(int)]
            self._names = names
        return [name for name in self._names if name in reading.layers]

    def _collect(self, reading: Reading) -> None:
        if not self._rows:
            self._rows = list(reading.layers)
        layers = [reading.layers.get(name) for name in self._rows]
        signals = [math.nan if layer is None else _log10(layer.signal_norm) for layer in layers]
        dead = [
            math.nan if layer is None or layer.dead_units is None else layer.dead_units / (layer.units or 1)
            for layer in layers
        ]
        self._columns.append((reading.step, signals, dead))
        if len(self._columns) > _COLUMNS:
            self._columns = self._columns[::2]

    def _draw(self) -> None:
        self._drawn = self._written
        if not hasattr(writer := self._ready(), "add_image") or not self._rows:
            return
        steps, *numbers = zip(*self._columns)
        names = list(map(_shown, self._rows))
        for tag, (which, title) in _PICTURES.items():
            values = np.array(numbers[which], dtype=float).T
            if not np.isnan(values).all() and (tag != "dead/picture" or self._dying):
                writer.add_image(self._tag(tag), heat_map(values, names, steps, title), self._step, dataformats="HWC")


class Output:
    """All that readings are written to; none of it may stop the training."""

    def __init__(self, sinks: list[Any]) -> None:
        self._sinks = sinks
        self._warned: set[int] = set()

    def write(self, reading: Reading) -> None:
        self._each("write", reading)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._each("text", tag, markdown, step)

    def hparams(self, hparams: dict[str, Any], metrics: dict[str, float]) -> None:
        self._each("hparams", hparams, metrics)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *args: Any) -> None:
        for number, sink in enumerate(self._sinks):
            if not hasattr(sink, method):
                continue
            try:
                getattr(sink, method)(*args)
            except Exception as error:
                if hasattr(sink, "fail"):
                    sink.fail()
                if number not in self._warned:
                    self._warned.add(number)
                    _logger.warning(
                        "watch: writing has failed and is tried again with each reading; training goes on. %s: %s",
                        type(error).__name__,
                        error,
                    )


def open_output(output: Any, tags: dict[str, str]) -> Output:
    """What `output` of `watch` names.

    Raises:
        TypeError: it is no folder, and has no `add_scalar`.
        ModuleNotFoundError: a folder, and TensorBoard is not installed.
    """
    if output is None:
        return Output([])
    if isinstance(output, str | os.PathLike):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"watch: output must be None or have add_scalar where TensorBoard is missing, got {output} ({error}). "
                'Remedy: pip install "torch_bp[tensorboard]"'
            ) from error

        folder = Path(output)
        return Output([Scalars(lambda: SummaryWriter(str(folder)), True, tags), JsonLines(folder / READINGS)])
    if not callable(getattr(output, "add_scalar", None)):
        raise TypeError(
            f"watch: output must be a folder or have add_scalar, got {type(output).__name__}. Name a folder, or pass "
            "a torch.utils.tensorboard.SummaryWriter."
        )
    sinks: list[Any] = [Scalars(lambda: output, False, tags)]
    if isinstance(log_dir := getattr(output, "log_dir", None), str | os.PathLike):
        sinks.append(JsonLines(Path(log_dir) / READINGS))
    return Output(sinks)


def _add_histogram(writer: Any, tag: str, histogram: Histogram | None, step: int) -> None:
    if histogram is None or not (count := sum(histogram.counts)):
        return
    edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
    writer.add_histogram_raw(
        tag,
        min=histogram.low,
        max=histogram.high,
        num=count,
        sum=histogram.mean * count,
        sum_squares=histogram.square_mean * count,
        bucket_limits=edges[1:].tolist(),
        bucket_counts=list(histogram.counts),
        global_step=step,
    )


def _shown(name: str) -> str:
    return name or "model"


def _log10(value: float | None) -> float:
    if value is None or math.isnan(value):
        return math.nan if value is None else math.inf
    return math.log10(max(value, 1e-45))
