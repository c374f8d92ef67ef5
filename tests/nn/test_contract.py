"""What torch's tools do with a module: each class of ours must fare as torch's does, in result or in refusal."""

import io
import operator
import warnings
from functools import partial

import pytest
import torch
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torch_bp.nn as ours
from tests.nn.test_modules import (
    ROWS,
    TWINNED,
    assert_same,
    build,
    every_row,
    run,
    table,
    theirs,
    torchs_row,
    twinned_row,
)

OUT_OF_PLACE = [row for row in ROWS if not row[1].get("inplace")]
out_of_place_rows = table(OUT_OF_PLACE)
WITH_WEIGHT = [row for row in TWINNED if not row[0].endswith("Loss") and [*build(ours, *row[:2]).parameters()]]
rows_with_weight = table(WITH_WEIGHT)


def outcome(function):
    """What a call returns, or the type and the first line of the error it raises."""
    try:
        return function()
    except Exception as error:  # to be compared
        return type(error), str(error).splitlines()[0]


def refused(found):
    """True of an `outcome` that is an error."""
    return isinstance(found, tuple) and isinstance(found[0], type)


def pair(name, kwargs):
    return build(ours, name, kwargs), build(theirs, name, kwargs)


@twinned_row
def test_hooks_on_state(name, kwargs, inputs):
    module, seen = build(ours, name, kwargs), []
    module.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    module.register_state_dict_post_hook(lambda *_: seen.append("after saving"))
    module.register_load_state_dict_pre_hook(lambda *_: seen.append("before loading"))
    module.register_load_state_dict_post_hook(lambda *_: seen.append("after loading"))
    module.load_state_dict(module.state_dict())
    assert seen == ["before saving", "after saving", "before loading", "after loading"]


@torchs_row
def test_state_that_does_not_fit_is_refused_in_torchs_words(name, kwargs, inputs):
    refusals = []
    for module in pair(name, kwargs):
        state = {k: torch.ones(7) for k in list(module.state_dict())[1:]} | {"another": torch.ones(1)}
        with pytest.raises(RuntimeError) as caught:
            module.load_state_dict(state, strict=True)
        refusals.append(str(caught.value))
        found = module.load_state_dict({"another": torch.ones(1)}, strict=False)
        refusals[-1] += str(found)
    assert refusals[0] == refusals[1]


@twinned_row
def test_a_whole_module_is_saved_and_loaded(name, kwargs, inputs):
    module = build(ours, name, kwargs)
    expected = run(module, inputs)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is type(module)
    loaded.load_state_dict(build(ours, name, kwargs).state_dict())
    assert_same(run(loaded, inputs), expected)


@out_of_place_rows
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_export(name, kwargs, inputs, training):
    """An exported program is torch's operations alone, needs no torch_bp, and can be trained."""
    module = build(ours, name, kwargs).train(training)
    program = torch.export.export(module, inputs)
    assert_same(run(program.module(), inputs), run(build(ours, name, kwargs).train(training), inputs))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    calls = [call for call in calls if call is not operator.getitem]
    assert calls or name == "Dropout"
    assert all(isinstance(call, torch._ops.OpOverload) and call.namespace == "aten" for call in calls)


