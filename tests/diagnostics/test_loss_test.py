"""No alarm in healthy runs, an alarm in sick ones, and the test of Mann and Kendall as it is defined."""

import itertools
import json
import math
from fractions import Fraction

import pytest

from tests.diagnostics import losses
from torch_bp.diagnostics import LossTest
from torch_bp.diagnostics.loss_test import chance, concordance

SEEDS = 40


def judged(values, **options):
    """The first certain finding and its place, and how many losses were left out before."""
    test, left_out = LossTest(**options), 0
    for place, value in enumerate(values):
        found = test.judge(value)
        if found is not None and found.certain:
            return place, found, left_out
        left_out += found is not None
    return None, None, left_out


@pytest.mark.parametrize("kind", losses.HEALTHY)
def test_no_alarm_in_healthy_runs(kind):
    """480 runs of 1000 steps; and hardly an update is left out."""
    left_out = 0
    for seed in range(SEEDS):
        place, found, count = judged(losses.healthy(kind, seed, 1000))
        assert place is None, found
        left_out += count
    assert left_out <= 1.0 * SEEDS


def test_a_slow_rise_of_a_loss_that_has_never_fallen_may_be_smaller_than_its_noise():
    """14 of 20 are found: a limit, which `test_alarm_in_sick_runs` leaves out, and which is not to get worse."""
    places = [judged(losses.sick(losses.creep, losses.stuck, seed, 1200, 400))[0] for seed in range(20)]
    assert all(place is None or place >= 400 for place in places)
    assert sum(place is not None for place in places) >= 14


PAIRS = [(sickness, kind) for sickness in losses.SICK for kind in losses.HEALTHY]
PAIRS.remove((losses.creep, losses.stuck))


@pytest.mark.parametrize(("sickness", "kind"), PAIRS)
def test_alarm_in_sick_runs(sickness, kind):
    within = {losses.blown: 0, losses.jump: 1, losses.explosion: 220, losses.creep: 600}[sickness]
    for seed in range(10):
        place, found, _ = judged(losses.sick(sickness, kind, seed, 1200, 400))
        assert 400 <= place <= 400 + within
        assert found.reason in {losses.blown: {"loss"}, losses.jump: {"spike"}}.get(sickness, {"rise", "spike"})
        if found.reason == "rise":
            assert found.number > found.threshold
            # where it began, or before: by the noise of healthy losses
            assert place - found.since <= 500


@pytest.mark.parametrize("option", ["spike", "rise"])
def test_what_is_switched_off_is_not_tested(option):
    sickness = {"spike": losses.jump, "rise": losses.creep}[option]
    values = losses.sick(sickness, losses.decay, 0, 900, 400)
    assert judged(values)[1].reason == option
    found = judged(values, spike=None, rise=None)[1]
    assert found is None
    assert judged([*values, math.inf], spike=None, rise=None)[1].reason == "loss"


def test_one_spike_is_forgiven_and_remembered():
    test = LossTest()
    for value in losses.healthy(losses.stuck, 1, 200):
        assert test.judge(value) is None
    level = test.threshold()
    found = test.judge(2 * level)
    assert (found.reason, found.certain, found.threshold) == ("spike", False, level)
    assert test.threshold() == level  # until the next one tells
    assert test.judge(level / 2) is None
    assert test.threshold() > level
    assert test.judge(2 * level) is None  # it is known by now


def test_patience():
    values = [*losses.healthy(losses.stuck, 1, 200), 100.0, 100.0, 100.0, 100.0]
    assert judged(values, patience=1)[0] == 200
    assert judged(values, patience=4)[0] == 203


def test_few_losses_have_no_spread():
    test = LossTest()
    assert [test.judge(x) for x in (1.0, 5.0, 1.0, 700.0, 1.0) * 3] == [None] * 15
    assert test.threshold() == math.inf


def test_a_loss_that_never_changes():
    test = LossTest()
    assert [test.judge(0.0) for _ in range(300)] == [None] * 300
    assert test.judge(1.0) is None  # there is nothing to compare it with


def test_larger_options_are_more_tolerant():
    values = [*losses.healthy(losses.stuck, 1, 200)]
    middle = sorted(values)[100]
    thresholds = []
    for spike in (5.0, 500.0):
        test = LossTest(spike=spike)
        for value in values:
            test.judge(value)
        thresholds.append(test.threshold() - middle)
    assert thresholds[1] > 20 * thresholds[0] > 0
    creeping = losses.sick(losses.creep, losses.decay, 3, 3000, 400)
    assert judged(creeping, rise=0.5)[0] < judged(creeping, rise=2.0)[0]


def test_a_window_forgets():
    test = LossTest(window=16)
    for value in [3.0, *[1.0, 1.01] * 8]:
        test.judge(value)
    assert test.threshold() < 1.3


def test_states_go_on():
    values = losses.sick(losses.creep, losses.decay, 5, 1200, 300)
    whole, place = LossTest(), judged(values)[0]
    for value in values[:250]:
        whole.judge(value)
    other = LossTest()
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert other.state_dict() == whole.state_dict()
    found = [other.judge(value) for value in values[250 : place + 1]]
    assert [f is not None and f.certain for f in found] == [False] * (place - 250) + [True]


def test_chance_is_counted():
    """Against all orders of five."""
    scores = [concordance(order) for order in itertools.permutations(range(5))]
    for s in range(-10, 12):
        assert chance(5, s) == float(Fraction(sum(score >= s for score in scores), len(scores)))


def test_concordance_is_kendalls():
    stats = pytest.importorskip("scipy.stats")
    values = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0, 5.5, 3.5]
    pairs = len(values) * (len(values) - 1) // 2
    tau = stats.kendalltau(range(len(values)), values)
    assert concordance(values) == pytest.approx(tau.statistic * pairs)
    exact = stats.kendalltau(range(len(values)), values, method="exact", alternative="greater")
    assert chance(len(values), concordance(values)) == pytest.approx(exact.pvalue)
