"""torch's own conformance data of optimizers; `python -m tests.conformance` prints the same as a table."""

import importlib

import pytest
import torch

import torch_bp.optim as ours
from torch_bp.optim.bucket import Bucket

conformance = pytest.importorskip("tests.conformance", reason="torch ships no conformance data", exc_type=ImportError)
command = importlib.import_module("tests.conformance.__main__")
optimizers = conformance.optimizers

GROUPS = list(optimizers.groups())
every_optimizer = pytest.mark.parametrize("name", optimizers.OPTIMIZERS)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.id)
def test_as_torch(group):
    outcomes = list(group.outcomes())
    assert outcomes
    assert [f"{outcome.name}: {outcome.failure}" for outcome in outcomes if outcome.failure] == []


def test_every_optimizer_that_mirrors_torchs_has_inputs_and_errors():
    mirrored = {
        name
        for name, kind in vars(ours).items()
        if isinstance(kind, type) and issubclass(kind, getattr(torch.optim, name, ()))
    }
    assert set(optimizers.OPTIMIZERS) == mirrored
    assert {(group.name, group.kind) for group in GROUPS} == {(n, k) for n in mirrored for k in optimizers.KINDS}


def outcomes_of(name, case):
    return [outcome for group in GROUPS if (group.name, group.case) == (name, case) for outcome in group.outcomes()]


@every_optimizer
def test_a_wrong_step_is_seen(name, monkeypatch):
    kind = getattr(ours, name)
    right = kind.scalars
    monkeypatch.setattr(kind, "scalars", lambda *a, **k: (s := right(*a, **k)) | {"lr": s["lr"] * 1.01})
    assert all(outcome.failure for outcome in outcomes_of(name, "torch.float64"))
    assert all(outcome.failure for outcome in outcomes_of(name, "torch.complex64"))


@every_optimizer
def test_state_that_is_not_kept_is_seen(name, monkeypatch):
    if name == "SGD":
        monkeypatch.setattr(ours.SGD, "state_layout", lambda self, group: (None,))
    else:
        monkeypatch.setattr(Bucket, "update", lambda *a: True)
    assert any(outcome.failure for outcome in outcomes_of(name, "torch.float64"))


def test_an_error_that_is_missing_is_seen(monkeypatch):
    monkeypatch.setattr(ours.SGD, "__init__", lambda self, params, **options: None)
    monkeypatch.setattr(ours.SGD, "step", lambda self: None)
    assert {outcome.deviation for outcome in outcomes_of("SGD", "any")} == {"AssertionError: no error"}


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tests.conformance", "Adamax", "--markdown"])
    assert command.main() == 0
    heading, _, row, _ = capsys.readouterr().out.splitlines()
    assert heading == "| optimizer | optimizer inputs | optimizer errors | all |"
    assert row.startswith("| `Adamax` | 20 of 20 |")
    monkeypatch.setattr("sys.argv", ["tests.conformance", "Adamax", "Tanh"])
    assert command.main() == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert (first.split()[0], second.split()[0]) == ("class", "optimizer")
