"""Healthy runs of kinds that are not in tests/faults, of which nothing is said."""

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, gelu

from torch_bp import watch
from torch_bp.diagnostics import LayerReading, Reading, Spread, diagnose

ALWAYS = {"every": 1, "budget": None}
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = X.argmax(1) % 3


def kinds(*readings):
    return [found.kind for found in diagnose(readings)]


def watched(model, parameters=None, steps=40, lr=3e-3):
    optimizer = torch.optim.Adam(model.parameters() if parameters is None else parameters, lr=lr)
    loss_fn = nn.CrossEntropyLoss()
    with watch(model, optimizer, loss_fn=loss_fn, **ALWAYS) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn(model(X), Y).backward()
            optimizer.step()
    assert monitor.last.loss < monitor.readings[0].loss
    return monitor


class Block(nn.Module):
    """A residual branch whose last layer begins as 0."""

    def __init__(self, size, norm):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(size), nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size, bias=False)
        self.last = nn.BatchNorm1d(size) if norm else nn.Identity()
        nn.init.zeros_(self.last.weight if norm else self.down.weight)

    def forward(self, x):
        return x + self.last(self.down(gelu(self.up(self.norm(x)))))


@pytest.mark.parametrize("norm", [False, True])
def test_residual_branches_that_begin_as_nothing(norm):
    torch.manual_seed(0)
    monitor = watched(nn.Sequential(nn.Linear(8, 32), Block(32, norm), Block(32, norm), nn.Linear(32, 3)))
    assert monitor.readings[0].layers["2.last" if norm else "2.down"].weight_norm == 0
    assert monitor.findings == []


def test_a_head_that_begins_as_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    nn.init.zeros_(model[4].weight)
    monitor = watched(model, lr=1e-5, steps=5)
    assert 0 < monitor.readings[1].layers["0"].signal_norm / monitor.readings[1].layers["4"].signal_norm < 1e-3
    assert "vanishing gradient" not in [found.kind for found in monitor.findings]


def test_all_weights_zero_is_no_such_branch():
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    for p in model.parameters():
        nn.init.zeros_(p)
    with watch(model, torch.optim.SGD(model.parameters(), lr=0.1), **ALWAYS) as monitor:
        cross_entropy(model(X), Y).backward()
        monitor.optimizer.step()
    assert [(found.kind, found.layer) for found in monitor.findings] == [("bad initialization", "0")]


def test_a_signal_that_reaches_the_first_layer_by_another_way():
    def reading(first):
        sizes = {"stem": first, "branch": 1e-6, "head": 1.0}
        return Reading(60, layers={n: LayerReading(n, "Linear", signal_norm=s) for n, s in sizes.items()})

    assert kinds(reading(0.5)) == []
    assert kinds(reading(1e-4)) == ["vanishing gradient"]


def test_the_scale_of_weights_before_a_normalisation_does_not_matter():
    def reading(kind):
        layers = [
            LayerReading("a", "Conv2d", activation_var=1e-4, signal_norm=1.0),
            LayerReading("b", kind, signal_norm=1.0),
        ]
        return Reading(0, layers={x.name: x for x in layers}, input=Spread(8, 0.0, 1.0, 0.0, 0.0))

    assert kinds(reading("BatchNorm2d")) == []
    assert kinds(reading("Conv2d")) == ["bad initialization"]


def test_gradients_from_before_a_layer_was_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    cross_entropy(model(X), Y).backward()
    for p in model[0].parameters():
        p.requires_grad_(False)
    monitor = watched(model, model[2].parameters())
    assert monitor.findings == []
    assert monitor.last.frozen == ("0.weight", "0.bias")


def test_an_optimizer_that_still_moves_a_frozen_layer_is_seen_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    cross_entropy(model(X), Y).backward()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, **ALWAYS) as monitor:
        cross_entropy(model(X), Y).backward()
        optimizer.step()
    assert monitor.last.layers["0"].update_norm > 0


@pytest.mark.parametrize("which", [0, 1])
def test_two_optimizers_of_one_model(which):
    """Gradients that the other one has left are its own business, and so are parameters."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "g": nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(), nn.Linear(16, 8)),
            "d": nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(), nn.Linear(16, 1)),
        }
    )
    g, d = model["g"], model["d"]
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (g, d)]
    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
    with watch(model, optimizers[which], **ALWAYS) as monitor:
        for _ in range(20):
            made = g(torch.randn(64, 8))
            optimizers[0].zero_grad()
            binary_cross_entropy_with_logits(d(made), ones).backward()
            optimizers[0].step()
            optimizers[1].zero_grad()
            parts = (
                binary_cross_entropy_with_logits(d(X), ones),
                binary_cross_entropy_with_logits(d(made.detach()), zeros),
            )
            sum(parts).backward()
            optimizers[1].step()
    assert monitor.findings == []


def test_a_batch_without_a_gradient_says_nothing_of_the_rate():
    def reading(step, ratio, norm):
        layers = {"a": LayerReading("a", "Linear", update_ratio=ratio, grad_norm=norm)}
        return Reading(step, lr=(0.1,), layers=layers, grad_norm=norm)

    assert kinds(*[reading(step, 1e-2 * (step < 5), 1.0 * (step < 5)) for step in range(6)]) == []
    assert kinds(*[reading(step, 0.0, 0.0) for step in range(6)]) == []
    assert kinds(*[reading(step, 1e-8, 1.0) for step in range(6)]) == ["rate too low"]


def test_an_input_whose_squares_overflow_is_not_infinite():
    torch.manual_seed(0)
    model, optimizer_of = nn.Sequential(nn.Linear(8, 3)), torch.optim.SGD
    with watch(model, optimizer_of(model.parameters(), lr=0.1), level="full", **ALWAYS) as monitor:
        (model(X * 1e37).sigmoid().sum() * 0 + model(X).sum()).backward()
        monitor.optimizer.step()
    assert monitor.last.input_finite.ok
    assert not monitor.last.input.std < float("inf")
    assert [(f.kind, f.value) for f in monitor.findings if f.layer == "0" and "input" in f.kind] == [
        ("unscaled input", float("inf"))
    ]
    assert not [f for f in monitor.findings if "the input has" in f.cause]


def test_positions_and_a_head_that_begin_as_nothing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.body, self.head = nn.Parameter(torch.zeros(8)), nn.Linear(8, 32), nn.Linear(32, 3)
            nn.init.zeros_(self.head.weight)

        def forward(self, x):
            return self.head(self.body(x + self.positions).tanh())

    torch.manual_seed(0)
    assert watched(Model()).findings == []
