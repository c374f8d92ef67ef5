"""Gradient clipping: what torch's own functions return and leave behind, whichever way the work is done."""

import inspect
import math

import pytest
import torch

from torch_bp.kernels import use
from torch_bp.kernels.engine import forced
from torch_bp.nn import utils
from torch_bp.nn.utils import clip_grad

INF = math.inf
TOLERANCE = {
    torch.float64: {"rtol": 1e-15, "atol": 0},
    torch.float32: {"rtol": 1e-6, "atol": 0},
    torch.bfloat16: {"rtol": 1e-2, "atol": 0},
    torch.float16: {"rtol": 2e-3, "atol": 0},
}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain():
    return [random(3, 4), random(5, seed=1), random(seed=2), random(0, 3), random(40, 50, seed=3)]


def strided():
    """Transposed, sliced, channels last and of one element with odd strides."""
    last = random(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return [random(6, 5).t(), random(8, 6)[:, ::2], last, random(4, 4)[:1, 1:2], random(9)[::3]]


def mixed():
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    return [random(4, 3, dtype=d, seed=i) for i, d in enumerate(dtypes)]


def shared():
    """One gradient of two parameters, and a part of a third's: each is scaled as often as it is there."""
    one, whole = random(4, 3), random(10, 2, seed=1)
    return [one, whole, one, whole[2:4]]


def negated():
    return [random(4, 2), torch.complex(random(3), random(3)).conj().imag]


def of(dtype):
    return lambda: [random(4, 3, dtype=dtype), random(70, dtype=dtype, seed=1)]


def nonfinite():
    return [torch.tensor([1.0, INF, math.nan, -INF, -0.0]), random(3, dtype=torch.float32)]


def complex_numbers():
    return [torch.complex(random(3), random(3, seed=1)), random(4)]


def sparse():
    return [random(4, 3), torch.sparse_coo_tensor([[0, 2]], random(2, 3), (4, 3)).coalesce()]


class Tagged(torch.Tensor):
    """A subclass: a kernel must not see it."""


def subclass():
    return [random(4, 3), random(5).as_subclass(Tagged)]


ORDINARY = [plain, strided, mixed, shared, of(torch.float16), of(torch.float32), list]
ANY = [*ORDINARY, complex_numbers, subclass]
NAMES = ["plain", "strided", "mixed", "shared", "float16", "float32", "none", "complex", "subclass"]
any_gradients = pytest.mark.parametrize("make", ANY, ids=NAMES)
ordinary_gradients = pytest.mark.parametrize("make", ORDINARY, ids=NAMES[: len(ORDINARY)])


@pytest.fixture(params=["kernel", "formula", "torch"], autouse=True)
def way(request, monkeypatch):
    """The gradients are small: let kernels, or the formulas as torch operations, serve them all the same."""
    if request.param == "torch":
        yield
        return
    monkeypatch.setattr(clip_grad, "MANY", 0)
    with use("numba" if request.param == "kernel" else "torch"):
        yield


def with_gradients(gradients):
    """Parameters that have these gradients, and one that has none."""
    params = []
    for gradient in gradients:
        dtype = gradient.dtype
        params.append(torch.nn.Parameter(torch.empty(gradient.shape, dtype=dtype)))
        params[-1].grad = gradient
    return [*params[:1], torch.nn.Parameter(torch.ones(2)), *params[1:]]


def dense(tensor):
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor.as_subclass(torch.Tensor)


def assert_alike(mine, other, make=None):
    """Close to a few units in the last place; of `mixed` gradients, whose norm has a part in float32, of float32."""
    assert (mine is None) == (other is None)
    if other is not None:
        assert mine.dtype is other.dtype
        assert type(mine) is type(other)
        dtype = torch.float32 if make is mixed and mine.dtype is torch.float64 else mine.dtype
        tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float64])
        torch.testing.assert_close(dense(mine), dense(other), equal_nan=True, **tolerance)


def compare(make, name, *args, **kwargs):
    """Run our function and torch's on gradients made twice; results and gradients agree, shared ones included."""
    (mine, got), (other, expected) = (
        (params := with_gradients(make()), getattr(module, name)(params, *args, **kwargs))
        for module in (utils, torch.nn.utils)
    )
    assert_alike(got, expected, make)
    for p, q in zip(mine, other):
        assert_alike(p.grad, q.grad, make)
    return mine


