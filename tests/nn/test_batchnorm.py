"""What batch normalisation keeps from batch to batch: the running statistics, which change once for each."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import torch_bp.nn as ours

theirs = torch.nn
KINDS = [
    {},
    {"momentum": 0.5},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
SHAPES = [(5, 3), (4, 3, 2), (1, 3, 4)]


def pair(dtype=torch.float64, **kind):
    """Our layer and torch's, with parameters that are not all ones and zeros."""
    layers = [module.BatchNorm1d(3, dtype=dtype, **kind) for module in (ours, theirs)]
    for name, parameter in layers[0].named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(3))
            layers[1].get_parameter(name).copy_(parameter)
    return layers


def step(layer, x):
    """Output and gradients of a batch."""
    x = x.clone().requires_grad_()
    output = layer(x)
    return output, torch.autograd.grad(output.sin().sum(), [x, *layer.parameters()])


@every_kind
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_in_training_and_then_evaluation(shape, kind):
    """Bit for bit: torch updates the statistics."""
    mine, other = pair(**kind)
    for number in range(5):
        if number == 3:
            mine.eval()
            other.eval()
        x = 3 + 2 * torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(step(mine, x), step(other, x), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_evaluation_changes_nothing():
    layer, _ = pair()
    layer(torch.randn(5, 3, dtype=torch.float64))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    step(layer.eval(), torch.randn(5, 3, dtype=torch.float64))
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


def test_a_batch_without_gradients_counts_too():
    mine, other = pair()
    x = torch.randn(5, 3, dtype=torch.float64)
    for layer in (mine, other):
        with torch.no_grad():
            layer(x)
    torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    assert mine.num_batches_tracked == 1


@pytest.mark.parametrize("kind", [{}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_no_further_batch(reentrant, kind):
    plain, _ = pair(**kind)
    layer, _ = pair(**kind)
    layer.load_state_dict(plain.state_dict())
    for _ in range(2):
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        expected = torch.autograd.grad(plain(x).sin().sum(), x)
        x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).sin().sum().backward()
        torch.testing.assert_close((x.grad,), expected)
    torch.testing.assert_close(dict(layer.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert layer.num_batches_tracked == 2


def test_a_graph_that_runs_again_is_no_further_batch():
    layer, _ = pair()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    after = layer.running_mean.clone()
    (slope,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
    torch.autograd.grad(slope.square().sum(), x)
    assert torch.equal(layer.running_mean, after)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_functional_transforms_move_them_once(transform):
    x = torch.randn(5, 3, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

        def loss(x, module=module, mean=mean, variance=variance):
            return module.functional.batch_norm(x, mean, variance, training=True).sin().sum()

        slope = grad(loss)(x) if transform == "grad" else jvp(loss, (x,), (torch.ones_like(x),))
        found.append((slope, mean, variance))
    torch.testing.assert_close(*found)
    assert found[0][1].abs().min() > 0


def test_vmap_over_models_and_batches():
    """Each model has its own statistics; statistics that all share are refused, in torch's words."""
    results, refusals = [], []
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    for layer in pair():
        buffers = {k: torch.stack([v, v]) for k, v in layer.named_buffers()}
        output = vmap(lambda b, x, layer=layer: functional_call(layer, b, (x,)))(buffers, x)
        results.append((output, buffers["running_mean"], buffers["running_var"]))
        with pytest.raises(RuntimeError, match="will be updated in place") as caught:
            vmap(layer)(x)
        refusals.append(str(caught.value))
    torch.testing.assert_close(*results)
    assert refusals[0] == refusals[1]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_they_move_once():
    torch._dynamo.reset()
    mine, other = pair()
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        mine.train(training)
        other.train(training)
        x = torch.randn(5, 3, dtype=torch.float64)
        torch.testing.assert_close(step(compiled, x), step(other, x))
        torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", ["half", "float32"])
def test_half_precision(dtype, parameters):
    """Values and statistics are torch's; gradients at least as near to float64's, as statistics are float32."""
    mine, other = pair(dtype=torch.float32 if parameters == "float32" else dtype)
    x = (3 + torch.randn(16, 3)).to(dtype)
    got, expected = step(mine, x), step(other, x)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    exact, _ = pair()
    exact.load_state_dict(mine.state_dict())
    reference = step(exact, x.double())[1]
    for found, torchs, right in zip(got[1], expected[1], reference):
        assert found.dtype == torchs.dtype
        ulp = torch.finfo(torchs.dtype).eps * right.abs().max()
        assert (found - right).abs().max() <= 1.5 * (torchs - right).abs().max() + ulp / 2


def test_one_value_per_channel():
    for shape in [(1, 3), (1, 3, 1)]:
        for layer in pair():
            with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                layer(torch.ones(shape, dtype=torch.float64))
            assert layer.eval()(torch.ones(shape, dtype=torch.float64)).shape == shape


def test_an_empty_batch_moves_nothing():
    for layer in pair():
        assert layer(torch.ones(0, 3, dtype=torch.float64)).shape == (0, 3)
        assert torch.equal(layer.running_mean, torch.zeros(3, dtype=torch.float64))


def test_what_is_saved():
    """The input and numbers per channel: nothing else of the input's size."""
    layer, _ = pair()
    x = torch.randn(64, 3, 5, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            layer.train(training)(x)
        assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]
        assert {t.numel() for t in kept} == {x.numel(), 3}


def test_a_frozen_layer_in_evaluation_keeps_no_input():
    layer = pair()[0].eval().requires_grad_(False)
    x = torch.randn(64, 3, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {t.numel() for t in kept} == {3}


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_the_gradient_lies_in_memory_as_the_input(shape):
    x = torch.randn(shape, requires_grad=True)
    (slope,) = torch.autograd.grad(ours.functional.batch_norm(x, None, None, training=True).sin().sum(), x)
    assert slope.is_contiguous()
