"""Cures tried on copies: they do what they say, they help, and the original does not notice."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import torch_bp
from tests.faults.faults import FAULTS
from torch_bp.cure import CURES
from torch_bp.diagnostics import Finding
from torch_bp.diagnostics.history import SATURATING

# A fault of the suite, and the action of its cure.
CURABLE = {
    "vanishing: sigmoids": "activation",
    "exploding: large weights": "init",
    "dead units: biases": "init",
    "initialization: constant": "init",
    "initialization: outputs": "init",
    "rate too high: Adam": "lr*0.1",
    "rate too low: Adam": "lr*10",
    "NaN: a derivative": "clip",
    "softmax before cross-entropy": "no softmax",
    "softmax before NLL": "log softmax",
    "sigmoid before BCE on logits": "no softmax",
    "unscaled input: bytes": "standardize",
    "gradient not zeroed": "zero_grad",
    "no shuffle": "shuffle",
}
HELPS = set(CURABLE) - {"rate too low: Adam", "NaN: a derivative", "no shuffle", "rate too high: Adam"}


def started(name, batches=8):
    """Model, loss, optimizer, batches and the finding of a fault."""
    fault = FAULTS[name]
    recipe = fault.recipe
    finding = next(found for found in recipe.watched()[1] if found.kind in fault.kinds)
    model = recipe.model()
    optimizer = recipe.optimizer(recipe.parameters(model), **recipe.options)
    stored = [batch for batch, _ in zip(recipe.batches(), range(batches))]
    return model, recipe.loss, optimizer, stored, finding


@pytest.mark.parametrize("name", CURABLE)
def test_the_cure_of_a_fault_is_tried(name):
    *run, finding = started(name)
    assert finding.action == CURABLE[name]
    trial = torch_bp.try_cure(*run, finding, steps=12)
    assert len(trial.before.losses) == len(trial.after.losses) == len(trial.after.readings) == 12
    assert trial.tried in str(trial)
    assert trial.before.losses != pytest.approx(trial.after.losses)
    assert trial.values[0] is not None or name == "rate too high: Adam"
    if name in HELPS:
        assert trial.cured, str(trial)


def test_every_action_is_tried_and_every_rule_names_one_of_them():
    assert set(CURABLE.values()) == set(CURES)


@pytest.mark.parametrize("name", ["exploding: large weights", "vanishing: sigmoids", "unscaled input: bytes"])
def test_the_original_does_not_notice(name):
    model, loss, optimizer, batches, finding = started(name)
    x, y = batches[0]
    loss(model(x), y).backward()
    optimizer.step()  # there is a state, and there are gradients
    calls = []
    model.register_forward_hook(lambda *args: calls.append(args))

    def content():
        numbers = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *(t for pair in batches for t in pair)]
        return copy.deepcopy((numbers, [t.tolist() for t in tensors], optimizer.state_dict(), model.training))

    before, modules, versions = content(), list(model), [p._version for p in model.parameters()]
    torch_bp.try_cure(model, loss, optimizer, batches, finding, steps=3)
    after = content()
    assert after[:2] == before[:2]
    assert str(after[2:]) == str(before[2:])
    assert list(model) == modules
    assert [p._version for p in model.parameters()] == versions
    assert calls == []


def test_before_is_what_the_run_would_have_done():
    model, loss, optimizer, batches, finding = started("rate too high: Adam")
    trial = torch_bp.try_cure(model, loss, optimizer, batches, finding, steps=5)
    losses = []
    for x, y in batches[:5]:
        optimizer.zero_grad()
        losses.append(loss(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert trial.before.losses == tuple(float(each.detach()) for each in losses)


def test_a_rate_ten_times_lower_is_that():
    model, loss, optimizer, batches, finding = started("rate too high: Adam")
    trial = torch_bp.try_cure(model, loss, optimizer, batches, finding, steps=5)
    assert {reading.lr for reading in trial.before.readings} == {(1.0,)}
    assert {reading.lr for reading in trial.after.readings} == {(0.1,)}


def test_what_cannot_be_tried_says_so():
    *run, _ = started("dead units: biases", batches=2)
    trial = torch_bp.try_cure(*run, Finding("plateau", "", 3, 0.0, 0.01, "it stays", "a wider model"))
    assert not trial.cured
    assert str(trial) == "plateau: nothing was tried, its cure is a change of the code: a wider model"
    trial = torch_bp.try_cure(*run, Finding("softmax before its loss", "", 0, 2.0, 1.0, "", "", action="no softmax"))
    assert "is no module of the model" in trial.reason
    model = nn.Linear(64, 10)
    trial = torch_bp.try_cure(
        model,
        run[1],
        torch.optim.SGD(model.parameters()),
        run[3],
        Finding("x", "", 0, 0, 0, "", "", action="activation"),
    )
    assert "no activation of it" in trial.reason


def test_activations_that_rules_call_saturating_are_exchanged():
    batches = [(torch.randn(8, 4), torch.randn(8, 1))]
    finding = Finding("x", "", 0, 0, 0, "", "", action="activation")
    for name in SATURATING:
        model = nn.Sequential(nn.Linear(4, 4), getattr(nn, name)(), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trial = torch_bp.try_cure(model, nn.MSELoss(), optimizer, batches, finding, steps=1)
        assert trial.tried.startswith(f"{name} replaced by ReLU")


def test_a_watched_and_a_compiled_model_can_be_copied():
    model, loss, optimizer, batches, finding = started("exploding: large weights")
    with torch_bp.watch(model, optimizer, loss_fn=loss, every=1, budget=None) as monitor:
        trial = torch_bp.try_cure(torch.compile(model), loss, optimizer, batches, finding, steps=2)
        assert monitor.step == 0
    assert trial.cured


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("model", 3, TypeError, "model must be a torch.nn.Module, got int"),
        ("optimizer", None, TypeError, "optimizer must be a torch.optim.Optimizer, got NoneType"),
        ("finding", "dead", TypeError, "finding must be a Finding"),
        ("finding", Finding("x", "", 0, 0, 0, "", "", action="pray"), ValueError, "action must be one of lr"),
        ("batches", [], ValueError, "batches must be a list of pairs .*, got an empty one"),
        ("batches", 3, ValueError, "got int"),
        ("batches", [torch.ones(3)], ValueError, "batches must be a list of pairs"),
        ("batches", [((1, 2), 3)], TypeError, "inputs of batches must be tensors, got tuple"),
        ("steps", 0, ValueError, "steps must be a whole number of 1 or more, got 0"),
        ("steps", True, ValueError, "steps must be a whole number"),
    ],
)
def test_arguments(name, value, error, message):
    model = nn.Linear(2, 1)
    arguments = {
        "model": model,
        "loss_fn": nn.MSELoss(),
        "optimizer": torch.optim.SGD(model.parameters()),
        "batches": [(torch.ones(3, 2), torch.ones(3, 1))],
        "finding": Finding("x", "", 0, 0.0, 0.0, "", ""),
    }
    with pytest.raises(error, match=message):
        torch_bp.try_cure(**{**arguments, name: value})
