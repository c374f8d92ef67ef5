"""What a graph through an operation keeps, runs and survives."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.ops.test_values import assert_same, gradients
from tests.tables import ROWS
from torch_bp.kernels import use
from torch_bp.nn import functional as F

FILLED = [row for row in ROWS if not row.empty]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
filled_rows = pytest.mark.parametrize("row", FILLED, ids=lambda row: row.id)
# Eq. 1 knows no weight of one dimension, and a batch without examples has no mean: these are torch's from end to end.
TORCHS = {"linear-weight vector", "batch_norm-empty"}
our_rows = pytest.mark.parametrize("row", [r for r in ROWS if r.id not in TORCHS], ids=lambda row: row.id)
BY_FORMULA = [
    *("sigmoid", "tanh", "relu", "leaky_relu", "hardtanh"),
    *("mse_loss", "half_mse_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
]


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@our_rows
def test_backward_is_ours(row):
    """No backward kernel of torch's runs."""
    mine, _, tensors = row.pair(requires_grad=True)
    output = mine(*tensors)
    with Recorder() as recorder:
        torch.autograd.grad(output, tensors, torch.ones_like(output))
    assert recorder.names
    assert not [name for name in recorder.names if "_backward" in name]


def operations(row, wanted):
    """Names of the operations that a backward to the arguments `wanted` runs."""
    drawn = row.draw()
    tensors = [drawn[k].requires_grad_() for k in wanted]
    output = row.ours(**drawn)
    with Recorder() as recorder:
        torch.autograd.grad(output, tensors, torch.ones_like(output))
    return recorder.names


@pytest.mark.parametrize("row", [row for row in ROWS if len(row.differentiable) > 1], ids=lambda row: row.id)
def test_gradients_that_nobody_wants_are_not_computed(row):
    """Squared error's gradient at the target is minus the one at the input, so only the input's is cheaper there.

    In batch normalisation of a batch the parameters' gradients are part of the input's, so only theirs are.
    """
    first, *others = (len(operations(row, [wanted])) for wanted in row.differentiable)
    all_of_them = len(operations(row, row.differentiable))
    if row.name == "batch_norm" and row.arguments["training"]:
        assert first <= all_of_them > max(others)
    else:
        assert first < all_of_them
    assert all(other <= all_of_them for other in others)


@pytest.mark.parametrize("name", BY_FORMULA)
def test_a_kernel_serves_the_backward(name):
    """No arithmetic of torch's runs; a profiler sees that without watching as a mode does, which no kernel serves."""
    mine, _, tensors = next(row for row in ROWS if row.name == name).pair(torch.float32, requires_grad=True)
    gradients(mine, tensors)
    arithmetic = {"aten::sub", "aten::rsub", "aten::where"}
    for engine in ("numba", "torch"):
        output = mine(*tensors)
        with use(engine), torch.autograd.profiler.profile() as profile:
            torch.autograd.grad(output, tensors[0], torch.ones_like(output))
        assert arithmetic.isdisjoint(event.name for event in profile.function_events) == (engine == "numba")


def saved(function):
    """What `function` saves for backward."""
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function()
    return kept


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "relu"])
def test_activations_save_their_output_alone(name):
    input = torch.randn(4, 3, requires_grad=True)
    outputs = []
    kept = saved(lambda: outputs.append(getattr(F, name)(input)))
    assert [tensor.data_ptr() for tensor in kept] == [outputs[0].data_ptr()]


def test_leaky_relu_saves_its_input_so_that_its_output_may_be_altered():
    input = torch.randn(4, 3, requires_grad=True)
    kept = saved(lambda: F.leaky_relu(input))
    assert [tensor.data_ptr() for tensor in kept] == [input.data_ptr()]
    output = F.leaky_relu(input * 1, 0.1)
    output += 1
    output.sum().backward()
    torch.testing.assert_close(input.grad, torch.where(input > 0, 1.0, 0.1))


@pytest.mark.parametrize("name", ["hardtanh", "elu", "softplus", "silu", "gelu"])
def test_other_activations_save_their_input_alone(name):
    input = torch.randn(4, 3, requires_grad=True)
    kept = saved(lambda: getattr(F, name)(input))
    assert [tensor.data_ptr() for tensor in kept] == [input.data_ptr()]


def test_hardtanh_in_place_saves_its_output_alone():
    kept, hidden = [], torch.randn(4, 3, requires_grad=True) * 1
    kept = saved(lambda: F.hardtanh(hidden, inplace=True))
    assert len(kept) == 1


def test_layer_norm_saves_its_input_and_two_numbers_per_example():
    input, weight = torch.randn(8, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    kept = saved(lambda: F.layer_norm(input, (5,), weight))
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() == 40] == [input.data_ptr()]
    assert sorted(tensor.numel() for tensor in kept) == [5, 8, 8, 40]


def test_linear_saves_what_the_wanted_gradients_need():
    tensors = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
    needed = {0: [1], 1: [0], 2: []}
    for wanted, expected in needed.items():
        args = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        kept = saved(lambda args=args: F.linear(*args))
        assert [tensor.data_ptr() for tensor in kept] == [args[i].data_ptr() for i in expected]


