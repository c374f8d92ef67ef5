"""Tools of torch that take modules apart, replace their parameters or look through them."""

import os
import shutil

import pytest
import torch
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

import torch_bp.nn as ours
from tests.nn.test_modules import ROWS, build

x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


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
    hidden = [ours.Linear(3, 5), ours.ReLU(inplace=True), ours.Linear(5, 4), ours.ELU(inplace=True)]
    model = ours.Sequential(*hidden, ours.Linear(4, 2), ours.Softmax(-1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same_gradients(compiled, model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_export():
    """An exported program is torch's operations: it needs no torch_bp."""
    model = ours.Sequential(ours.Linear(3, 5), ours.Sigmoid(), ours.LeakyReLU(0.1), ours.LogSoftmax(-1)).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x.repeat(2, 1)), model(x.repeat(2, 1)))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"aten.linear.default", "aten.sigmoid.default"} <= names


class Everything(torch.nn.Module):
    """A classifier with most of the layers, and its loss as the output."""

    def __init__(self, module):
        super().__init__()
        hidden = [module.Linear(3, 5), module.BatchNorm1d(5), module.ReLU(inplace=True), module.Dropout(0.0)]
        self.body = torch.nn.Sequential(*hidden, module.LayerNorm(5), module.GELU(), module.Linear(5, 3))
        self.losses = torch.nn.ModuleList([module.CrossEntropyLoss(label_smoothing=0.1), module.BCEWithLogitsLoss()])

    def forward(self, input):
        output = self.body(input)
        return self.losses[0](output, input.argmax(1)) + self.losses[1](output, input.sigmoid())


def everything():
    models = []
    for module in (ours, torch.nn):
        torch.manual_seed(0)
        models.append(Everything(module))
    return models


@pytest.fixture
def process_group():
    """A group of this process alone."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
def test_data_parallel(process_group, options):
    """Gradients arrive through the hooks that reduce them, and are reduced."""
    mine, other = everything()
    reduced = []

    def count(state, bucket):
        reduced.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel = DistributedDataParallel(mine, **options)
    parallel.register_comm_hook(None, count)
    for _ in range(2):
        parallel(x).backward()
        other(x).backward()
    torch.testing.assert_close([p.grad for p in mine.parameters()], [p.grad for p in other.parameters()])
    assert sum(reduced) == 2 * sum(p.numel() for p in mine.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_inductor():
    """Compiled to machine code, in training, in evaluation and without gradients."""
    torch._dynamo.reset()
    mine, other = everything()
    compiled = torch.compile(mine, fullgraph=True)
    same_gradients(compiled, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), other(x))
    torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()))
    torch._dynamo.reset()


class Leaves(torch.fx.Tracer):
    """Takes modules of torch_bp for leaves, as torch's tracer takes torch's."""

    def is_leaf_module(self, module, name):
        return type(module).__module__.startswith("torch_bp.") or super().is_leaf_module(module, name)


@pytest.mark.parametrize(("name", "kwargs", "inputs"), ROWS, ids=[f"{r[0]}-{i}" for i, r in enumerate(ROWS)])
def test_symbolic_tracing(name, kwargs, inputs):
    """A tracer that enters `BatchNorm1d` or `Residual` meets a question for a shape, which has no answer there."""
    inputs, module = [i.clone() for i in inputs], build(ours, name, kwargs)
    expected = build(ours, name, kwargs)(*(i.clone() for i in inputs))
    if name in ("BatchNorm1d", "BatchNormActivation", "Residual") or kwargs.get("norm") == "batch":
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(module)
        module = torch.nn.Sequential(module)
        traced = torch.fx.GraphModule(module, Leaves().trace(module))
        assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    else:
        traced = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(traced(*inputs), expected)
