"""What a module must do to stand where torch's stood: one row per class, properties for every row."""

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import torch_bp
import torch_bp.nn as ours

theirs = torch.nn
numbers = torch.Generator().manual_seed(0)  # what is imported before this file has drawn from torch's own
x, unit = torch.randn(4, 3, generator=numbers), torch.rand(4, 3, generator=numbers)
classes, weight = torch.tensor([0, 2, 1, 0]), torch.rand(3, generator=numbers)
TORCHS = [
    ("Linear", {"in_features": 3, "out_features": 2}, (x,)),
    ("Linear", {"in_features": 3, "out_features": 2, "bias": False, "dtype": torch.float64}, (x.double(),)),
    ("Sigmoid", {}, (x,)),
    ("Tanh", {}, (x,)),
    ("ReLU", {}, (x,)),
    ("ReLU", {"inplace": True}, (x,)),
    ("LeakyReLU", {}, (x,)),
    ("LeakyReLU", {"negative_slope": 0.2, "inplace": True}, (x,)),
    ("Hardtanh", {"min_val": -0.5, "max_val": 2.0}, (x,)),
    ("Hardtanh", {"inplace": True}, (x,)),
    ("ELU", {"alpha": 0.5}, (x,)),
    ("ELU", {"inplace": True}, (x,)),
    ("Softplus", {"beta": 2.0, "threshold": 1.5}, (x,)),
    ("SiLU", {}, (x,)),
    ("SiLU", {"inplace": True}, (x,)),
    ("GELU", {}, (x,)),
    ("GELU", {"approximate": "tanh"}, (x,)),
    ("BatchNorm1d", {"num_features": 3}, (x,)),
    ("BatchNorm1d", {"num_features": 3, "momentum": 0.3, "bias": False, "eps": 0.1}, (x,)),
    ("BatchNorm1d", {"num_features": 3, "affine": False, "track_running_stats": False}, (x,)),
    ("LayerNorm", {"normalized_shape": 3}, (x,)),
    ("LayerNorm", {"normalized_shape": (4, 3), "bias": False}, (x,)),
    ("LayerNorm", {"normalized_shape": [3], "elementwise_affine": False, "eps": 0.1}, (x,)),
    ("Dropout", {"p": 0.0}, (x,)),
    ("Dropout", {"p": 1.0}, (x,)),
    ("Dropout", {"p": 1.0, "inplace": True}, (x,)),
    ("Softmax", {"dim": 1}, (x,)),
    ("LogSoftmax", {"dim": -1}, (x,)),
    ("MSELoss", {}, (x, unit)),
    ("MSELoss", {"reduction": "none"}, (x, unit)),
    ("CrossEntropyLoss", {}, (x, classes)),
    ("CrossEntropyLoss", {"weight": weight, "ignore_index": 2, "label_smoothing": 0.1}, (x, classes)),
    ("CrossEntropyLoss", {"weight": weight, "reduction": "sum"}, (x, unit)),
    ("NLLLoss", {"weight": weight, "ignore_index": 2}, (x, classes)),
    ("NLLLoss", {"reduction": "sum"}, (x, classes)),
    ("BCELoss", {"weight": weight}, (unit, unit.flip(0))),
    ("BCELoss", {"reduction": "sum"}, (unit, unit.flip(0))),
    ("BCEWithLogitsLoss", {"weight": weight, "pos_weight": weight + 1}, (x, unit)),
    ("BCEWithLogitsLoss", {"reduction": "none"}, (x, unit)),
    ("Sequential", {}, (x,)),
]
# What torch has no class for: the twins are made of its modules, and their parameters come in the same order.
JOINT = [
    ("LinearActivation", {"in_features": 3, "out_features": 2}, (x,)),
    ("LinearActivation", {"in_features": 3, "out_features": 2, "activation": "gelu", "bias": False}, (x,)),
    ("BatchNormActivation", {"num_features": 3, "activation": "tanh"}, (x,)),
    ("BatchNormActivation", {"num_features": 3, "activation": "silu", "track_running_stats": False}, (x,)),
    ("Residual", {}, (x,)),
    ("MLP", {"sizes": [3, 5, 4, 2], "activation": "elu"}, (x,)),
    ("MLP", {"sizes": [3, 5, 5, 2], "norm": "batch", "residual": True}, (x,)),
    ("MLP", {"sizes": [3, 5, 2], "activation": "gelu", "norm": "batch"}, (x,)),
]
TWINNED = TORCHS + JOINT
ROWS = [*TWINNED, ("HalfMSELoss", {}, (x, unit))]


