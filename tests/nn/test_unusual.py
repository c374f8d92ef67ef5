"""Modules in careless hands: strange layouts, writes between forward and backward, threads, loss scaling."""

import copy
import math
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad

import torch_bp.nn as ours
from tests.nn.test_contract import outcome, refused
from tests.nn.test_modules import ROWS, TWINNED, assert_same, build, every_row, run, table, theirs, twinned_row, x

dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def pair(name, kwargs):
    return build(ours, name, kwargs), build(theirs, name, kwargs)


def leaves(module, inputs):
    return [inputs[0].clone().requires_grad_(), *module.parameters()]


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "strided": lambda t: torch.stack((t, t), -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() else t,
    "not from the start": lambda t: torch.cat((t.flatten(), t.flatten()))[t.numel() :].view_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@twinned_row
def test_any_layout_of_inputs_and_upstream_gradients(name, kwargs, inputs, layout):
    found = []
    for module, arrange in zip(pair(name, kwargs), (LAYOUTS[layout], lambda t: LAYOUTS[layout](t).contiguous())):
        module.double()
        leaf, *others = (i.double() if i.is_floating_point() else i for i in inputs)
        wanted = [leaf.clone().requires_grad_(), *module.parameters()]
        given = arrange(wanted[0] * 1)
        output = module(given + 0 if kwargs.get("inplace") else given, *map(arrange, others))
        for upstream in (output.detach().cos(), torch.tensor(0.5).double().expand_as(output)):
            found.append(torch.autograd.grad(output, wanted, arrange(upstream), retain_graph=True))
    torch.testing.assert_close(found[:2], found[2:])


@twinned_row
def test_each_gradient_by_itself_and_all_again(name, kwargs, inputs):
    module = build(ours, name, kwargs)
    wanted = leaves(module, inputs)
    output = module(wanted[0] * 1, *inputs[1:]).sin().sum()
    together = torch.autograd.grad(output, wanted, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, tensor, retain_graph=True)[0] for tensor in wanted]
    torch.testing.assert_close(list(together), one_by_one)
    assert_same(together, run(build(theirs, name, kwargs), inputs)[1:])
    torch.autograd.grad(output, wanted)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, wanted)


@table([row for row in TWINNED if [*build(ours, *row[:2]).parameters()]])
def test_frozen_parameters(name, kwargs, inputs):
    for number, _ in enumerate(build(ours, name, kwargs).parameters()):
        found = []
        for module in pair(name, kwargs):
            [*module.parameters()][number].requires_grad_(False)
            module(inputs[0].clone().requires_grad_()).sin().sum().backward()
            found.append([p.grad for p in module.parameters()])
            assert [grad is None for grad in found[-1]].count(True) == 1
        assert_same(*found)


@twinned_row
def test_a_write_between_forward_and_backward_is_refused_or_does_not_matter(name, kwargs, inputs):
    """Whatever the module has seen or made is overwritten with zeros: never a wrong gradient without a word."""
    expected = run(build(theirs, name, kwargs), inputs)[1:]
    module = build(ours, name, kwargs)
    for number in range(len(inputs) + 1 + len([*module.parameters(), *module.buffers()])):
        module, leaf = copy.deepcopy(build(ours, name, kwargs)), inputs[0].clone().requires_grad_()
        given = [leaf * 1, *(i.clone() for i in inputs[1:])]
        output = module(*given)
        loss, wanted = output.sin().sum(), [leaf, *module.parameters()]
        with torch.no_grad():
            [*given, output, *module.parameters(), *module.buffers()][number].zero_()
        found = outcome(lambda loss=loss, wanted=wanted: torch.autograd.grad(loss, wanted))
        if refused(found):
            assert "modified by an inplace operation" in found[1]
        else:
            assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@twinned_row
def test_anomaly_mode(name, kwargs, inputs):
    expected = run(build(ours, name, kwargs), inputs)
    with torch.autograd.detect_anomaly():
        assert_same(run(build(ours, name, kwargs), inputs), expected)


@every_row
def test_without_a_graph(name, kwargs, inputs):
    expected = build(ours, name, kwargs)(*(i.clone() for i in inputs))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = build(ours, name, kwargs)(*(i.clone() for i in inputs))
        assert output.grad_fn is None
        assert output.is_inference() == (mode is torch.inference_mode)
        assert_same(output.clone(), expected)


@twinned_row
def test_batched_upstream_gradients(name, kwargs, inputs):
    found = []
    for module in pair(name, kwargs):
        wanted = leaves(module, inputs)
        output = module(wanted[0] * 1, *inputs[1:])
        upstream = torch.stack([output.detach().cos(), output.detach().sin()])
        found.append(torch.autograd.grad(output, wanted, upstream, is_grads_batched=True))
    assert_same(*found)


@twinned_row
def test_dual_numbers(name, kwargs, inputs):
    """Tangents of the input and of all parameters at once."""
    found = []
    for module in pair(name, kwargs):
        values = {k: p.detach() for k, p in module.named_parameters()}
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, (t + 1).cos()) for t in (inputs[0], *values.values())]
            output = torch.func.functional_call(module, dict(zip(values, duals[1:])), (duals[0] * 1, *inputs[1:]))
            found.append(tuple(forward_ad.unpack_dual(output)))
    assert_same(*found)


