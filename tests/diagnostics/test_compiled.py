"""A compiled model is heard as the same model that is not, in one graph, compiled once."""

import logging

import pytest
import torch

from torch_bp import nn, optim, watch

# Dynamo makes an object of each autograd Function that it traces
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
_drawn = torch.Generator().manual_seed(1)
X, Y = torch.randn(12, 5, generator=_drawn), torch.randint(0, 3, (12,), generator=_drawn)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("room", [torch.nn, nn], ids=["torchs", "ours"])
def test_one_graph_and_the_same_readings(backend, room):
    torch._dynamo.reset()
    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        layers = [room.Linear(5, 8), room.ReLU(), room.Linear(8, 7), room.Tanh(), room.Linear(7, 3)]
        model, loss_fn = torch.nn.Sequential(*layers), torch.nn.CrossEntropyLoss()
        for p in model[0].parameters():
            p.requires_grad_(False)
        optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        run = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        watched = watch(run, optimizer, loss_fn=loss_fn, level="summary", every=2, budget=None)
        with watched as monitor, torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                optimizer.zero_grad()
                loss_fn(run(X), Y).backward()
                optimizer.step()
        assert [r.step for r in monitor.readings] == [0, 2]
        found.append(monitor.last)
    for (name, layer), (other_name, other) in zip(found[0].layers.items(), found[1].layers.items(), strict=True):
        assert name == other_name
        assert (layer.forward, layer.backward, layer.activation) == (other.forward, other.backward, other.activation)
        for field in (
            "signal_norm",
            "derivative_factor",
            "weight_factor",
            "activation_mean",
            "grad_norm",
            "update_ratio",
        ):
            expected = getattr(other, field)
            assert getattr(layer, field) == (None if expected is None else pytest.approx(expected, rel=1e-5)), field
    assert found[0].layers["0"].signal_norm is None


def test_what_is_not_measured_of_a_compiled_model_is_said(caplog):
    torch._dynamo.reset()
    model = torch.compile(torch.nn.Sequential(torch.nn.Linear(5, 3)), backend="eager")
    with caplog.at_level(logging.WARNING):
        watch(model, level="summary").close()
        assert not [r for r in caplog.records if r.name.startswith("torch_bp")]
        watch(model, level="full").close()
    assert "as at level 'summary', got level 'full'" in caplog.records[0].getMessage()


@pytest.mark.parametrize("before", [True, False])
def test_a_model_that_ran_before_it_was_watched(before, caplog):
    torch._dynamo.reset()
    model, loss_fn = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), nn.MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    run = torch.compile(model, backend="aot_eager")
    if before:
        run(X)
    with caplog.at_level(logging.WARNING), watch(run, optimizer, level="summary", every=1, budget=None) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(run(X), torch.zeros(12, 3)).backward()
            optimizer.step()
    heard = monitor.last.layers["0"].forward is not None
    said = [r.getMessage() for r in caplog.records if r.name.startswith("torch_bp")]
    assert heard or len(said) == 1
    assert ["nothing is heard of the layers" in text for text in said] == ([] if heard else [True])
    assert heard or before
