"""Every fault is named at the first step at which it can be told, and healthy runs are left in peace."""

import pytest

from tests.faults.faults import FAULTS
from tests.faults.healthy import healthy, learned
from torch_bp.diagnostics import Diagnosis, Reading, diagnose, examine

FEW, MANY = range(2000, 2016), range(2000, 2390)  # thresholds were chosen by seeds below 1400


def named(fault, findings):
    """Those that name a fault rightly, and in time."""
    return [
        found
        for found in findings
        if found.kind in fault.kinds
        and found.step <= fault.step
        and fault.layer in (None, found.layer)
        and fault.words in found.cause
    ]


def alarms(seeds):
    """How many of these runs were healthy, and what was said of them."""
    count, found = 0, []
    for seed in seeds:
        readings, findings = healthy(seed).watched("layers")
        if learned(readings):
            count += 1
            found += [(seed, str(each)) for each in findings]
    return count, found


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_at_the_first_possible_step(name):
    fault = FAULTS[name]
    _, findings = fault.recipe.watched()
    assert named(fault, findings), [str(found) for found in findings]


@pytest.mark.parametrize(
    ("level", "name"),
    [
        ("summary", "vanishing: sigmoids"),
        ("summary", "unscaled input: bytes"),
        ("layers", "dead units: biases"),
        ("layers", "no shuffle"),
    ],
)
def test_less_detail_and_rarer_readings(level, name):
    fault = FAULTS[name]
    _, findings = fault.recipe.watched(level, every=10)
    assert named(fault, findings)


def test_few_healthy_runs_give_no_alarm():
    count, found = alarms(FEW)
    assert count > 10
    assert found == []


@pytest.mark.slow
def test_below_one_percent_of_healthy_runs_give_an_alarm():
    """Seeds that had no part in choosing thresholds."""
    count, found = alarms(MANY)
    assert count >= 300
    assert len({seed for seed, _ in found}) < 0.01 * count, found


def test_one_by_one_says_what_all_at_once_does():
    readings = FAULTS["rate too high: SGD"].recipe.watched()[0]
    diagnosis, steps = Diagnosis(), {}
    for reading in readings:
        for found in diagnosis.update(reading):
            steps[found.kind, found.layer] = (reading.step, found.step)
    assert {key: first for key, (first, _) in steps.items()} == {k: s for k, (_, s) in steps.items()}
    assert {(found.kind, found.step) for found in diagnosis.findings} == {(f.kind, f.step) for f in diagnose(readings)}


@pytest.mark.parametrize("name", ["vanishing: sigmoids", "no shuffle", "gradient not zeroed", "divergence: SGD"])
def test_the_doctor_says_of_a_run_what_was_said_live(name, tmp_path):
    _, findings = FAULTS[name].recipe.watched(output=tmp_path)
    assert findings
    assert list(examine(tmp_path / "readings.jsonl").findings) == findings


def test_readings_that_were_written_say_the_same():
    readings = FAULTS["dead units: biases"].recipe.watched()[0][:3]
    again = [Reading.from_json(reading.to_json()) for reading in readings]
    assert [str(found) for found in diagnose(again)] == [str(found) for found in diagnose(readings)]
