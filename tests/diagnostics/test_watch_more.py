"""What a monitor reads of convolutions, under autocast, and of an optimizer that calls a closure."""

import math

import pytest
import torch

from torch_bp import nn, optim, watch

ALWAYS = {"every": 1, "budget": None}
X = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(2))


def convolutions():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(4, 5, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(5 * 64, 3),
    )


def heard_by_hooks(model, x, y, names):
    """Outputs of modules and the gradients there, by torch alone."""
    kept = {}
    hooks = []

    def keep(name, z):
        z.retain_grad()
        kept[name] = z

    for name in names:
        hook = lambda module, args, z, name=name: keep(name, z)  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return kept


@pytest.mark.parametrize("level", ["layers", "full"])
def test_convolutions(level):
    model, loss_fn = convolutions(), nn.CrossEntropyLoss()
    with torch.no_grad():
        model[1].bias[2], model[3].bias[1] = -100.0, -100.0  # these channels are dead
    kept = heard_by_hooks(model, X, Y, "02346")
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, loss_fn=loss_fn, level=level, **ALWAYS) as monitor:
        loss_fn(model(X), Y).backward()
        optimizer.step()
    reading = monitor.last
    for name, active, units in (("0", "2", 4), ("3", "4", 5)):
        layer, z, a = reading.layers[name], kept[name], kept[active]
        assert layer.signal_norm == pytest.approx(z.grad.norm().item(), rel=1e-4)
        assert (layer.activation_mean, layer.activation_var) == pytest.approx(
            (a.mean().item(), a.var(correction=0).item()), rel=1e-4
        )
        assert (layer.units, layer.activation, layer.dead_units) == (units, "ReLU", 1)
        assert layer.saturated == pytest.approx((a == 0).float().mean().item(), rel=1e-4)
        assert layer.per_example is None
        if level == "full":
            assert [(dead.unit, dead.cause) for dead in layer.dead] == [(2 if name == "0" else 1, "bias")]
            assert sum(layer.histogram.counts) == a.numel()
    assert reading.layers["0"].weight_factor == pytest.approx(
        (kept["2"].grad.norm() / kept["3"].grad.norm()).item(), rel=1e-4
    )
    assert reading.layers["6"].signal_norm == pytest.approx(kept["6"].grad.norm().item(), rel=1e-4)


@pytest.mark.parametrize("level", ["summary", "layers", "full"])
@pytest.mark.parametrize("room", [torch.nn, nn], ids=["torchs", "ours"])
def test_autocast(room, level):
    torch.manual_seed(0)
    model, loss_fn = torch.nn.Sequential(room.Linear(5, 8), room.Tanh(), room.Linear(8, 3)), torch.nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 5)
    y = torch.randint(3, (16,))
    with torch.autocast("cpu", torch.bfloat16):
        kept = heard_by_hooks(model, x, y, "012")
    with watch(model, optimizer, loss_fn=loss_fn, level=level, **ALWAYS) as monitor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
    reading = monitor.last
    assert reading.loss == pytest.approx(loss.item())
    for name in "02":
        assert reading.layers[name].signal_norm == pytest.approx(kept[name].grad.double().norm().item(), rel=1e-5)
    assert reading.layers["0"].activation_mean == pytest.approx(kept["1"].double().mean().item(), rel=1e-5)
    if level == "full":
        # the layer's input was cast: what its gradient is made of
        d, a = kept["2"].grad.double(), kept["1"].double()
        one_by_one = (d.square().sum(1) * (a.square().sum(1) + 1)).sqrt() * 16
        assert reading.layers["2"].per_example.mean == pytest.approx(one_by_one.mean().item(), rel=1e-2)


def test_an_optimizer_that_calls_a_closure_several_times():
    torch.manual_seed(0)
    model, loss_fn = nn.MLP([5, 8, 3], activation="tanh"), nn.CrossEntropyLoss()
    x, y = torch.randn(16, 5), torch.randint(3, (16,))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        calls.append((loss.item(), [p.detach().clone() for p in model.parameters()]))
        return loss

    with watch(model, optimizer, loss_fn=loss_fn, level="full", **ALWAYS) as monitor:
        for _ in range(2):
            calls.clear()
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step(closure)
    assert len(calls) > 1
    reading = monitor.last
    assert reading.step == 1
    gradients = [p.grad for p in model.parameters()]
    assert reading.grad_norm == pytest.approx(math.sqrt(sum(g.square().sum() for g in gradients)), rel=1e-5)
    updates = [p.detach() - b for p, b in zip(model.parameters(), before)]
    assert reading.layers["0"].update_norm == pytest.approx(
        math.sqrt(sum(u.square().sum() for u in updates[:2])), rel=1e-4
    )
    assert reading.layers["0"].weight_norm == pytest.approx(
        math.sqrt(sum(b.square().sum() for b in before[:2])), rel=1e-5
    )
    assert reading.predicted_decrease == pytest.approx(
        -sum((g * u).sum() for g, u in zip(gradients, updates)).item(), rel=1e-4
    )
    # of the last call alone, at the weights it was called with
    loss, weights = calls[-1]
    assert reading.loss == pytest.approx(loss)
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights):
            p.copy_(w)
    model.fused = False
    kept = heard_by_hooks(model, x, y, "02")
    for name in "02":
        assert reading.layers[name].signal_norm == pytest.approx(kept[name].grad.norm().item(), rel=1e-5)
    assert reading.batch == 16
