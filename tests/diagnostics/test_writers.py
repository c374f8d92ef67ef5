"""What arrives in TensorBoard's event file, read back, and what happens when writing fails."""

import io
import logging
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torch_bp import nn, optim, watch
from torch_bp.diagnostics import LayerReading, Reading, read_readings
from torch_bp.diagnostics.picture import BROKEN, MISSING, WIDTH, colours, heat_map
from torch_bp.diagnostics.writers import open_output

_drawn = torch.Generator().manual_seed(1)  # whether a unit is dead depends on it
X, Y = torch.randn(12, 5, generator=_drawn), torch.randint(0, 3, (12,), generator=_drawn)


def train(output, steps=25, sizes=(5, 8, 7, 3), dead=False, **options):
    torch.manual_seed(0)
    model, loss_fn = nn.MLP(sizes), nn.CrossEntropyLoss()
    for layer in model if dead else ():
        torch.nn.init.constant_(getattr(layer, "bias", torch.empty(0)), -100.0)
    optimizer = optim.Adam(model.parameters())
    options = {"every": 1, "budget": None, "level": "full", **options}
    monitor = watch(model, optimizer, output, loss_fn=loss_fn, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(X), Y).backward()
        optimizer.step()
    return monitor


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    found.Reload()
    return found


def test_an_event_file(tmp_path):
    monitor = train(tmp_path)
    monitor.validation(0.5)
    monitor.text("verdict", "**all well**")
    monitor.close(metrics={"accuracy": 0.75}, hparams={"lr": 0.001, "sizes": [5, 8]})
    found = events(tmp_path)
    tags = found.Tags()
    scalars = set(tags["scalars"])
    assert scalars >= {"loss/train", "lr/0", "grad/total", "delta/0", "update_ratio/2", "weight/4"}
    assert scalars >= {"nonfinite/forward", "nonfinite/backward", "nonfinite/weight", "accuracy"}
    written = [(e.step, e.value) for e in found.Scalars("delta/2")]
    assert written == [(r.step, pytest.approx(r.layers["2"].signal_norm)) for r in monitor.readings]
    assert set(tags["images"]) == {"signals/picture"}  # nothing is dead
    assert not any(tag.startswith("dead/") for tag in scalars)
    assert [e.step for e in found.Images("signals/picture")] == [19, 24]
    assert set(tags["histograms"]) >= {"activations/0", "errors/4"}
    first = found.Histograms("activations/0")[0].histogram_value
    assert first.num == 12 * 8
    texts = [t for t in tags["tensors"] if t.startswith("verdict")]
    assert b"all well" in found.Tensors(texts[0])[0].tensor_proto.string_val[0]
    layout = found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"loss/val" in layout
    assert b"delta/.*" in layout
    assert len(found.Tensors("custom_scalars__config__")) == 1
    assert any(
        "hparams" in plugin
        for plugin in found.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name.split()
    )
    kept = list(read_readings(tmp_path / "readings.jsonl"))
    assert [r.step for r in kept] == list(range(25))
    assert kept[3] == monitor.readings[3] or math.isnan(kept[3].input.min)


def test_few_scalars_of_many_layers(tmp_path):
    train(tmp_path, 2, (5, *[4] * 60, 3), dead=True).close()
    tags = events(tmp_path).Tags()
    assert 90 <= len(tags["scalars"]) <= 100
    assert {"delta/0", "delta/120"} <= set(tags["scalars"])
    assert "signals/picture" in tags["images"]


def test_other_names_and_every_nth(tmp_path):
    monitor = train(tmp_path, 11, tags={"loss/train": "train_loss"}, write_every=5)
    monitor.close()
    assert [e.step for e in events(tmp_path).Scalars("train_loss")] == [0, 5, 10]
    assert [r.step for r in monitor.readings] == list(range(11))


class Minimal:
    def __init__(self):
        self.seen, self.broken = {}, False

    def add_scalar(self, tag, value, step):
        if self.broken:
            raise OSError("No space left on device")
        self.seen.setdefault(tag, []).append(step)


