"""Corners of modules that run as one node: tied weights, hooks, checkpoints, models stacked for vmap."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import torch_bp
import torch_bp.nn as ours
from tests.nn.test_fused import draw, twin

close = torch.testing.assert_close


def test_tied_weights_with_and_without_a_graph_of_the_gradient():
    model, x = ours.MLP([5, 5, 5, 5], norm="batch").double(), draw(6, 5)
    model[3].weight = model[0].weight
    other = twin(model)
    for create_graph in (False, True):
        got = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()), create_graph=create_graph)
        close(got, torch.autograd.grad(other(x).sin().sum(), list(other.parameters()), create_graph=create_graph))


def test_tensor_hooks_run_once():
    model, x = ours.MLP([5, 5, 5], norm="batch").double(), draw(6, 5)
    calls = []
    model[1].weight.register_hook(lambda grad: calls.append(1))
    torch.autograd.grad(model(x).sin().sum(), list(model.parameters()), create_graph=True)
    assert calls == [1]


@pytest.mark.parametrize("activation", ["relu", "gelu", "elu", "softplus"])
def test_forward_over_reverse(activation):
    model, x = ours.MLP([4, 6, 6, 3], activation).double(), draw(5, 4)

    def product(module):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            (grad,) = torch.autograd.grad(module(dual).square().sum(), x)
            return forward_ad.unpack_dual(grad).tangent

    close(product(model), product(twin(model)))


@pytest.mark.parametrize("make", [lambda: ours.Linear(4, 3), lambda: ours.MLP([4, 5, 3], "gelu")])
def test_backward_through_a_stack_of_models(make):
    models, x = [make().double() for _ in range(3)], draw(5, 4)

    def gradients(module):
        values, _ = torch.func.stack_module_state([*models])
        outputs = torch.func.vmap(lambda v, x: torch.func.functional_call(module, v, (x,)), (0, None))(values, x)
        return torch.autograd.grad(outputs.sin().sum(), [x, *values.values()])

    close(gradients(models[0]), gradients(twin(models[0])))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_moves_the_statistics_once(reentrant):
    model, x = ours.MLP([5, 5, 5], norm="batch").double(), draw(6, 5)
    other = ours.MLP([5, 5, 5], norm="batch").double()
    other.load_state_dict(model.state_dict())
    gradients = [torch.autograd.grad(other(x).sin().sum(), list(other.parameters()))]
    checkpoint(model, x, use_reentrant=reentrant).sin().sum().backward()
    gradients.append(tuple(p.grad for p in model.parameters()))
    close(*gradients)
    close(model.state_dict(), other.state_dict())


def test_global_hooks_and_replaced_forwards_are_honoured():
    model, seen, x = ours.MLP([6, 5, 3], norm="batch"), [], torch.randn(4, 6)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    model(x)
    handle.remove()
    assert seen == ["Linear", "BatchNorm1d", "ReLU", "Linear", "MLP"]
    model[2].forward = lambda input: torch.zeros_like(input)
    close(model(x), model[3].bias.expand(4, 3))


def test_autocast_of_joint_modules_is_that_of_their_parts():
    for activation in ("softplus", "relu"):
        for norm in (None, "batch"):
            model, x = ours.MLP([6, 5, 3], activation, norm), torch.randn(4, 6)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got, expected = model(x), twin(model)(x)
            close(got, expected, rtol=0, atol=0)


def test_mlp_is_initialised_by_what_follows():
    torch.manual_seed(0)
    for residual in (False, True):
        model = ours.MLP([300, 300, 300, 300], "relu", residual=residual)
        *hidden, last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        for layer in hidden:  # He: variance 2 / n
            assert abs(layer.weight.var().item() * 300 / 2 - 1) < 0.05
        assert abs(last.weight.var().item() * 300 - 1) < 0.05  # Glorot: 2 / (n + m)
    joint = torch.nn.Sequential(ours.LinearActivation(4, 8), ours.Linear(8, 8), ours.BatchNormActivation(8))
    table = str(ours.init.auto_(joint)).splitlines()
    assert "relu" in table[1]
    assert "relu" in table[2]


@pytest.mark.parametrize("make", [lambda: ours.LinearActivation(3, 3), lambda: ours.BatchNormActivation(3)])
def test_to_torch_leaves_joint_modules_whole(make):
    module, x = make(), torch.randn(4, 3)
    model = torch.nn.Sequential(module, ours.Linear(3, 2))
    found = torch_bp.to_torch(model)
    close(found(x), model(x))
    assert type(found[0]) is type(module)
    assert type(found[1]) is torch.nn.Linear
    assert torch_bp.conversion(found).kept == {"0": f"torch has no {type(module).__name__}"}


def test_all_shares_of_the_weights_are_zero():
    z, weight, target = torch.randn(2, 3, requires_grad=True), torch.tensor([0.0, 1, 1]), torch.tensor([0, 0])
    found = [torch.autograd.grad(m.nll_loss(z, target, weight), z) for m in (ours.functional, torch.nn.functional)]
    close(*found, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("activation", [ours.GELU(), ours.GELU(approximate="tanh")])
def test_compile_for_any_shapes(activation):
    model = torch.nn.Sequential(ours.Linear(4, 4), activation, activation)
    x = torch.randn(3, 4, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, backend="aot_eager", fullgraph=True)
    close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(torch_bp.to_torch(model)(x).sum(), x))


def test_labels_that_float32_cannot_hold():
    for ignored in (2**31 - 1, 2**24 + 1, -(2**24) - 1, 2**62 + 1):
        for name in ("cross_entropy", "nll_loss"):
            z = torch.randn(6, 4, requires_grad=True)
            target = torch.tensor([0, ignored, 2, 3, ignored, 1])
            found = [
                torch.autograd.grad(getattr(module, name)(z, target, ignore_index=ignored), z)
                for module in (ours.functional, torch.nn.functional)
            ]
            close(*found)
