"""Tools of torch that take modules apart, replace their parameters or look through them."""

import pytest
import torch
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

import torch_bp.nn as ours

x = torch.randn(4, 3)


def same_gradients(mine, other, inputs=x):
    """Output and gradients of both agree."""
    results = []
    for module in (mine, other):
        output = module(inputs)
        results.append((output, torch.autograd.grad(output.sin().sum(), [*module.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def pair(*args, **kwargs):
    layers = []
    for module in (ours, torch.nn):
        torch.manual_seed(0)
        layers.append(module.Linear(*args, **kwargs))
    return layers


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers(dtype):
    mine, other = pair(3, 2, dtype=dtype)
    results = []
    for layer in (mine, other):
        z = x.to(dtype).mul(1 + 2j).requires_grad_()
        output = layer(z)
        slopes = torch.autograd.grad(output.abs().sum(), [z, *layer.parameters()])
        results.append((output, slopes))
    torch.testing.assert_close(*results)
    wide = [t.detach().to(torch.complex128).requires_grad_() for t in (x * 1j, *mine.parameters())]
    assert torch.autograd.gradcheck(ours.functional.linear, wide, check_forward_ad=True)


def test_parametrized_weights():
    mine, other = map(weight_norm, pair(3, 2))
    assert isinstance(mine, ours.Linear)
    same_gradients(mine, other)


def test_pruned_weights():
    mine, other = (prune.l1_unstructured(layer, "weight", amount=0.5) for layer in pair(3, 2))
    assert int((mine.weight == 0).sum()) == 3
    same_gradients(mine, other)


def test_skip_init():
    layer = torch.nn.utils.skip_init(ours.Linear, 3, 2)
    assert type(layer) is ours.Linear
    assert layer(x).shape == (4, 2)


def test_parameters_may_be_swapped():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = ours.Linear(3, 2)
        weight = layer.weight
        layer.double()
        assert layer.weight is weight
        assert layer(x.double()).dtype == torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_shared_weights():
    mine, other = pair(3, 3)
    same_gradients(ours.Sequential(mine, ours.Tanh(), mine), torch.nn.Sequential(other, torch.nn.Tanh(), other))


def test_averaged_model():
    mine, other = map(AveragedModel, pair(3, 2))
    mine.update_parameters(mine.module)
    other.update_parameters(other.module)
    same_gradients(mine, other)


def test_frozen_parameters_get_no_gradient():
    for name in ("weight", "bias"):
        layer = ours.Linear(3, 2)
        layer.get_parameter(name).requires_grad_(False)
        layer(x).sum().backward()
        assert {k for k, p in layer.named_parameters() if p.grad is None} == {name}


def test_gradients_accumulate():
    layer = ours.Linear(3, 2)
    layer(x).sum().backward()
    once = layer.weight.grad.clone()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * once)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_model():
    torch._dynamo.reset()
    model = ours.Sequential(ours.Linear(3, 5), ours.ReLU(inplace=True), ours.Linear(5, 2), ours.Softmax(-1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same_gradients(compiled, model)
    torch._dynamo.reset()


def test_export():
    """An exported program is torch's operations: it needs no torch_bp."""
    model = ours.Sequential(ours.Linear(3, 5), ours.Sigmoid(), ours.LeakyReLU(0.1), ours.LogSoftmax(-1)).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x.repeat(2, 1)), model(x.repeat(2, 1)))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"aten.linear.default", "aten.sigmoid.default"} <= names