def test_anything_with_add_scalar_that_fails_once_in_a_while(caplog):
    writer, when = Minimal(), iter([False, True, True, False])
    steps = []

    def before(reading):
        steps.append(reading.step)
        writer.broken = next(when, False)

    with caplog.at_level(logging.WARNING):
        train(writer, 5, on_reading=before).close()
    assert steps == [0, 1, 2, 3, 4]
    assert writer.seen["loss/train"] == [0, 1, 4]
    assert [r.getMessage() for r in caplog.records if "writing has failed" in r.getMessage()] == [
        "watch: writing has failed and is tried again with each reading; training goes on. "
        "OSError: No space left on device"
    ]


def test_a_writer_of_the_user_is_not_closed(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        train(writer, 2).close()
        writer.add_scalar("mine", 1.0, 0)
    assert {"mine", "loss/train"} <= set(events(tmp_path).Tags()["scalars"])
    assert len(list(read_readings(tmp_path / "readings.jsonl"))) == 2


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        monitor = train(tmp_path / "file" / "logs", 3)
        monitor.close()
    assert len([r for r in caplog.records if "writing has failed" in r.getMessage()]) == 2
    assert len(monitor.readings) == 3


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("length", [15, 100_000])
def test_a_line_that_was_cut_off_is_written_over(tmp_path, monkeypatch, same, length):
    from torch_bp.diagnostics.reading_file import JsonLines

    lines = JsonLines(tmp_path / "readings.jsonl")
    lines.write(Reading(0))

    def fills_the_disk(*_):
        with open(lines.path, "ab") as file:
            file.write(b'{"step": 1, "lo'.ljust(length))
        raise OSError(28, "No space left on device")

    class File(io.BytesIO):
        write = fills_the_disk

    with monkeypatch.context() as patch:
        patch.setattr(type(lines.path), "open", lambda *_: File())
        with pytest.raises(OSError, match="No space left"):
            lines.write(Reading(1))
    if not same:
        lines = JsonLines(lines.path)  # as of a run that goes on after it was killed
    lines.write(Reading(2))
    lines.write(Reading(3))
    assert list(read_readings(lines.path)) == [Reading(0), Reading(2), Reading(3)]


def test_colours():
    drawn = colours(np.array([[0.0, 1.0, np.nan], [0.5, np.inf, 0.25]]), 0.0, 1.0)
    assert tuple(drawn[0, 2]) == MISSING
    assert tuple(drawn[1, 1]) == BROKEN
    lightness = [int(drawn[y, x].astype(int).sum()) for y, x in ((0, 0), (1, 2), (1, 0), (0, 1))]
    assert lightness == sorted(lightness)


def test_a_picture_has_all_layers_and_its_scale():
    values = np.linspace(-9, -1, 36).reshape(3, 12)
    drawn = heat_map(values, ["0", "block.linear", "x" * 60], range(0, 120, 10), "signals")
    assert drawn.shape[1:] == (WIDTH, 3)
    shades = {tuple(pixel) for pixel in drawn.reshape(-1, 3)}
    assert {tuple(pixel) for pixel in colours(values, -9, -1).reshape(-1, 3)} <= shades
    renamed = heat_map(values, ["0", "block.linear", "y" * 60], range(0, 120, 10), "signals")
    assert renamed.shape == drawn.shape
    assert (renamed != drawn).any()
    assert (heat_map(values, ["0", "block.linear", "x" * 60], range(0, 60, 5), "signals") != drawn).any()


@pytest.mark.parametrize("values", [np.zeros((2, 5000)), np.full((1, 2), np.nan), np.ones((600, 1)), np.ones((3, 3))])
def test_pictures_of_any_size(values):
    drawn = heat_map(values, [f"layer{n}" for n in range(len(values))], range(values.shape[1]), "")
    assert drawn.shape[1] == WIDTH
    assert drawn.shape[0] <= 2500


def test_units_that_die_have_a_curve_from_then_on(tmp_path):
    layer = LayerReading("0", "Linear", units=4, dead_units=0)
    output = open_output(tmp_path, {})
    for step, dead in enumerate((0, 0, 3, 0)):
        output.write(Reading(step, layers={"0": replace(layer, dead_units=dead)}))
    output.close()
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("dead/0")] == [(2, 3.0), (3, 0.0)]
    assert "dead/picture" in found.Tags()["images"]


def test_without_tensorboard_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"watch: output .* pip install \"torch_bp\[tensorboard\]\""):
        watch(nn.Linear(2, 2), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
