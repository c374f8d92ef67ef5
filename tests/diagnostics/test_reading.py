"""Readings as lines of text and back."""

import math

import pytest

from torch_bp.diagnostics import (
    DeadUnit,
    Finiteness,
    Histogram,
    Labels,
    LayerReading,
    Reading,
    Spread,
    read_readings,
    write_readings,
)

SPREAD = Spread(8, 0.5, 0.25, 0.0, 1.0)
FULL = Reading(
    12,
    epoch=1,
    loss=0.25,
    lr=(0.1, 1e-300),
    clipped=True,
    noise_scale=float("inf"),
    per_example=SPREAD,
    layers={
        "0": LayerReading(
            "0",
            "Linear",
            activation="ReLU",
            units=3,
            grad_norm=-0.0,
            dead=(DeadUnit(2, 4, "bias", 0.1, -1.0, -3.5), DeadUnit(1, 0, "input", 0.0, float("-inf"))),
            dead_units=2,
            histogram=Histogram(-1.0, 1.0, (1, 2, 3), 0.1, 0.2, nan=4, inf=1),
            signal_histogram=Histogram(0.0, 0.0, (0, 0, 0), 0.0, 0.0),
            forward=Finiteness(24, 0, 0),
            backward=Finiteness(24, 2, 0),
            weight=Finiteness(24, 0, 1),
            per_example=SPREAD,
        ),
        "2.inner": LayerReading("2.inner", "Bilinear", backward=Finiteness(3, 0, 3)),
    },
    unknown={"3": "no rule for LSTM"},
    input=SPREAD,
    input_finite=Finiteness(32, 1, 0, (3, 5)),
    output=SPREAD,
    loss_function="MSELoss",
    carried=0.5,
    unused=("0.weight",),
    frozen=("1.weight", "1.bias"),
    gradient_errors={"loss": 1e-9, "0": float("inf"), "2.inner": 0.5},
    gradient_tolerance=2e-2,
    labels=Labels(8, 3, 0.5, 0.75, 2),
)


def test_all_of_a_reading_comes_back():
    line = FULL.to_json()
    assert "\n" not in line
    assert Reading.from_json(line) == FULL
    assert math.copysign(1, Reading.from_json(line).layers["0"].grad_norm) == -1


def test_numbers_that_json_does_not_know():
    back = Reading.from_json(Reading(0, loss=float("nan"), lr=(float("inf"),), grad_norm=float("-inf")).to_json())
    assert math.isnan(back.loss)
    assert (back.lr, back.grad_norm) == ((math.inf,), -math.inf)


def test_where_something_is_not_finite_in_the_order_of_the_pass():
    assert FULL.nonfinite == [("0", "weight"), ("2.inner", "backward"), ("0", "backward")]
    assert Reading(0).nonfinite == []


def test_names_of_later_versions_are_ignored():
    assert Reading.from_json('{"version": 9, "step": 4, "mood": [1, {"a": 2}]}') == Reading(4)


STEPS = ["null", '"x"', "-5", "1.5", "1e400", "true"]
VALUES = [
    '"loss": "abc"',
    '"loss": [1]',
    '"loss": {"a": 1}',
    '"layers": [3]',
    '"layers": {"a": {"signal_norm": "x"}}',
    '"lr": 3',
]


@pytest.mark.parametrize("line", ["", "{", "[]", "3", "{}", '{"step": 1, "input": 3}', "[" * 100_000])
def test_lines_that_are_no_reading(line):
    with pytest.raises(ValueError, match="Reading: line must be what"):
        Reading.from_json(line)


@pytest.mark.parametrize("text", [*(f'"step": {step}' for step in STEPS), *(f'"step": 1, {each}' for each in VALUES)])
def test_values_that_no_reading_has(text):
    with pytest.raises(ValueError, match="Reading: line must be what"):
        Reading.from_json(f"{{{text}}}")


def test_a_file_grows_by_lines_and_a_line_cut_off_is_left_out(tmp_path):
    path = tmp_path / "readings.jsonl"
    write_readings(path, [FULL])
    write_readings(path, [Reading(13), Reading(14)])
    assert list(read_readings(path)) == [FULL, Reading(13), Reading(14)]
    path.write_text(path.read_text()[:-3])
    assert list(read_readings(path)) == [FULL, Reading(13)]
    path.write_text("nothing\n" + path.read_text())
    with pytest.raises(ValueError, match="'nothing"):
        list(read_readings(path))
