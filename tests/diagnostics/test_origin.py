"""The first NaN or infinity of a step, by a replay."""

import pytest
import torch
from torch import nn

from tests.faults.faults import Root
from torch_bp.diagnostics import find_origin

NAN, INF = float("nan"), float("inf")


def network(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 4), activation(), nn.Linear(4, 2))


def batch():
    return torch.randn(6, 3), torch.randint(2, (6,))


def test_a_step_that_is_well():
    assert find_origin(network(), nn.CrossEntropyLoss(), *batch()) is None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_input(value):
    x, y = batch()
    x[4, 1] = x[2, 0] = value
    found = find_origin(network(), nn.CrossEntropyLoss(), x, y, step=9)
    assert (found.layer, found.step, found.value) == ("", 9, 2.0)
    assert "input 0 has 2 NaN or infinite values of 18 (examples 2, 4)" in found.cause


def test_a_target():
    x = torch.randn(6, 3)
    y = torch.ones(6, 2)
    y[5] = NAN
    assert (
        "the target has 2 NaN or infinite values of 12 (example 5)" in find_origin(network(), nn.MSELoss(), x, y).cause
    )


@pytest.mark.parametrize("name", ["2.weight", "2.bias"])
def test_a_weight(name):
    model = network()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = NAN
    found = find_origin(model, nn.CrossEntropyLoss(), *batch())
    assert (found.layer, found.cause) == ("2", f"{name} has 1 NaN or infinite values before the step")


def test_a_buffer():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].running_var[0] = NAN
    assert "1.running_var" in find_origin(model, nn.CrossEntropyLoss(), *batch()).cause


def test_forward_and_what_float64_would_do():
    model = network(nn.Identity)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1e20)
    x, y = batch()
    x = x.abs() + 1
    x[0] = 0.0  # the bias alone overflows nothing
    found = find_origin(model, nn.CrossEntropyLoss(), x, y)
    assert found.layer == "2"
    assert "forward: Linear makes 20 NaN or infinite values of 24 (examples 1, 2, 3, 4, 5)" in found.cause
    assert "in float64 all is finite" in found.cause


def test_backward():
    found = find_origin(network(Root), nn.CrossEntropyLoss(), *batch())
    assert found.layer == "3"
    assert found.cause.startswith("backward: the derivative of 3 makes")
    assert "in float64" not in found.cause


def test_a_loss():
    def loss(output, target):
        return (output * 0).log().sum()

    found = find_origin(network(), loss, *batch())
    assert (found.layer, found.cause.split(":")[0]) == ("", "the loss is not finite, while all that it gets is")


def test_a_gradient_of_a_parameter():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.scale.sqrt()

    found = find_origin(nn.Sequential(nn.Linear(3, 2), Scale()), nn.CrossEntropyLoss(), *batch())
    assert (found.layer, "gradient of 1.scale" in found.cause) == ("1", True)


def test_the_model_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    x, y = batch()
    numbers = torch.get_rng_state()
    find_origin(model, nn.CrossEntropyLoss(), x, y)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert not model[0]._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_several_inputs():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    a, b = torch.ones(3, 2), torch.full((3, 2), NAN)
    assert "input 1 has 6" in find_origin(Sum(), nn.MSELoss(), (a, b), torch.ones(3, 2)).cause
