"""A batch that is not finite is not taken, and a monitor reads it: where it came from is said, and no update is."""

import json

import pytest
import torch

import torch_bp
from torch_bp import nn, optim
from torch_bp.diagnostics import examine
from torch_bp.diagnostics.run_directory import read_run


def trained(every, folder, bad, spoil, go_on=True, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters(), lr=1e-2), **options)
    monitor = torch_bp.watch(step, folder, every=every, budget=None, silent=True)
    for number in range(8):
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        if number == bad:
            spoil(model, x)
            before = [t.clone() for t in (*model.parameters(), *model.buffers())], torch.get_rng_state()
            with pytest.raises(FloatingPointError):
                step(x, y)
            after = [t.clone() for t in (*model.parameters(), *model.buffers())], torch.get_rng_state()
            torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)
            if not go_on:
                break
            continue
        step(x, y)
    monitor.close()
    return step, monitor


def spoiled_input(model, x):
    x[3, 2] = torch.nan


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("capture", [True, False])
def test_a_refused_batch_has_a_reading(tmp_path, every, capture):
    step, monitor = trained(every, tmp_path, 4, spoiled_input, capture=capture)
    assert (step.steps, monitor.step) == (7, 7)
    refused = [reading for reading in monitor.readings if reading.refused]
    assert [reading.step for reading in refused] == [4]
    (reading,) = refused
    assert reading.input_finite.nan == 1
    assert all(layer.update_norm is None for layer in reading.layers.values())
    assert all(layer.weight.ok for layer in reading.layers.values())
    assert [r.step for r in monitor.readings if not r.refused] == ([*range(7)] if every == 1 else [0, 5])
    (finding,) = [f for f in monitor.findings if f.kind == "NaN or Inf"]
    assert (finding.step, finding.severity) == (4, "error")


def test_what_the_doctor_says_of_a_run_that_has_ended_so(tmp_path):
    trained(5, tmp_path, 3, spoiled_input, go_on=False)
    lines = [json.loads(line) for line in (tmp_path / "readings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3]
    assert [(f.kind, f.step) for f in examine(tmp_path).findings if f.severity == "error"] == [("NaN or Inf", 3)]


def test_refused_batches_of_a_run_that_goes_on_stay_in_its_file(tmp_path):
    trained(1, tmp_path, 4, spoiled_input)
    readings = [(reading.step, bool(reading.refused)) for reading in read_run(tmp_path)]
    assert readings == [*((k, False) for k in range(4)), (4, True), *((k, False) for k in (4, 5, 6))]


def test_an_infinite_loss_of_finite_values_has_a_reading_too(tmp_path):
    model = nn.Linear(6, 3)
    step = torch_bp.TrainStep(model, nn.MSELoss(), optim.SGD(model.parameters(), lr=1e-3))
    with torch_bp.watch(step, tmp_path, every=5, budget=None, silent=True) as monitor:
        for size in (1.0, 1e30):
            x, y = torch.randn(4, 6), torch.full((4, 3), size)
            if size == 1:
                step(x, y)
        with pytest.raises(FloatingPointError):
            step(x, y)
    assert [(reading.step, bool(reading.refused)) for reading in read_run(tmp_path)] == [(0, False), (1, True)]
    assert monitor.last.loss == torch.inf
    assert [(f.kind, f.step, f.severity) for f in monitor.findings] == [("NaN or Inf", 1, "error")]
