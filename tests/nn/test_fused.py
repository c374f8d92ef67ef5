"""Neighbours that run as one node compute what the modules compute one by one, and keep less."""

import copy
import pickle
from functools import partial

import pytest
import torch

import torch_bp
import torch_bp.nn as ours
from tests.benchmarks.memory import kept
from torch_bp import ops

ACTIVATIONS = ("sigmoid", "tanh", "relu", "leaky_relu", "hardtanh", "elu", "softplus", "silu", "gelu")
close = torch.testing.assert_close


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def twin(module):
    """The same network of torch's modules (and Residual), one after the other."""
    found = torch_bp.to_torch(module)
    found.fused = False
    return found


def derivatives(module, x):
    """Output, gradients, and gradients of their squares' sum."""
    torch.manual_seed(1)
    output = module(x)
    inputs = [x, *module.parameters()]
    first = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
    return output, first, torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("norm", [None, "batch", "layer"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "leaky_relu", "tanh"])
def test_mlp_is_its_plain_twin(activation, norm, dropout, residual):
    model = ours.MLP([6, 5, 5, 3], activation, norm, dropout, residual).double()
    plain, x = twin(model), draw(7, 6)
    for training in (True, False):
        close(derivatives(model.train(training), x), derivatives(plain.train(training), x))
    close(model.state_dict(), plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    close(pickle.loads(pickle.dumps(model))(x), copy.deepcopy(model)(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_mlp_compiles_whole():
    for norm in (None, "batch"):
        model, x = ours.MLP([6, 5, 5, 3], norm=norm).double(), draw(7, 6)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(x), twin(model)(x))


def test_mlp_under_torch_func():
    model, x = ours.MLP([6, 5, 3], "gelu", norm="layer").double(), draw(7, 6)
    values = dict(model.named_parameters())

    def loss(module, values, row):
        return torch.func.functional_call(module, values, (row[None],)).sin().sum()

    for transform in (torch.func.grad, torch.func.jacfwd):
        per_example = torch.func.vmap(transform(loss, argnums=1), in_dims=(None, None, 0))
        close(per_example(model, values, x), per_example(twin(model), values, x))


def test_hooks_run_and_see_what_they_saw():
    model, seen = ours.MLP([6, 5, 3], norm="batch"), []
    for layer in model:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    model(torch.randn(4, 6))
    assert seen == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_mlp_as_a_sequence():
    model = ours.MLP([6, 5, 3], dropout=0.5, init=None)
    assert [type(layer) for layer in model] == [ours.Linear, ours.ReLU, ours.Dropout, ours.Linear]
    assert type(model[:2]) is torch.nn.Sequential
    torch.manual_seed(0)
    model = ours.MLP([6, 5, 3], init=None)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5],), "sizes must be at least two"),
        (([5, 0, 2],), "sizes must be at least two"),
        (([5, 2], "swish"), "activation must be one of sigmoid"),
        (([5, 2, 2], "relu", "group"), "norm must be None"),
        (([5, 2, 2], "relu", None, 1.5), "dropout probability has to be between 0 and 1"),
    ],
)
def test_mlp_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ours.MLP(*arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_activation(activation):
    layer, x = ours.LinearActivation(4, 3, activation).double(), draw(5, 4)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 3), layer.activation).double()
    plain[0].load_state_dict(layer.state_dict(), strict=True)
    close(derivatives(layer, x), derivatives(plain, x))
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    close(again(x), plain(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 2)])
def test_batch_norm_activation(activation, shape):
    layer, x = ours.BatchNormActivation(4, activation).double(), draw(*shape)
    plain = torch.nn.Sequential(torch.nn.BatchNorm1d(4), layer.activation).double()
    for training in (True, False):
        close(derivatives(layer.train(training), x), derivatives(plain.train(training), x))
        close(layer.state_dict(), plain[0].state_dict())


@pytest.mark.parametrize("kind", [ours.LinearActivation, ours.BatchNormActivation])
def test_an_activation_that_cannot_be_joined(kind):
    sizes = (4, 3) if kind is ours.LinearActivation else (4,)
    with pytest.raises(TypeError, match=r"activation must be one of Sigmoid, .* got .*activation.ReLU"):
        kind(*sizes, torch.nn.ReLU())


def test_batch_norm_activation_and_the_next_layer_keep_one_tensor():
    x, weight, bias, following = draw(64, 8), draw(8), draw(8), draw(3, 8)
    for activation in (ops.relu, ops.gelu):
        node = partial(ops.batch_norm_activation, activation, (), x, None, None, weight, bias, True)
        _, found = kept(partial(node, following=(following, None)))
        assert [t.data_ptr() for t in found if t.numel() >= x.numel()] == [x.data_ptr()]


def test_saved_bytes_of_a_normalised_network():
    """Linear, BatchNorm1d, ReLU, eight times: torch keeps two tensors of the batch a block, the MLP one."""
    width, batch, blocks = 16, 512, 8
    model = ours.MLP([width] * (blocks + 1) + [width], norm="batch")[:-1]
    fused = ours.MLP([width] * (blocks + 1) + [width], norm="batch")
    plain = torch_bp.to_torch(model)
    x = torch.randn(batch, width)
    of_batch = []
    for module in (plain, fused):
        _, found = kept(partial(module, x))
        of_batch.append(sum(t.numel() for t in found if t.shape == x.shape))
    assert of_batch[0] == (1 + 2 * blocks) * x.numel()
    assert of_batch[1] == (1 + blocks) * x.numel()


def test_convert_joins_and_to_torch_takes_apart():
    shared = torch.nn.ReLU()
    plain = torch.nn.Sequential(
        torch.nn.Linear(4, 3),
        torch.nn.LeakyReLU(0.2),
        torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(3, 3)),
        torch.nn.Linear(3, 3),
        shared,
        torch.nn.Linear(3, 2),
        shared,
    ).double()
    plain[3].register_forward_hook(lambda *_: None)
    joined, x = torch_bp.convert(plain, fuse=True), draw(5, 4)
    kinds = [type(joined[0]), type(joined[1]), type(joined[2][0]), type(joined[2][1]), type(joined[3]), type(joined[5])]
    joint = ours.LinearActivation
    assert kinds == [joint, torch.nn.Identity, joint, torch.nn.Identity, ours.Linear, ours.Linear]
    assert list(joined.state_dict()) == list(plain.state_dict())
    close(derivatives(joined, x), derivatives(plain, x))
    apart = torch_bp.to_torch(joined)
    assert [type(m) for m in apart.modules()] == [type(m) for m in plain.modules()]
    close(derivatives(apart, x), derivatives(plain, x))