@twinned_row
def test_tracing(name, kwargs, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = build(ours, name, kwargs).eval()
        traced = torch.jit.trace(module, [i.clone() for i in inputs])
    assert_same(traced(*[i.clone() for i in inputs]), module(*[i.clone() for i in inputs]))


def policy(choice):
    """A selective checkpoint that treats all operations alike."""
    return {"context_fn": partial(create_selective_checkpoint_contexts, lambda ctx, operation, *_, **__: choice)}


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "recomputed": {"use_reentrant": False},
    "nothing saved": {"use_reentrant": False, **policy(CheckpointPolicy.PREFER_RECOMPUTE)},
    "everything saved": {"use_reentrant": False, **policy(CheckpointPolicy.MUST_SAVE)},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@twinned_row
def test_checkpoints(name, kwargs, inputs, kind):
    """A policy that saves everything refuses what is written in place; torch's modules do that more often."""

    def run_again(module):
        leaf = inputs[0].clone().requires_grad_()
        checkpoint(lambda z: module(z * 1, *inputs[1:]), leaf, **CHECKPOINTS[kind]).sin().sum().backward()
        return [leaf.grad, *(p.grad for p in module.parameters())]

    found = [outcome(lambda module=module: run_again(module)) for module in pair(name, kwargs)]
    if refused(found[0]):
        assert kind == "everything saved"
        assert found[0] == found[1]
    else:
        assert_same(found[0], list(run(build(theirs, name, kwargs), inputs))[1:])


@every_row
def test_saved_tensors_may_move(name, kwargs, inputs):
    expected = run(build(ours, name, kwargs), inputs)
    with torch.autograd.graph.save_on_cpu():
        assert_same(run(build(ours, name, kwargs), inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@twinned_row
def test_autocast(name, kwargs, inputs, dtype):
    found = []
    for module in pair(name, kwargs):
        with torch.autocast("cpu", dtype=dtype):
            found.append(outcome(lambda module=module: run(module, inputs)))
    if refused(found[1]):
        assert found[0] == found[1]
    else:
        torch.testing.assert_close(*found, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-2)


@twinned_row
def test_complex_numbers(name, kwargs, inputs):
    """Where torch computes with them, and where it refuses; ours must be right where it does what torch does not."""

    def complex_run(module):
        z = (inputs[0] * (1 + 0.5j)).to(torch.complex128).requires_grad_()
        output = module.to(torch.complex128)(z * 1, *inputs[1:])
        wanted = [z, *module.parameters()]
        return output, torch.autograd.grad(output.abs().sum(), wanted)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that complex modules are new
        mine, other = pair(name, kwargs)
        found = [outcome(lambda module=module: complex_run(module)) for module in (mine, other)]
    if name == "SiLU":  # torch refuses its derivative, and has it wrong in place
        z = torch.randn(5, dtype=torch.complex128, requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: mine(z * 1), z)
        assert kwargs.get("inplace") or refused(found[1])
    elif refused(found[1]):
        assert found[0] == found[1]
    else:
        assert_same(*found)


def as_function(name, kwargs, inputs, module):
    """Loss as a function of the parameters and the input, and these, in float64; no statistics that would change."""
    layer = build(module, name, kwargs).double()
    layer.train(not [*layer.buffers()])
    inputs = [i.double() if i.is_floating_point() else i for i in inputs]
    names = [k for k, _ in layer.named_parameters()]

    def loss(input, *parameters):
        return functional_call(layer, dict(zip(names, parameters)), (input * 1, *inputs[1:])).sin().sum()

    return loss, (inputs[0], *(p.detach() for p in layer.parameters()))


@twinned_row
def test_transforms_of_a_functional_call(name, kwargs, inputs):
    """torch's side is differentiated outside of `torch.func`, where its second derivatives of norms are wrong."""
    mine, values = as_function(name, kwargs, inputs, ours)
    other, _ = as_function(name, kwargs, inputs, theirs)
    numbers = tuple(range(len(values)))
    first = torch.autograd.functional.jacobian(other, values)
    second = torch.autograd.functional.hessian(other, values)
    for derivative in (jacrev, jacfwd, grad):
        torch.testing.assert_close(derivative(mine, numbers)(*values), first)
    for twice in (jacfwd(jacrev(mine, numbers), numbers), jacrev(jacrev(mine, numbers), numbers)):
        torch.testing.assert_close(twice(*values), second)
    three = torch.stack([values[0], values[0].flip(0), values[0] * 0.5])
    per_sample = vmap(grad(mine, numbers), (0, *[None] * len(values[1:])))(three, *values[1:])
    one_by_one = [torch.autograd.functional.jacobian(other, (value, *values[1:])) for value in three]
    torch.testing.assert_close(per_sample, tuple(map(torch.stack, zip(*one_by_one))))


@pytest.mark.parametrize(("name", "kwargs", "inputs"), [row for row in OUT_OF_PLACE if row[0] != "HalfMSELoss"])
def test_double_backward_of_a_module(name, kwargs, inputs):
    found = []
    for module in pair(name, kwargs):
        leaf = inputs[0].clone().requires_grad_()
        wanted = [leaf, *module.parameters()]
        slopes = torch.autograd.grad(module(leaf, *inputs[1:]).sin().sum(), wanted, create_graph=True)
        total = sum((slope * slope.detach().cos()).sum() for slope in slopes)
        found.append(torch.autograd.grad(total, wanted, materialize_grads=True))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


IN_PLACE = [partial(torch.nn.ReLU, inplace=True), partial(ours.ReLU, inplace=True), partial(ours.ELU, inplace=True)]


@pytest.mark.parametrize("in_place", IN_PLACE, ids=["torch's ReLU", "our ReLU", "our ELU"])
@pytest.mark.parametrize("hooked", [False, True])
@twinned_row
def test_in_place_after_a_layer(name, kwargs, inputs, in_place, hooked):
    """With a backward hook on the layer torch refuses; without one it depends on what the layer has saved."""

    def run_both(layer, activation):
        if hooked:
            layer.register_full_backward_hook(lambda *_: None)
        model = torch.nn.Sequential(layer, activation) if len(inputs) == 1 else layer
        leaf = inputs[0].clone().requires_grad_()
        output = model(leaf * 1, *inputs[1:])
        output = output if len(inputs) == 1 else activation(output)
        return torch.autograd.grad(output.sin().sum(), [leaf, *layer.parameters()])

    mine, other = pair(name, kwargs)
    twin = getattr(torch.nn, type(in_place()).__name__)
    found = [outcome(lambda: run_both(mine, in_place())), outcome(lambda: run_both(other, twin(inplace=True)))]
    if refused(found[0]):
        assert found[0][0] == found[1][0]
    else:  # also where torch refuses: after an activation in place, and where it has saved what ours computes again
        expected = run_both(build(theirs, name, kwargs | {"inplace": False} if "inplace" in kwargs else kwargs), twin())
        assert_same(found[0], expected)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("tool", ["parametrize", "prune", "weight_norm"])
@rows_with_weight
def test_tools_that_replace_the_weight(name, kwargs, inputs, tool):
    found = []
    for module in pair(name, kwargs):
        torch.manual_seed(0)
        layers = [part for part in module.modules() if isinstance(part._parameters.get("weight"), torch.Tensor)]
        for layer in layers:
            with torch.no_grad():
                layer.weight.copy_(torch.rand(layer.weight.shape))
            if tool == "parametrize":
                parametrize.register_parametrization(layer, "weight", Doubled())
            elif tool == "prune":
                prune.l1_unstructured(layer, "weight", amount=0.5)
            else:
                parametrizations.weight_norm(layer)
            assert isinstance(layer, (torch.nn.Linear, torch.nn.BatchNorm1d, torch.nn.LayerNorm))
        assert layers
        output, slope, *slopes = run(module, inputs)
        found.append((output, slope, sorted(slopes, key=lambda s: (s.numel(), s.sum().item()))))
    assert_same(*found)


@table([row for row in WITH_WEIGHT if row[0] not in ("Sequential", "Residual")])
def test_skip_init(name, kwargs, inputs):
    layer = torch.nn.utils.skip_init(getattr(ours, name), **kwargs)
    expected = build(theirs if hasattr(theirs, name) else ours, name, kwargs)
    layer.load_state_dict(expected.state_dict())
    assert_same(run(layer, inputs), run(expected, inputs))


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("name", ["MSELoss", "CrossEntropyLoss", "NLLLoss", "BCELoss", "BCEWithLogitsLoss"])
def test_legacy_arguments_warn_alike(name, reduce, size_average):
    found = []
    for module in (ours, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = getattr(module, name)(size_average=size_average, reduce=reduce)
        found.append((loss.reduction, [(w.category, str(w.message), w.filename) for w in caught]))
    assert found[0] == found[1]
    assert bool(found[0][1]) == (reduce is not None or size_average is not None)
