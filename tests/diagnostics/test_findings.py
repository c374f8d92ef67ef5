"""Findings as text, JSON and table; the course of a diagnosis; rules at their thresholds."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torch_bp
from torch_bp.diagnostics import (
    DeadUnit,
    Diagnosis,
    Finding,
    Finiteness,
    Labels,
    LayerReading,
    Reading,
    Spread,
    Thresholds,
    Verdicts,
    diagnose,
    diagnosis,
    examine,
    markdown,
)
from torch_bp.diagnostics.history import History

FOUND = Finding(
    "vanishing gradient", "fc3", 20, 3.1e-9, 1e-3, "sigmoids are flat", "use nn.ReLU()", action="activation"
)


def kinds(*readings, **options):
    return [found.kind for found in diagnose(readings, **options)]


def chain(*signals, step=0, **of_all):
    """A reading of layers with these error signals."""
    layers = {str(n): LayerReading(str(n), "Linear", signal_norm=s, **of_all) for n, s in enumerate(signals)}
    return Reading(step, layers=layers)


def test_the_text_names_layer_step_number_threshold_cause_and_cure():
    text = "layer fc3, step 20: vanishing gradient (3.1e-09, threshold 0.001): sigmoids are flat - use nn.ReLU()"
    assert str(FOUND) == text
    assert str(replace(FOUND, layer="", last_step=31)).startswith("steps 20 to 31: vanishing")


@pytest.mark.parametrize("value", [1.5, math.inf, -math.inf, 0.0])
def test_json_gives_it_back(value):
    found = replace(FOUND, value=value)
    assert Finding.from_json(found.to_json()) == found
    later = found.to_json()[:-1] + ', "added_later": [1]}'
    assert Finding.from_json(later) == found


@pytest.mark.parametrize("line", ["", "[1]", "{}", '{"kind": "x"}', FOUND.to_json().replace("warning", "awful")])
def test_lines_that_are_no_finding(line):
    with pytest.raises(ValueError, match="must be what Finding"):
        Finding.from_json(line)


def test_the_list_is_ordered():
    graver = replace(FOUND, severity="error", step=30, last_step=40)
    first, *_, second, _, cause, cure = markdown([FOUND, graver]).splitlines()
    assert first == "**error: vanishing gradient** (layer fc3, steps 30 to 40: 3.1e-09, threshold 0.001)"
    assert second.startswith("**warning: vanishing gradient** (layer fc3, step 20:")
    assert (cause, cure) == ("* cause: sigmoids are flat", "* cure: use nn.ReLU()")


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1", None, True])
def test_thresholds_are_numbers_above_zero(value):
    with pytest.raises(ValueError, match="dead must be a number above 0"):
        Thresholds(dead=value)


def test_thresholds_are_used():
    assert kinds(chain(1e-2, 1.0)) == []
    assert kinds(chain(1e-2, 1.0), thresholds=Thresholds(vanishing=0.1)) == ["vanishing gradient"]
    with pytest.raises(TypeError, match="thresholds must be Thresholds, got dict"):
        diagnose([], thresholds={})


def test_noise_around_a_threshold_is_one_finding():
    diagnosis, new = Diagnosis(), []
    for step in range(40):
        new += diagnosis.update(chain(1e-9 if step % 3 else 1.0, 1.0, step=step))
    assert [found.step for found in new] == [1]
    assert [(found.step, found.last_step) for found in diagnosis.findings] == [(1, 38)]


def test_steps_must_go_on():
    diagnosis = Diagnosis()
    diagnosis.update(Reading(3))
    with pytest.raises(ValueError, match="step must be above 3, that of the reading before, got 3"):
        diagnosis.update(Reading(3))


def test_a_reading_of_nothing_and_of_the_least_detail():
    assert kinds(*[Reading(step) for step in range(500)]) == []
    assert kinds(*[Reading(step, loss=1.0 / (1 + step), lr=(0.1,), grad_norm=1.0) for step in range(700)]) == []


@pytest.mark.parametrize(
    ("weight", "derivative", "activation", "blamed", "action"),
    [(0.9, 1e-6, "Sigmoid", "derivative of Sigmoid", "activation"), (1e-6, 0.5, "ReLU", "small weights", "init")],
)
def test_what_vanishes_is_blamed_on_one_factor(weight, derivative, activation, blamed, action):
    factors = {"weight_factor": weight, "derivative_factor": derivative, "activation": activation, "saturated": 0.94}
    first = LayerReading("a", "Linear", signal_norm=weight * derivative, **factors)
    last = LayerReading("b", "Linear", signal_norm=1.0)
    readings = [Reading(5, layers={"a": first, "b": last})]
    found = next(each for each in diagnose(readings) if each.kind == "vanishing gradient")
    assert (found.layer, found.action) == ("a", action)
    assert blamed in found.cause
    assert ("94%" in found.cause) == (action == "activation")


def test_nothing_vanishes_behind_a_dead_layer():
    assert kinds(chain(0.0, 0.0, 1.0, 1.0)) == []


@pytest.mark.parametrize(
    ("part", "layer", "words"),
    [
        ({"weight": Finiteness(9, 1, 0)}, "b", "the run began with them"),
        ({"forward": Finiteness(9, 0, 2)}, "b", "2 infinite of 9 here, it overflows"),
        ({"backward": Finiteness(9, 3, 0)}, "b", "the backward pass first has 3 NaN of 9"),
    ],
)
def test_the_first_origin_is_named_and_not_what_follows(part, layer, words):
    fine = Finiteness(9, 0, 0)
    well = LayerReading("a", "Linear", forward=fine, weight=fine, backward=fine)
    bad = LayerReading("b", "Linear", **part)
    after = LayerReading("c", "Linear", forward=Finiteness(9, 9, 0) if "backward" not in part else fine)
    everything = {name: LayerReading(name, "Linear", weight=Finiteness(9, 9, 0)) for name in "abc"}
    readings = [Reading(0, layers={"a": well, "b": bad, "c": after}), Reading(1, layers=everything)]
    (found,) = diagnose(readings)
    assert (found.layer, found.step, found.last_step) == (layer, 0, 1)
    assert words in found.cause


def test_infinite_gradients_that_a_scaler_skips_are_a_remark():
    bad = LayerReading("a", "Linear", backward=Finiteness(9, 0, 9), update_norm=0.0)
    (found,) = diagnose([Reading(0, layers={"a": bad}), Reading(1)])
    assert found.severity == "info"
    assert "skipped" in found.cause


@pytest.mark.parametrize("cause", ["input", "bias", "weights"])
def test_dead_units_have_a_reason(cause):
    dead = tuple(DeadUnit(unit, 0, cause, 1.0, -1.0) for unit in range(10))
    layer = LayerReading("a", "Linear", activation="ReLU", units=10, dead_units=10, dead=dead)
    (found,) = diagnose([Reading(0, batch=32, layers={"a": layer})])
    assert cause in found.cause
    assert found.severity == "error"


@pytest.mark.parametrize(
    ("alive", "ratio", "cure"),
    [(9, 0.8, "a learning rate 10 times lower: lr=0.5"), (9, 0.01, "use nn.LeakyReLU"), (4, 0.8, "use nn.LeakyReLU")],
)
def test_units_that_large_updates_have_killed_need_a_lower_rate(alive, ratio, cure):
    def at(step, dead):
        layer = LayerReading("a", "Linear", activation="ReLU", units=10, dead_units=dead, update_ratio=ratio)
        return Reading(step, lr=(5.0,), batch=32, layers={"a": layer})

    (found,) = (each for each in diagnose([at(0, 10 - alive), at(10, 9)]) if each.kind == "dead units")
    assert found.cure.startswith(cure)
    assert found.action == ("lr*0.1" if cure.startswith("a learning") else "activation")
    assert ("80% of the weights" in found.cause) == cure.startswith("a learning")


def test_few_examples_kill_no_unit():
    layer = LayerReading("a", "Linear", activation="ReLU", units=10, dead_units=10, saturated=0.9)
    assert kinds(Reading(0, batch=2, layers={"a": layer})) == []
    assert kinds(Reading(0, batch=32, layers={"a": layer})) == ["dead units"]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (Labels(64, 1, 1.0, 0.0), True),
        (Labels(64, 2, 0.5, 1 / 63), True),
        (Labels(64, 2, 0.5, 0.5), False),
        (Labels(64, 2, 0.97, 0.03), False),
        (Labels(8, 1, 1.0, 0.0), False),
    ],
)
def test_sorted_labels(labels, found):
    last = {"a": LayerReading("a", "Linear", units=10)}
    assert kinds(Reading(0, labels=labels, layers=last)) == ["data not shuffled"] * found


def test_one_class_by_chance():
    last = {"a": LayerReading("a", "Linear", units=2)}
    alike, mixed = Labels(16, 1, 1.0, 0.0), Labels(16, 2, 0.8, 0.3)
    assert kinds(*[Reading(step, labels=alike, layers=last) for step in range(3)]) == []
    assert kinds(*[Reading(step, labels=alike, layers=last) for step in range(5)]) == ["data not shuffled"]
    of_two = [replace(alike, commonest=step) for step in range(2)]
    assert kinds(*[Reading(step, labels=labels, layers=last) for step, labels in enumerate(of_two)]) == [
        "data not shuffled"
    ]
    several = [Reading(step, labels=mixed if step == 1 else alike, layers=last) for step in range(9)]
    assert kinds(*several) == []


def test_a_warm_up_and_a_decay_are_no_rates_that_are_too_low():
    def reading(step, lr):
        return Reading(step, lr=(lr,), layers={"a": LayerReading("a", "Linear", update_ratio=lr)})

    assert kinds(*[reading(step, 1e-8 * (step + 1)) for step in range(50)]) == []
    assert kinds(*[reading(step, 1e-2 * 0.1**step) for step in range(50)]) == []
    assert kinds(*[reading(step, 1e-8) for step in range(3)]) == ["rate too low"]
    assert kinds(*[reading(step, 1e-8) for step in range(2)]) == []


def test_a_loss_that_does_not_fall():
    def losses(values):
        return kinds(*[Reading(step, loss=value) for step, value in enumerate(values)])

    assert losses([1.0] * 60) == ["loss does not fall"]
    assert losses([1.0] * 50) == []
    assert losses([1.0 - 0.002 * step for step in range(60)]) == []
    assert losses([1.0] * 5 + [0.5] * 3 + [1.0] * 60) == []  # it has fallen once: what came later is another matter


def test_a_gradient_that_is_zero_for_two_steps():
    def reading(step, *norms):
        return Reading(step, layers={str(n): LayerReading(str(n), "Linear", grad_norm=x) for n, x in enumerate(norms)})

    (found,) = diagnose([reading(0, 1.0, 0.0, 1.0), reading(1, 1.0, 0.0, 1.0)])
    assert (found.kind, found.layer) == ("no gradient", "1")
    assert kinds(reading(0, 1.0, 0.0, 1.0), reading(1, 1.0, 0.1, 1.0)) == []
    assert kinds(reading(0, 0.0, 0.0), reading(1, 0.0, 0.0)) == []


def test_inputs_of_an_embedding_need_no_scale():
    values = Spread(10, 500.0, 300.0, 0.0, 1000.0)
    for kind, found in (("Embedding", []), ("Linear", ["unscaled input"]), ("Conv2d", ["unscaled input"])):
        assert kinds(Reading(0, input=values, layers={"a": LayerReading("a", kind)})) == found


@pytest.mark.parametrize(
    ("examples", "words"),
    [((), "the input has 2 NaN of 64"), ((4,), "of 64 (example 4 of the batch)"), ((4, 7), "(examples 4, 7 of")],
)
def test_what_is_not_finite_in_the_input(examples, words):
    first = LayerReading("a", "Linear", forward=Finiteness(9, 9, 0))
    (found,) = diagnose([Reading(3, input_finite=Finiteness(64, 2, 0, examples), layers={"a": first})])
    assert (found.kind, found.layer, found.value) == ("NaN or Inf", "", 2.0)
    assert words in found.cause
    (found,) = diagnose([Reading(3, input_finite=Finiteness(64, 0, 0), layers={"a": first})])
    assert (found.layer, "input and weights are finite" in found.cause) == ("a", True)


@pytest.mark.parametrize(
    ("weight", "words"), [(Finiteness(9, 1, 0), "the weights have NaN:"), (Finiteness(9, 0, 1), "have infinities:")]
)
def test_weights_are_not_counted_and_steps_between_records_not_accused(weight, words):
    well, ill = (LayerReading("a", "Linear", weight=w, update_norm=1.0) for w in (Finiteness(9, 0, 0), weight))
    for last, step, cause, cure in (
        (0, 1, "the step before made them", "a learning rate 10 times lower"),
        (20, 30, "a step after step 20 made them, and was not recorded", "watch(..., every=1, budget=None) to see"),
    ):
        (found,) = diagnose([Reading(last, layers={"a": well}), Reading(step, layers={"a": ill})])
        assert (found.kind, found.layer, found.step, found.action) == ("NaN or Inf", "a", step, "lr*0.1")
        assert words in found.cause
        assert found.cause.endswith(cause)
        assert found.cure.startswith(cure)


def sick(lr=0.1):
    """A small model whose first rectifiers are dead, its loss and its optimizer."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.constant_(model[0].bias, -100.0)
    return model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=lr)