@any_gradients
@pytest.mark.parametrize("norm_type", [2.0, 1, "inf", 3, 0.5, 0])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_clip_grad_norm(make, norm_type, foreach):
    if norm_type == "inf" and make is plain:  # no entry, no largest one: torch raises, and so do we
        failures = []
        for module in (utils, torch.nn.utils):
            with pytest.raises(RuntimeError) as caught:
                module.clip_grad_norm_(with_gradients(make()), 0.7, norm_type)
            failures.append(str(caught.value))
        assert failures[0] == failures[1]
        return
    for max_norm in (0.7, 1e4):
        compare(make, "clip_grad_norm_", max_norm, norm_type, foreach=foreach)


@ordinary_gradients
@pytest.mark.parametrize("foreach", [None, True, False])
def test_clip_grad_value(make, foreach):
    if make is list:  # nothing to clip: torch raises an internal error
        assert utils.clip_grad_value_([torch.nn.Parameter(torch.ones(2))], 0.5, foreach) is None
        assert utils.clip_grad_value_([], 0.5, foreach) is None
        return
    for value in (0.5, 100, 0, -0.25):
        compare(make, "clip_grad_value_", value, foreach=foreach)


def test_pending_signs():
    """Torch refuses them in lists, not one by one."""
    compare(negated, "clip_grad_norm_", 0.5, foreach=False)
    compare(negated, "clip_grad_value_", 0.5, foreach=False)