@twinned_row
def test_threads(name, kwargs, inputs):
    """One module in several threads at once; each with its own graph."""
    module = build(ours, name, kwargs)
    expected = run(module, inputs)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(lambda: [run(module, inputs) for _ in range(5)]) for _ in range(4)]:
            for got in done.result():
                assert_same(got, expected)


@twinned_row
def test_parameters_may_be_swapped(name, kwargs, inputs):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module, other = pair(name, kwargs)
        before = [*module.parameters()]
        run(module, inputs)
        module.double().load_state_dict(build(ours, name, kwargs).double().state_dict())
        assert all(a is b for a, b in zip(before, module.parameters()))
        inputs = [i.double() if i.is_floating_point() else i for i in inputs]
        assert_same(run(module, inputs), run(other.double(), inputs))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


SHAPES = [(), (3,), (0, 3), (1, 3), (4, 5), (2, 4, 3), (2, 3, 4), (2, 0, 3), (1, 3, 1), (5, 3, 0), (2, 1, 2, 3)]


@table([row for row in TWINNED if len(row[2]) == 1])
def test_any_shape_or_torchs_refusal(name, kwargs, inputs):
    for shape in SHAPES:
        found = []
        for module in pair(name, kwargs):
            values = torch.arange(math.prod(shape), dtype=inputs[0].dtype).cos().view(shape)
            found.append(outcome(lambda module=module, values=values: run(module, (values,))))
        if refused(found[1]):
            assert found[0] == found[1]
        else:
            assert_same(*found)
        for dtype in (torch.int64, torch.bool):
            whole = torch.ones(shape, dtype=dtype)
            found = [outcome(lambda m=module, z=whole: m(z.clone())) for module in pair(name, kwargs)]
            assert found[0] == found[1] if refused(found[1]) else torch.equal(*found)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@table([row for row in TWINNED if len(row[2]) == 1])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_ragged_rows(name, kwargs, inputs, layout):
    """Nested tensors, where torch's modules take them."""

    def run_nested(module):
        torch.manual_seed(0)
        rows = torch.nested.nested_tensor([inputs[0][:2], inputs[0]], layout=layout).requires_grad_()
        output = module(rows * 1)
        (slope,) = torch.autograd.grad(torch.nested.to_padded_tensor(output, 0.0).sin().sum(), rows)
        return [torch.nested.to_padded_tensor(t, 0.0) for t in (output, slope)]

    modules = [*pair(name, kwargs), *([ours.Dropout(0.5), theirs.Dropout(0.5)] if name == "Dropout" else [])]
    for mine, other in zip(modules[::2], modules[1::2]):
        expected = outcome(lambda other=other: run_nested(other))
        if not refused(expected):
            assert_same(run_nested(mine), expected)


def test_loss_scaling():
    """A `GradScaler` on the CPU: scaled, unscaled and clipped, one step left out for its infinite gradients."""
    found = []
    for module in (ours, theirs):
        model, loss = build(module, "MLP", {"sizes": [3, 5, 2], "norm": "batch"}), module.MSELoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for factor in (1.0, 1.0, 1e30, 1.0):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = loss(model(x).float(), x[:, :2]) * factor
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            module.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        found.append((scaler.get_scale(), [*model.state_dict().values()]))
    torch.testing.assert_close(*found, rtol=2e-2, atol=1e-2)


def test_a_forked_child_computes():
    """After kernels and threads have run in the parent."""
    module = build(ours, "MLP", {"sizes": [3, 5, 2], "norm": "batch"})
    expected = run(module, (x,))
    context = torch.multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's about threads in a process that forks
        child = context.Process(target=lambda: send.send([t.detach().numpy() for t in run(module, (x,))]))
        child.start()
    try:
        assert receive.poll(30)
        assert_same([torch.from_numpy(t) for t in receive.recv()], [t.detach() for t in expected])
    finally:
        child.join(5)
        child.kill()
    assert child.exitcode == 0


ONE_EACH = list({row[0]: row for row in ROWS if not row[1].get("inplace")}.values())


@dynamo
@table(ONE_EACH)
def test_compiled_whole(name, kwargs, inputs):
    """Forward, backward and what is done to buffers."""
    torch._dynamo.reset()
    results = []
    compiled = torch.compile(build(ours, name, kwargs), fullgraph=True, backend="aot_eager")
    for module in (compiled, build(ours, name, kwargs)):
        leaf = inputs[0].clone().requires_grad_()
        output = module(leaf, *inputs[1:])
        slopes = torch.autograd.grad(output.sin().sum(), [leaf, *module.parameters()])
        results.append((output, slopes, [*module.buffers()]))
    assert_same(*results)
    torch._dynamo.reset()


class OneOfEach(torch.nn.Module):
    """The sum of what every class makes of its inputs."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList([build(ours, name, kwargs) for name, kwargs, _ in ONE_EACH])

    def forward(self, factor):
        inputs = [[row[2][0] * factor, *row[2][1:]] for row in ONE_EACH]
        return sum(part(*given).sin().sum() for part, given in zip(self.parts, inputs))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="Inductor needs a C++ compiler")
@dynamo
def test_inductor():
    torch._dynamo.reset()
    found = []
    for model in (OneOfEach(), torch.compile(OneOfEach(), fullgraph=True)):
        factor = torch.tensor(0.9, requires_grad=True)
        total = model(factor)
        found.append((total, torch.autograd.grad(total, [factor, *model.parameters()]), [*model.buffers()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