def table(rows):
    """Run a test on these rows."""
    return pytest.mark.parametrize(("name", "kwargs", "inputs"), rows, ids=[f"{r[0]}-{i}" for i, r in enumerate(rows)])


every_row, torchs_row, twinned_row = table(ROWS), table(TORCHS), table(TWINNED)


def build(module, name, kwargs):
    """An instance of `module.<name>`, with the same random numbers every time."""
    torch.manual_seed(0)
    if name == "Sequential":
        return module.Sequential(module.Linear(3, 5), module.Tanh(), module.Linear(5, 2), module.LogSoftmax(1))
    if name == "Residual":
        return ours.Residual(module.Linear(3, 3))
    if name == "MLP" and module is theirs:
        return torch_bp.to_torch(ours.MLP(**kwargs, fused=False), inplace=True)
    if name.endswith("Activation") and module is theirs:
        joint = getattr(ours, name)(**kwargs)
        options = {k: v for k, v in kwargs.items() if k != "activation"}
        first = getattr(theirs, name.removesuffix("Activation").replace("Norm", "Norm1d"))(**options)
        first.load_state_dict(joint.state_dict())
        return theirs.Sequential(first, torch_bp.to_torch(joint.activation))
    return getattr(module, name)(**kwargs)


def run(module, inputs):
    """The output, and gradients at the first input and at every parameter."""
    leaf = inputs[0].clone().requires_grad_()
    output = module(leaf * 1, *inputs[1:])
    wanted = [leaf, *module.parameters()]
    return output, *torch.autograd.grad(output.sin().sum(), wanted)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@torchs_row
def test_equal_torch(name, kwargs, inputs):
    """Initial numbers included."""
    mine, other = build(ours, name, kwargs), build(theirs, name, kwargs)
    torch.testing.assert_close(mine.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert_same(run(mine, inputs), run(other, inputs))


@torchs_row
def test_it_is_one_of_torchs(name, kwargs, inputs):
    mine, other = build(ours, name, kwargs), build(theirs, name, kwargs)
    assert isinstance(mine, type(other))
    assert repr(mine) == repr(other)
    assert mine.extra_repr() == other.extra_repr()
    assert vars(mine).keys() == vars(other).keys()
    assert getattr(mine, "__constants__", None) == getattr(other, "__constants__", None)
    assert mine.training


@torchs_row
def test_state_dicts_go_both_ways(name, kwargs, inputs):
    mine, other = build(ours, name, kwargs), build(theirs, name, kwargs)
    torch.manual_seed(1)
    source = {k: torch.rand_like(v) if v.is_floating_point() else v + 7 for k, v in mine.state_dict().items()}
    mine.load_state_dict(source, strict=True)
    other.load_state_dict(mine.state_dict(), strict=True)
    mine = build(ours, name, kwargs)
    mine.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(dict(mine.state_dict()), source, rtol=0, atol=0)


@every_row
def test_copies(name, kwargs, inputs):
    module = build(ours, name, kwargs)
    expected = run(module, inputs)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module)
        assert_same(run(copied, inputs), expected)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = build(ours, name, kwargs)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert_same(run(other, inputs), expected)


@every_row
def test_functional_call(name, kwargs, inputs):
    module = build(ours, name, kwargs)
    doubled = {k: 2 * v for k, v in module.named_parameters()}
    got = functional_call(module, doubled, tuple(i.clone() for i in inputs))
    module.load_state_dict({k: doubled.get(k, v) for k, v in module.state_dict().items()})
    assert_same(got, module(*(i.clone() for i in inputs)))


