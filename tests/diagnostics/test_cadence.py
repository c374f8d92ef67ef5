"""Which steps are recorded, by a clock that the test sets."""

import itertools
import logging

import pytest
import torch

import torch_bp
from torch_bp import nn, optim, watch
from torch_bp.diagnostics import monitor as monitor_module
from torch_bp.diagnostics.cadence import Cadence


def run(cadence, steps, record=1.2, writing=0.1, start=0):
    """Steps that take a second, and those that are recorded `record`; return how many were recorded."""
    count = 0
    for number in range(start, start + steps):
        recorded = cadence.records(number)
        count += recorded
        cadence.tell(recorded, record if recorded else 1.0, writing if recorded else 0.0)
    return count


@pytest.mark.parametrize("every", [1, 2, 5, 10])
def test_records_get_rarer_within_some_dozen_steps_and_it_is_said_once(every, caplog):
    cadence = Cadence(every, 0.02)
    with caplog.at_level(logging.WARNING):
        run(cadence, max(24, 4 * every))
        assert cadence.every == 15  # 0.3 / 0.02
        run(cadence, 400)
    assert cadence.share == pytest.approx(0.02)
    assert [r.getMessage().split(";")[0] for r in caplog.records] == [
        "watch: a recorded step takes 1.3 times as long as others: records get rarer, towards one step in 15 instead "
        f"of one in {every}, to stay within 2 % of the time"
    ]


@pytest.mark.parametrize("record", [1.3, 41.0, 2001.0])
def test_a_run_that_is_short_and_dear_to_record_is_still_seen_to_its_end(record):
    """From one record to the next at most twice as far as before: some records more, however many steps there are."""
    cadence = Cadence(10, 0.02)
    recorded = []
    for number in range(2000):
        if cadence.records(number):
            recorded.append(number)
        cadence.tell(number in recorded[-1:], record if number in recorded[-1:] else 1.0, 0.0)
    assert all(after <= 2 * max(before, 10) for before, after in itertools.pairwise(recorded))
    assert recorded[-1] >= 1000
    assert len(recorded) <= 10 + 2000 * 0.02 / (record - 1)


def test_records_stay_where_they_are_cheap_or_nobody_minds():
    for every, budget, extra, expected in ((1, 0.02, 0.01, 1), (3, None, 9.0, 3)):
        cadence = Cadence(every, budget)
        run(cadence, 100, 1 + extra, 0.0)
        assert cadence.every == expected
        assert sum(cadence.records(n) for n in range(60)) == 60 // expected


def test_a_disturbance_passes():
    cadence = Cadence(2, 0.02)
    run(cadence, 70, 2.0, 0.0)
    assert cadence.every == 50
    run(cadence, 1500, 1.01, 0.0, start=70)
    assert cadence.every == 2


@pytest.mark.parametrize("explicit", [True, False])
def test_the_monitor_measures_itself(explicit, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(monitor_module, "clock", lambda: now[0])
    model, loss_fn = nn.MLP([4, 6, 2]), nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    written = []

    def write(reading):
        written.append(reading)
        now[0] += 0.05

    if explicit:
        step = torch_bp.TrainStep(model, loss_fn, optimizer)
        monitor = watch(step, every=2, on_reading=write, silent=True)
    else:
        monitor = watch(model, optimizer, loss_fn=loss_fn, every=2, on_reading=write, silent=True)
    with caplog.at_level(logging.WARNING), monitor:
        for _ in range(120):
            now[0] += 1.35 if monitor.recording else 1.0
            if explicit:
                step(x, y)
            else:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
    assert [r.step for r in written][:3] == [0, 2, 4]
    assert [r.step for r in written][-4:] == [40, 60, 80, 100]  # 0.4 / 0.02
    assert monitor.last.share == pytest.approx(0.02)
    assert monitor.last.seconds == pytest.approx(1.0)
    assert len(caplog.records) == 1