def train(model, loss_fn, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(torch.randn(32, 4)), torch.randint(2, (32,))).backward()
        optimizer.step()


ALWAYS = {"every": 1, "budget": None}


@pytest.mark.parametrize("engine", ["autograd", "step"])
def test_a_monitor_says_once_what_it_finds(engine, tmp_path, caplog):
    model, loss_fn, optimizer = sick()
    with SummaryWriter(str(tmp_path)) as writer:
        if engine == "step":
            step = torch_bp.TrainStep(model, loss_fn, optimizer)
            monitor = torch_bp.watch(step, output=writer, **ALWAYS)
            for _ in range(5):
                step(torch.randn(32, 4), torch.randint(2, (32,)))
        else:
            monitor = torch_bp.watch(model, optimizer, writer, loss_fn=loss_fn, **ALWAYS)
            train(model, loss_fn, optimizer)
        (found,) = monitor.findings
        monitor.close()
    assert (found.kind, found.layer, found.step, found.last_step) == ("dead units", "0", 0, 4)
    assert monitor.findings == [found]
    said = [record for record in caplog.records if "dead units" in record.getMessage()]
    assert [(record.levelno, record.name) for record in said] == [(logging.WARNING, "torch_bp")]
    events = EventAccumulator(str(tmp_path)).Reload()
    first, last = ((e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("verdicts/text_summary"))
    assert first[1].startswith("**error: dead units** (layer 0, step 0:")
    assert last[1].startswith("**error: dead units** (layer 0, steps 0 to 4:")
    assert (first[0], last[0]) == (0, 4)
    assert [f.to_dict() for f in examine(tmp_path).findings] == [found.to_dict()]


@pytest.mark.parametrize(("options", "found"), [({"diagnose": False}, []), ({"silent": True}, ["dead units"])])
def test_verdicts_that_are_switched_off(options, found, caplog, tmp_path):
    model, loss_fn, optimizer = sick()
    with torch_bp.watch(model, optimizer, tmp_path, loss_fn=loss_fn, **ALWAYS, **options) as monitor:
        train(model, loss_fn, optimizer)
    assert [each.kind for each in monitor.findings] == found
    assert not [record for record in caplog.records if "dead" in record.getMessage()]
    assert ("verdicts/text_summary" in EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]) == bool(found)


