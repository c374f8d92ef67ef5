"""torch's own conformance data, run through ours; `python -m tests.conformance` prints the same as a table.

It is private to torch, so it may be missing one day.
"""

import importlib
from pathlib import Path

import pytest
import torch

import torch_bp.nn as ours

conformance = pytest.importorskip("tests.conformance", reason="torch ships no conformance data", exc_type=ImportError)
command = importlib.import_module("tests.conformance.__main__")
class_of = importlib.import_module("tests.conformance.operators").class_of

GROUPS = conformance.groups()
every_class = pytest.mark.parametrize("name", conformance.CLASSES)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.id)
def test_as_torch(group):
    outcomes = list(group.outcomes())
    assert outcomes
    assert [f"{outcome.name}: {outcome.failure}" for outcome in outcomes if outcome.failure] == []


def test_every_class_has_inputs():
    """torch ships samples of modules for none of the random ones, and of their functions for all."""
    of_modules = {group.name for group in GROUPS if group.kind == "module inputs"}
    of_functions = {group.name for group in GROUPS if group.kind == "operator inputs"}
    assert of_modules == set(conformance.CLASSES) - {"Dropout"}
    assert of_functions == set(conformance.CLASSES)
    assert {group.kind for group in GROUPS} == set(conformance.KINDS)


class Steeper(torch.autograd.Function):
    """The identity, with a slope of 3."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 3 * dy


FAULTS = [
    ("value", "module inputs"),
    ("value", "operator inputs"),
    ("gradient", "module inputs"),
    ("gradient", "operator inputs"),
    ("gradient", "torch's tests"),  # of values some of these know no more than that they are the same in every way
]


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
@every_class
def test_faults_are_seen(name, fault, kind, monkeypatch):
    """A wrong value, and a wrong gradient of a right value, in every kind of data that there is for the class."""

    def faulty(function):
        wrong = Steeper.apply if fault == "gradient" else lambda y: 1.1 * y + 0.1
        return lambda *args, **kwargs: wrong(function(*args, **kwargs))

    monkeypatch.setattr(getattr(ours, name), "forward", faulty(getattr(ours, name).forward))
    for function in vars(ours.functional).copy():
        if class_of(function) == name:
            monkeypatch.setattr(ours.functional, function, faulty(getattr(ours.functional, function)))
    known = conformance.groups() if kind == "torch's tests" else GROUPS  # those look functions up when they are listed
    groups = [group for group in known if (group.name, group.kind) == (name, kind)]
    if kind != "torch's tests":
        groups = [group for group in groups if "float64" in group.case][:1]
    # torch's one test for this has 700,000 elements, and the slope along one direction is below its tolerance
    blind = name == "LayerNorm" and kind == "torch's tests"
    assert not groups or any(outcome.failure for group in groups for outcome in group.outcomes()) != blind


def test_an_error_that_is_missing_or_another_is_seen(monkeypatch):
    (group,) = [g for g in GROUPS if g.id == "NLLLoss-module_errors-torch.float64"]
    monkeypatch.setattr(ours.NLLLoss, "forward", lambda self, input, target: input.sum())
    assert [outcome.deviation for outcome in group.outcomes()] == ["AssertionError: no error"]

    def another(self, input, target):
        raise TypeError("no")

    monkeypatch.setattr(ours.NLLLoss, "forward", another)
    assert "TypeError instead of" in next(group.outcomes()).deviation


def test_deviations_that_are_meant_must_be_there():
    def agrees():
        pass

    for (name, input), reason in conformance.MEANT.items():
        (outcome,) = conformance.Group(name, "module inputs", "any", lambda input=input: [(input, agrees)]).outcomes()
        assert reason in outcome.failure


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tests.conformance", "Tanh", "--markdown"])
    assert command.main() == 0
    heading, _, row, _ = capsys.readouterr().out.splitlines()
    assert heading.startswith("| class | module inputs |")
    assert row.startswith("| `Tanh` | 12 of 12 |")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    assert {heading, row} <= set(readme)
    monkeypatch.setattr(ours.Tanh, "forward", lambda self, input: input)
    monkeypatch.setattr("sys.argv", ["tests.conformance", "Tanh"])
    assert command.main() == 1
    assert "Tanh, module inputs, torch.float32 training: default" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tests.conformance", "Tank"])
    with pytest.raises(SystemExit):
        command.main()
    assert "Tank" in capsys.readouterr().err
