"""Faults made in our own backwards and update rules: all are found, and nothing healthy is flagged.

Some of them by default, all with `-m slow`. What no check can find is in `equivalent`, with the reason.
"""

import pytest

from tests.mutants import equivalent, operations, rules
from tests.mutants.mutation import mutants
from torch_bp import kernels

EVERY = 4  # of the operations' faults, which cost more than the rules'


@pytest.fixture(autouse=True)
def as_written():
    """A fault's kernel would take longer to compile than the check."""
    with kernels.use("torch"):
        yield


def faults(target, table):
    listed = {text for texts in table.values() for text in texts}
    return [m for m in mutants(target.path, target.functions) if str(m) not in listed]


def test_there_are_many():
    assert sum(len(faults(t, equivalent.OPERATIONS)[::EVERY]) for t in operations.TARGETS) >= 100
    assert sum(len(faults(t, equivalent.OPERATIONS)) for t in operations.TARGETS) >= 950
    assert sum(len(faults(t, equivalent.RULES)) for t in rules.TARGETS) >= 600


def name(target):
    return target.file


@pytest.mark.parametrize("target", operations.TARGETS, ids=name)
def test_every_few_faults_of_a_backward_are_found(target):
    assert not operations.caught(target, None)
    made = faults(target, equivalent.OPERATIONS)
    assert [str(m) for m in made[:: min(EVERY, max(1, len(made) // 4))] if not operations.caught(target, m)] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", operations.TARGETS, ids=name)
def test_every_fault_of_a_backward_is_found(target):
    assert [str(m) for m in faults(target, equivalent.OPERATIONS) if not operations.caught(target, m)] == []


@pytest.mark.parametrize("target", rules.TARGETS, ids=name)
def test_every_fault_of_a_rule_is_found(target):
    assert not rules.caught(target, None)
    assert [str(m) for m in faults(target, equivalent.RULES) if not rules.caught(target, m)] == []


@pytest.mark.slow
def test_what_is_said_to_be_equivalent_is():
    """What is listed passes, and is there."""
    for targets, caught, table in (
        (operations.TARGETS, operations.caught, equivalent.OPERATIONS),
        (rules.TARGETS, rules.caught, equivalent.RULES),
    ):
        listed = {text for texts in table.values() for text in texts}
        made = [(t, m) for t in targets for m in mutants(t.path, t.functions) if str(m) in listed]
        assert {str(m) for _, m in made} == listed
        assert [str(m) for t, m in made if caught(t, m)] == []