def test_cross_entropy_saves_no_softmax():
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    kept = saved(lambda: F.cross_entropy(logits, target))
    inputs = {logits.data_ptr(), target.data_ptr()}
    others = [tensor for tensor in kept if tensor.data_ptr() not in inputs]
    assert len(kept) - len(others) == 2
    assert sum(tensor.numel() for tensor in others) == 2 * len(target)  # of each row its maximum and a sum


def test_a_frozen_layer_keeps_no_activations():
    inner, weight = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3)
    activations = torch.sin(inner)
    alive = weakref.ref(activations)
    output = F.linear(activations, weight)
    del activations
    assert alive() is None
    output.sum().backward()
    assert inner.grad is not None


@every_row
def test_nothing_is_recorded_where_nothing_is_wanted(row):
    mine, _, tensors = row.pair()
    assert mine(*tensors).grad_fn is None
    tensors = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        assert saved(lambda: mine(*tensors)) == []
        assert mine(*tensors).grad_fn is None
    with torch.inference_mode():
        assert mine(*tensors).is_inference()


@our_rows
def test_a_graph_may_be_run_again(row):
    mine, _, tensors = row.pair(requires_grad=True)
    output = mine(*tensors)
    first = torch.autograd.grad(output.sum(), tensors, retain_graph=True, create_graph=True)
    second = torch.autograd.grad(output.sum(), tensors)
    assert_same(second, first, torch.float64)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), tensors)


@filled_rows
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(row, reentrant):
    mine, _, tensors = row.pair(requires_grad=True)
    expected = gradients(mine, tensors)
    output = checkpoint(mine, *tensors, use_reentrant=reentrant)
    slopes = [None] * len(tensors)
    for i, tensor in enumerate(tensors):
        tensor.register_hook(lambda grad, i=i: slopes.__setitem__(i, grad))
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64))
    assert_same((output, tuple(slopes)), expected, torch.float64)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@filled_rows
def test_anomaly_mode(row):
    mine, _, tensors = row.pair(requires_grad=True)
    expected = gradients(mine, tensors)
    with torch.autograd.detect_anomaly():
        assert_same(gradients(mine, tensors), expected, torch.float64)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_anomaly_mode_names_our_node():
    output = F.tanh(torch.ones(2, requires_grad=True))
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="'TanhBackward' returned nan values"):
        output.backward(torch.full((2,), torch.nan))


@filled_rows
def test_batched_upstream_gradients(row):
    mine, other, tensors = row.pair(requires_grad=True)
    output = mine(*tensors)
    upstream = torch.randn(3, *output.shape, dtype=torch.float64)
    got = torch.autograd.grad(output, tensors, upstream, is_grads_batched=True)
    expected = torch.autograd.grad(other(*tensors), tensors, upstream, is_grads_batched=True)
    assert_same(got, expected, torch.float64)


class Tagged(torch.Tensor):
    """A subclass that goes through `__torch_function__`."""


@every_row
def test_tensor_subclasses(row):
    mine, other, tensors = row.pair()
    tagged = [t.as_subclass(Tagged).requires_grad_() for t in tensors]
    plain = [t.clone().requires_grad_() for t in tensors]
    output, slopes = gradients(mine, tagged)
    expected, expected_slopes = gradients(other, plain)
    assert type(output) is Tagged
    assert_same(output.as_subclass(torch.Tensor), expected, torch.float64)
    assert_same(tuple(s.as_subclass(torch.Tensor) for s in slopes), expected_slopes, torch.float64)


class Overrider:
    """Not a tensor: only its protocol is."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function, args, kwargs


@pytest.mark.parametrize("name", sorted({row.name for row in ROWS}))
def test_torch_function_gets_our_function(name):
    row = next(row for row in ROWS if row.name == name)
    drawn = row.draw() | {"input": Overrider()}
    function, args, kwargs = row.ours(**drawn)
    assert function.__name__ == name
    assert isinstance((*args, *(kwargs or {}).values())[0], Overrider)


def test_threads():
    """Several Python threads, forward and backward at once, with the numbers of one."""
    pairs = [row.pair(torch.float32, requires_grad=True) for row in FILLED]
    expected = [gradients(mine, tensors) for mine, _, tensors in pairs]
    with ThreadPoolExecutor(4) as pool:
        rounds = [pool.submit(lambda: [gradients(mine, tensors) for mine, _, tensors in pairs]) for _ in range(4)]
    for done in rounds:
        assert_same(done.result(), expected, torch.float32)


@pytest.mark.parametrize("row", [row for row in ROWS if len(row.differentiable) > 1], ids=lambda row: row.id)
def test_gradients_share_no_memory(row):
    mine, _, tensors = row.pair(torch.float32, requires_grad=True)
    slopes = gradients(mine, tensors)[1]
    assert len({id(slope) for slope in slopes}) == len(slopes)
    places = [slope.data_ptr() for slope in slopes if slope.numel()]
    assert len({*places}) == len(places)