@every_row
def test_meta_device(name, kwargs, inputs):
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    with torch.device("meta"):
        module = build(ours, name, meta)
    tensors = [*module.parameters(), *module.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    expected = build(ours, name, kwargs)
    output = module(*[i.to("meta") for i in inputs])
    assert output.is_meta
    assert output.shape == expected(*(i.clone() for i in inputs)).shape
    module = module.to_empty(device="cpu")
    module.load_state_dict(expected.state_dict())
    assert_same(run(module, inputs), run(expected, inputs))


@every_row
def test_hooks_run(name, kwargs, inputs):
    module, seen = build(ours, name, kwargs), []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    if not kwargs.get("inplace"):  # torch forbids in-place operations on what a backward hook has seen
        module.register_full_backward_pre_hook(lambda *_: seen.append("before backward"))
        module.register_full_backward_hook(lambda *_: seen.append("after backward"))
    expected = ["before", "after", *([] if kwargs.get("inplace") else ["before backward", "after backward"])]
    run(module, inputs)
    assert seen == expected


@every_row
def test_inputs_are_untouched_unless_in_place(name, kwargs, inputs):
    copies = [i.clone() for i in inputs]
    output = build(ours, name, kwargs)(*copies)
    if kwargs.get("inplace"):
        assert output is copies[0]
        assert torch.equal(output, build(theirs, name, kwargs)(inputs[0].clone()))
    else:
        torch.testing.assert_close(copies, list(inputs), rtol=0, atol=0)
        assert all(c._version == 0 for c in copies)


@every_row
def test_dtype_moves_and_modes(name, kwargs, inputs):
    module = build(ours, name, kwargs).double().eval()
    inputs = [i.double() if i.is_floating_point() else i for i in inputs]
    assert not module.training
    output, *slopes = run(module, inputs)
    assert {t.dtype for t in (output, *slopes)} == {torch.float64}


@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "Hardtanh", "ELU", "SiLU", "Dropout"])
def test_in_place_on_a_leaf_raises_torchs_error(name):
    messages = []
    for module in (ours, theirs):
        leaf = torch.ones(3, requires_grad=True)
        with pytest.raises(RuntimeError) as caught:
            getattr(module, name)(inplace=True)(leaf)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "Hardtanh", "ELU", "SiLU", "Dropout"])
def test_in_place_after_a_layer_that_saved_its_output_raises(name):
    """As torch: sigmoid's output is needed by its backward; linear's is not."""
    for module in (ours, theirs):
        in_place = getattr(module, name)(inplace=True)
        hidden = module.Linear(3, 2)(x)
        in_place(hidden).sum().backward()
        output = in_place(module.Sigmoid()(x.clone().requires_grad_())).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmax_without_a_dimension_warns(name):
    for module in (ours, theirs):
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            output = getattr(module, name)()(x)
        assert torch.equal(output, getattr(theirs, name)(1)(x))


@pytest.mark.parametrize("name", ["MSELoss", "CrossEntropyLoss", "NLLLoss", "BCELoss", "BCEWithLogitsLoss"])
@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}])
def test_legacy_arguments(name, legacy):
    inputs = (unit, classes) if name in ("CrossEntropyLoss", "NLLLoss") else (unit, unit.flip(0))
    results = []
    for module in (ours, theirs):
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            loss = getattr(module, name)(**legacy)
        results.append((loss.reduction, loss(*inputs)))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "Hardtanh", "ELU", "SiLU"])
def test_in_place_inside_of_transforms(name):
    """Also where the graph is recorded around `vmap`, whose tensors do not say that they are part of it."""
    found = []
    for module in (ours, theirs):
        in_place = getattr(module, name)(inplace=True)
        loss = lambda z, f=in_place: f(z * 1).sin().sum()  # noqa: E731
        around = grad(lambda z, f=in_place: vmap(lambda row: f(row * 1))(z).sin().sum())
        found.append((around(x), vmap(grad(loss))(x), jvp(loss, (x,), (x,))[1]))
    torch.testing.assert_close(*found)