def test_nonfinite_gradients():
    for norm_type in (2.0, INF):
        compare(nonfinite, "clip_grad_norm_", 1.0, norm_type)
    compare(nonfinite, "clip_grad_value_", 0.5)
    compare(nonfinite, "clip_grad_value_", INF)
    compare(plain, "clip_grad_norm_", INF)
    messages = []
    for module in (utils, torch.nn.utils):
        params = with_gradients(nonfinite())
        with pytest.raises(RuntimeError, match=r"total norm of order 2\.0") as caught:
            module.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
        messages.append(str(caught.value))
        assert_alike(params[0].grad, nonfinite()[0])
    assert messages[0] == messages[1]
    compare(plain, "clip_grad_norm_", 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_sparse_gradients(name):
    """Torch's way, which for some of these is an error."""
    results = []
    for module in (utils, torch.nn.utils):
        params = with_gradients(sparse())
        try:
            results.append(getattr(module, name)(params, 0.5, foreach=False))
        except (RuntimeError, NotImplementedError) as error:
            results.append(type(error))
        results.append([dense(p.grad) for p in params if p.grad is not None])
    assert results[0] == results[2]
    torch.testing.assert_close(results[1], results[3])


def test_complex_entries_have_no_order():
    for module in (utils, torch.nn.utils):
        with pytest.raises(RuntimeError, match="complex"):
            module.clip_grad_value_(with_gradients(complex_numbers()), 1.0)


def test_other_devices():
    """Torch's way: values of no memory, and torch's refusal of list operations there."""
    for module in (utils, torch.nn.utils):
        params = [torch.nn.Parameter(torch.ones(3, device="meta"))]
        params[0].grad = torch.ones(3, device="meta")
        assert module.clip_grad_norm_(params, 1.0).is_meta
        module.clip_grad_value_(params, 1.0)
        with pytest.raises(RuntimeError, match="can't use the foreach API on meta"):
            module.clip_grad_norm_(params, 1.0, foreach=True)


def test_distributed_tensors(tmp_path):
    """DTensor on a mesh of one process."""
    distributed = pytest.importorskip("torch.distributed.tensor")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        norms = []
        for module in (utils, torch.nn.utils):
            local = distributed.DTensor.from_local(random(4, 3), mesh, [distributed.Shard(0)])
            p = torch.nn.Parameter(local)
            p.grad = distributed.DTensor.from_local(random(4, 3, seed=1), mesh, [distributed.Shard(0)])
            norms.append(module.clip_grad_norm_([p], 0.5).full_tensor())
            assert type(p.grad) is distributed.DTensor
            torch.testing.assert_close(p.grad.to_local().norm(), torch.tensor(0.5).double(), rtol=1e-5, atol=0)
        assert_alike(*norms)
    finally:
        torch.distributed.destroy_process_group()


@any_gradients
@pytest.mark.parametrize("norm_type", [2, 1.5, 0])
def test_the_norm_and_the_scaling_apart(make, norm_type):
    """Clipping is both, one after the other; they take what torch's take: a list, an iterator, one tensor."""
    assert_alike(utils.get_total_norm(make(), norm_type), torch.nn.utils.get_total_norm(make(), norm_type), make)
    total = torch.tensor(3.0, dtype=torch.float64)
    compare(make, "clip_grads_with_norm_", 0.5, total)
    if make in (plain, mixed):
        assert_alike(utils.get_total_norm(iter(make()), norm_type), utils.get_total_norm(make(), norm_type))
        assert_alike(
            utils.get_total_norm(make()[0], norm_type, foreach=False),
            torch.nn.utils.get_total_norm(make()[0], norm_type),
        )


def test_one_tensor_and_generators():
    results = []
    for module in (utils, torch.nn.utils):
        p = with_gradients(plain())[0]
        results.append([module.clip_grad_norm_(p, 0.5), p.grad.clone()])
        module.clip_grad_value_(p, 0.01)
        results[-1].append(p.grad)
        params = with_gradients(plain())
        results[-1].append(module.clip_grad_norm_((p for p in params), 0.5))
        module.clip_grad_value_((p for p in params), 0.01)
        results[-1] += [p.grad for p in params if p.grad is not None]
    torch.testing.assert_close(*results, rtol=1e-15, atol=0)


def test_an_empty_generator_warns():
    for module in (utils, torch.nn.utils):
        with pytest.warns(UserWarning, match="empty generator") as caught:
            assert module.clip_grad_norm_((p for p in []), 1.0) == 0
        assert caught[0].filename == __file__


def test_gradients_keep_their_memory_and_their_version_grows():
    for change in (lambda p: utils.clip_grad_norm_(p, 0.1), lambda p: utils.clip_grad_value_(p, 0.01)):
        params = with_gradients([random(30, 20), random(7)])
        grads = [p.grad for p in params if p.grad is not None]
        before = [(g.data_ptr(), g._version) for g in grads]
        values = [p.detach().clone() for p in params]
        change(params)
        assert all(g.data_ptr() == address and g._version > version for g, (address, version) in zip(grads, before))
        assert all(torch.equal(p, v) for p, v in zip(params, values) if v.isfinite().all())


def test_gradients_with_a_graph_of_their_own():
    """After `create_graph=True` gradients are recorded; clipping is not."""
    weights = []
    for module in (utils, torch.nn.utils):
        weight = torch.nn.Parameter(random(4))
        (gradient,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
        weight.grad = gradient * 1
        module.clip_grad_norm_([weight], 0.5)
        weights.append(weight.grad)
        assert weight.grad.requires_grad
    assert_alike(*weights)


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"])
def test_signatures(name):
    mine, theirs = (inspect.signature(getattr(module, name)).parameters for module in (utils, torch.nn.utils))
    assert [(p.name, p.default, p.kind) for p in mine.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    assert getattr(clip_grad, name) is getattr(utils, name)


def test_compiled():
    """In one graph."""

    def step(params):
        norm = utils.clip_grad_norm_(params, 0.5)
        utils.clip_grad_value_(params, 0.05)
        return norm

    params, other = with_gradients(plain()), with_gradients(plain())
    norm = torch.compile(step, fullgraph=True, backend="aot_eager")(params)
    torch.testing.assert_close(norm, step(other))
    for p, q in zip(params, other):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_kernel_serves_many_and_large_gradients():
    """No arithmetic of torch's runs over them, as a profiler sees; it does over few small ones."""
    for count, size, served in ((2, 1 << 19, True), (32, 10, True), (2, 1 << 10, clip_grad.MANY == 0)):
        params = with_gradients([random(size, dtype=torch.float32) for _ in range(count)])
        with torch.autograd.profiler.profile() as profile:
            utils.clip_grad_norm_(params, 0.5)
            utils.clip_grad_value_(params, 0.1)
        names = {event.name for event in profile.function_events}
        arithmetic = {"aten::mul_", "aten::_foreach_mul_", "aten::_foreach_norm", "aten::maximum"}
        arithmetic |= {"aten::_foreach_clamp_min_"}
        assert arithmetic.isdisjoint(names) == (served and forced() != "torch")


@pytest.mark.cuda
def test_cuda_is_not_waited_for():
    params = with_gradients([t.cuda() for t in plain()])
    utils.clip_grad_norm_(params, 0.5)  # compiles
    utils.clip_grad_value_(params, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        utils.clip_grad_norm_(params, 0.5)
        utils.clip_grad_value_(params, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert utils.clip_grad_norm_(params, 1.0) <= 0.5 + 1e-6