def test_of_what_is_well_it_is_said_that_it_is(tmp_path):
    model, loss_fn, optimizer = sick()
    nn.init.zeros_(model[0].bias)
    with torch_bp.watch(model, optimizer, tmp_path, loss_fn=loss_fn, **ALWAYS):
        train(model, loss_fn, optimizer)
    (text,) = EventAccumulator(str(tmp_path)).Reload().Tensors("verdicts/text_summary")
    assert text.tensor_proto.string_val[0] == b"Nothing was found."


@pytest.mark.parametrize("name", ["diagnose", "silent"])
def test_switches_are_of_yes_or_no(name):
    model, loss_fn, optimizer = sick()
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
        torch_bp.watch(model, optimizer, loss_fn=loss_fn, **{name: "no"})


def test_a_rule_that_fails_stops_neither_training_nor_other_rules(monkeypatch, caplog):
    def broken_rule(history, limit):
        raise ZeroDivisionError("a slip")
        yield

    monkeypatch.setattr(diagnosis, "RULES", {broken_rule: 1, **diagnosis.RULES})
    model, loss_fn, optimizer = sick()
    with torch_bp.watch(model, optimizer, loss_fn=loss_fn, **ALWAYS) as monitor:
        train(model, loss_fn, optimizer)
    assert len(monitor.readings) == 5
    assert [each.kind for each in monitor.findings] == ["dead units"]
    said = [record.getMessage() for record in caplog.records if "a slip" in record.getMessage()]
    assert len(said) == 1
    assert "the rule broken_rule has failed at step 0" in said[0]
    with pytest.raises(ZeroDivisionError):
        diagnose(monitor.readings)


