"""Faults made in our own backwards and update rules: all are found, and nothing healthy is flagged.

Some of them by default, all with `-m slow`. What no check can find is in `equivalent`, with the reason.
"""

import re

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


def reasons(mutant, table):
    return [why for pattern, why in table if re.search(pattern, str(mutant))]


def faults(target, table):
    return [m for m in mutants(target.path, target.functions) if not reasons(m, table)]


def test_there_are_many():
    assert sum(len(faults(t, equivalent.EQUIVALENT)[::EVERY]) for t in operations.TARGETS) >= 100
    assert sum(len(faults(t, equivalent.EQUIVALENT)) for t in operations.TARGETS) >= 950
    assert sum(len(faults(t, equivalent.RULES)) for t in rules.TARGETS) >= 600


def name(target):
    return target.file


@pytest.mark.parametrize("target", operations.TARGETS, ids=name)
def test_every_few_faults_of_a_backward_are_found(target):
    assert not operations.caught(target, None)
    made = faults(target, equivalent.EQUIVALENT)
    assert [str(m) for m in made[:: min(EVERY, max(1, len(made) // 4))] if not operations.caught(target, m)] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", operations.TARGETS, ids=name)
def test_every_fault_of_a_backward_is_found(target):
    assert [str(m) for m in faults(target, equivalent.EQUIVALENT) if not operations.caught(target, m)] == []


@pytest.mark.parametrize("target", rules.TARGETS, ids=name)
def test_every_fault_of_a_rule_is_found(target):
    assert not rules.caught(target, None)
    assert [str(m) for m in faults(target, equivalent.RULES) if not rules.caught(target, m)] == []


@pytest.mark.slow
def test_what_is_said_to_be_equivalent_is():
    """What is listed passes, and every reason is needed."""
    used = set()
    for targets, caught, table in (
        (operations.TARGETS, operations.caught, equivalent.EQUIVALENT),
        (rules.TARGETS, rules.caught, equivalent.RULES),
    ):
        for target in targets:
            for mutant in mutants(target.path, target.functions):
                found = [pattern for pattern, _ in table if re.search(pattern, str(mutant))]
                used.update(found)
                if found:
                    assert not caught(target, mutant), f"{mutant} is found: it is not equivalent"
    assert used == {pattern for pattern, _ in (*equivalent.EQUIVALENT, *equivalent.RULES)}
