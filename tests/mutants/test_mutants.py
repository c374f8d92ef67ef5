"""Faults made in our own backwards and update rules: all are found, and nothing healthy is flagged.

Those that raise are counted apart. Some of them run by default, all with `-m slow`. What no check can find is in
`equivalent`, with the reason.
"""

import pytest

from tests.mutants import equivalent, operations, rules
from tests.mutants.mutation import RAISED, WRONG, mutants
from torch_bp import kernels

SHARE = 0.5  # of the faults of a file, at least, are found by results
# most faults of these give shapes that do not fit, and raise
SHAPES = {"linear": 0.25, "cross_entropy": 0.25, "class_loss": 0.35, "rows": 0.1, "dropout": 0.4}
SHAPES |= {"linear_activation": 0.0, "batch_norm_activation": 0.2}
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


def tally(target, caught, made, share=SHARE):
    """Return the faults that nothing tells, and print how many were found by results and how many fail to run.

    A fault that raises is no merit of a check: a share must be found by what they compute.
    """
    found = {WRONG: [], RAISED: [], "": []}
    for mutant in made:
        found[caught(target, mutant)].append(str(mutant))
    print(f"{target.file}: {len(found[WRONG])} wrong, {len(found[RAISED])} raised, {len(found[''])} missed")
    print(*(f"  raised: {text}" for text in found[RAISED]), sep="\n")
    assert len(found[WRONG]) >= share * len(made)
    return found[""]


def name(target):
    return target.file


@pytest.mark.parametrize("target", operations.TARGETS, ids=name)
def test_every_few_faults_of_a_backward_are_found(target):
    assert not operations.caught(target, None)
    made = faults(target, equivalent.OPERATIONS)
    assert tally(target, operations.caught, made[:: min(EVERY, max(1, len(made) // 4))], 0.0) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", operations.TARGETS, ids=name)
def test_every_fault_of_a_backward_is_found(target):
    share = SHAPES.get(target.file, SHARE)
    assert tally(target, operations.caught, faults(target, equivalent.OPERATIONS), share) == []


@pytest.mark.parametrize("target", rules.TARGETS, ids=name)
def test_every_fault_of_a_rule_is_found(target):
    assert not rules.caught(target, None)
    assert tally(target, rules.caught, faults(target, equivalent.RULES), 0.9) == []


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