def test_verdicts_are_said_once_and_shown_as_a_list(caplog):
    model, loss_fn, optimizer = sick()
    texts = []
    verdicts = Verdicts(lambda *text: texts.append(text))
    with torch_bp.watch(model, optimizer, loss_fn=loss_fn, diagnose=False, on_reading=verdicts, **ALWAYS):
        train(model, loss_fn, optimizer)
    said = [record.getMessage() for record in caplog.records if "dead units" in record.getMessage()]
    assert len(said) == 1
    ((tag, text, step),) = texts
    assert (tag, step) == ("verdicts", 0)
    assert "dead units** (layer 0" in text


def test_silent_verdicts_and_runs_that_go_back(caplog):
    verdicts = Verdicts(silent=True)
    verdicts(Reading(5, loss=math.nan))
    assert caplog.records == []
    verdicts(Reading(2, loss=1.0))
    assert verdicts.findings == []
    with pytest.raises(TypeError, match="write must be callable, got str"):
        Verdicts("folder")


def test_a_batch_that_was_refused_is_named_and_is_no_part_of_the_course():
    refused = Reading(3, loss=math.nan, input_finite=Finiteness(8, 1, 0), refused=True)
    course = Diagnosis()
    found = [course.update(reading) for reading in (*(Reading(k, loss=2.0) for k in range(3)), refused)]
    assert [[each.kind for each in new] for new in found] == [[], [], [], ["NaN or Inf"]]
    assert course.update(replace(refused, input_finite=Finiteness(8, 2, 0))) == []  # another batch for the same step
    assert course.update(Reading(3, loss=2.0)) == []
    assert [(each.step, each.last_step) for each in course.findings] == [(3, 3)]
    with pytest.raises(ValueError, match="step must be above 3"):
        course.update(Reading(3, loss=2.0))
    kept = History([Reading(0, loss=2.0), refused, Reading(3, loss=1.0), replace(refused, step=4)])
    assert [(reading.step, bool(reading.refused)) for reading in kept.latest] == [(0, False), (3, False), (4, True)]
    assert kept.start == kept.latest
