"""A step that clips, clears and measures is torch's clip_grad_norm_, step and zero_grad, one after the other."""

import copy
import weakref

import pytest
import torch

from tests.optim.table import PAIRS, SHAPES, parameters, train
from torch_bp import optim
from torch_bp.kernels import formula, total, use
from torch_bp.kernels.extension import extended

EXACT = {"rtol": 1e-12, "atol": 1e-13}
TOLERANCE = {torch.float64: EXACT, torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.complex128: EXACT}
BITWISE = {"rtol": 0, "atol": 0}
EACH = pytest.mark.parametrize("name", PAIRS)
ENGINES = pytest.mark.parametrize("engine", ["torch", "auto"])


def gradients(params, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if p.grad is None:
            p.grad = grad
        else:
            p.grad.copy_(grad)


def separately(optimizer, max_norm=None, zero_grad=False):
    """The same by torch's own operations: the total norm, and the three norms of each parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = lambda t: torch.linalg.vector_norm(t.to(torch.promote_types(t.dtype, torch.float64)))  # noqa: E731
    grads, weights = [norm(p.grad) for p in params], [norm(p.detach()) for p in params]
    before = [p.detach().clone() for p in params]
    total_norm = torch.nn.utils.clip_grad_norm_(params, max_norm) if max_norm is not None else None
    optimizer.step()
    updates = [norm(p.detach() - b) for p, b in zip(params, before)]
    if zero_grad:
        optimizer.zero_grad(set_to_none=False)
    return total_norm, *map(torch.stack, (grads, weights, updates))


@ENGINES
@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_is_clip_step_and_zero(name, dtype, engine):
    params, others = parameters(dtype), parameters(dtype)
    mine, other = (PAIRS[name][0](p) for p in (params, others))
    for seed in range(12):
        size = 0.001 if seed % 3 == 2 else 1.0  # within the norm, which clips nothing
        zero_grad = seed % 4 != 3
        gradients(params, seed, size), gradients(others, seed, size)
        kept = [p.grad.clone() for p in params]
        with use(engine):
            done = optim.fused_step(mine, max_norm=2.0, zero_grad=zero_grad, norms=True)
            expected = separately(other, max_norm=2.0, zero_grad=zero_grad)
        got = done.total_norm, done.grad_norms, done.weight_norms, done.update_norms
        torch.testing.assert_close(got[0], expected[0], check_dtype=False, rtol=1e-6, atol=0)
        if dtype is not torch.float32 or name != "Lion":  # whose direction may flip where it rounds to nothing
            torch.testing.assert_close(params, others, **TOLERANCE[dtype])
            torch.testing.assert_close(got[1:], expected[1:], **{**TOLERANCE[dtype], "atol": 1e-7})
        assert [*map(id, done.params)] == [*map(id, params)]
        grads = [p.grad for p in params]
        torch.testing.assert_close(grads, [torch.zeros_like(g) for g in grads] if zero_grad else kept, **BITWISE)


@ENGINES
@EACH
def test_with_nothing_asked_for_it_is_a_step(name, engine):
    params, others = parameters(torch.float32), parameters(torch.float32)
    mine, other = (PAIRS[name][0](p) for p in (params, others))
    for seed in range(6):
        gradients(params, seed), gradients(others, seed)
        with use(engine):
            done = optim.fused_step(mine)
            other.step()
        assert done == optim.FusedStep(done.params)
    torch.testing.assert_close(params, others, **BITWISE)


@ENGINES
@EACH
@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64)], ids=str)
def test_scale_is_bitwise_that_of_the_gradients(name, scale, engine):
    params, others = parameters(torch.float32), parameters(torch.float32)
    mine, other = (PAIRS[name][0](p) for p in (params, others))
    for seed in range(6):
        gradients(params, seed), gradients(others, seed)
        with use(engine):
            optim.fused_step(mine, scale=scale, zero_grad=True)
            for p in others:
                p.grad.mul_(0.5)
            other.step()
    contracted = name == "NAdam" and engine == "auto"  # of two products that are added, the compiler rounds the other
    torch.testing.assert_close(params, others, **(TOLERANCE[torch.float32] if contracted else BITWISE))


@EACH
def test_the_list_kernel_does_it_all(name):
    """Nothing is left to operations of their own, and the table of addresses is kept from step to step."""
    params = parameters(torch.float32)
    optimizer = PAIRS[name][0](params)
    extras = []
    optimizer.register_step_post_hook(lambda *a: extras.append(optimizer._extras))
    for seed in range(4):
        gradients(params, seed)
        versions = [p.grad._version for p in params]
        optim.fused_step(optimizer, max_norm=1.0, zero_grad=True, norms=True)
        assert extras[-1].clean == {*map(id, params)}
        assert all(p.grad._version > version for p, version in zip(params, versions))
        if seed == 1:
            table = optimizer._plan.shares[0].buckets[0].table
            version = table.version
    assert optimizer._plan.shares[0].buckets[0].table is table
    assert table.version == version


@ENGINES
@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_in_half_precision_are_measured_as_rounded(name, dtype, engine):
    """At this rate most of them are less than half of the last place, and change nothing."""
    params = parameters(dtype)
    optimizer = PAIRS[name][0](params, lr=1e-3)
    for seed in range(3):
        gradients(params, seed)
        before = [p.detach().double() for p in params]
        with use(engine):
            done = optim.fused_step(optimizer, max_norm=1.0, norms=True)
        changes = [p.detach().double() - b for p, b in zip(params, before)]
        torch.testing.assert_close(done.update_norms, torch.stack([c.norm() for c in changes]), rtol=1e-6, atol=0)


@ENGINES
@EACH
def test_gradients_are_not_kept_alive(name, engine):
    params = parameters(torch.float32)
    optimizer = PAIRS[name][0](params)
    for seed in range(3):
        gradients(params, seed)
        with use(engine):
            optim.fused_step(optimizer, max_norm=1.0, zero_grad=True, norms=True)
        memory = [weakref.ref(p.grad.untyped_storage()) for p in params]
        optimizer.zero_grad()
        assert [m() for m in memory] == [None] * len(params)


def negate(p):
    p.grad.data = torch._neg_view(p.grad)


def derive(p):
    p.grad.__class__ = Own


@pytest.mark.parametrize("change", [negate, derive])
def test_gradients_in_the_place_of_others(change):
    """Of the same form, at the same address, as after a gradient is freed: the table knows them from those it saw."""
    results = []
    for fused in (True, False):
        params = parameters(torch.float32)
        optimizer = optim.SGD(params, lr=0.1)
        for seed in range(4):
            gradients(params, seed)
            if seed == 2:
                for p in params:
                    change(p)
            if not fused:
                optimizer.step()
                continue
            versions = [p.grad._version for p in params]
            optim.fused_step(optimizer, zero_grad=True)
            assert all(p.grad.eq(0).all() for p in params)
            assert all(p.grad._version > version for p, version in zip(params, versions))
        results.append(params)
    torch.testing.assert_close(*results, **BITWISE)


class Own(torch.Tensor):
    """A tensor of a user's own class."""


def sparse(p):
    rows = torch.tensor([[0, 2, 2, 1]])
    values = torch.randn(4, *p.shape[1:], dtype=p.dtype)
    p.grad = torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=True)


def transposed(p):
    p.grad = torch.randn(p.shape[::-1], dtype=p.dtype).t()


def negative(p):
    p.grad = torch.randn(p.shape, dtype=torch.complex128).conj().imag


def graph(p):
    p.grad = (p * torch.randn_like(p)).sin()


@pytest.mark.parametrize("unusual", [sparse, transposed, negative, graph], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "options"), [("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {})])
def test_unusual_gradients_are_treated_alike(name, options, unusual):
    results = []
    for fused in (True, False):
        params = parameters(shapes=[(9, 3), (5,)])
        optimizer = PAIRS[name][0](params, **options)
        for seed in range(4):
            torch.manual_seed(seed)
            params[1].grad = torch.randn(5, dtype=torch.float64)
            unusual(params[0])
            if fused:
                done = optim.fused_step(optimizer, max_norm=0.7, zero_grad=True, norms=True)
                assert all(p.grad.to_dense().eq(0).all() and not p.grad.requires_grad for p in params)
                results.append((done.total_norm, done.grad_norms, done.weight_norms, done.update_norms))
                continue
            dense = [p.grad.detach().to_dense() for p in params]
            weights = [p.detach().clone() for p in params]
            total_norm = torch.nn.utils.get_total_norm(dense)
            for p in params:
                p.grad = p.grad.detach() * (0.7 / (total_norm + 1e-6)).clamp(max=1.0)
            optimizer.step()
            expected = [dense, weights, [p.detach() - w for p, w in zip(params, weights)]]
            norms = [torch.stack([t.norm() for t in tensors]) for tensors in expected]
            torch.testing.assert_close(results[seed], (total_norm, *norms), **EXACT)
        results.append(params)
    torch.testing.assert_close(results[4], results[5], **EXACT)


def test_distributed_gradients(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        results = []
        for spread in (lambda t: distribute_tensor(t, mesh, [Shard(0)]), lambda t: t):
            p, q = (torch.nn.Parameter(spread(t.detach())) for t in parameters(shapes=[(4, 3), (5,)]))
            optimizer = optim.Adam([p, q], lr=0.1)
            for seed in range(3):
                p.grad, q.grad = (spread(t.detach()) for t in parameters(shapes=[(4, 3), (5,)], seed=seed + 1))
                done = optim.fused_step(optimizer, max_norm=0.7, zero_grad=True, norms=True)
            tensors = [p.detach(), q.detach(), p.grad, q.grad]
            norms = [done.total_norm, done.grad_norms, done.weight_norms, done.update_norms]
            results.append([*(getattr(t, "full_tensor", lambda t=t: t)() for t in tensors), *norms])
        torch.testing.assert_close(*results, **EXACT)
    finally:
        torch.distributed.destroy_process_group()


def test_groups_dtypes_and_missing_gradients():
    params, others = (
        [*parameters(torch.float64), *parameters(torch.float32), *parameters(torch.bfloat16)] for _ in "ab"
    )
    optimizers = []
    for ps in (params, others):
        for p in ps:
            p.grad = torch.ones_like(p)
        ps[1].grad = ps[7].grad = None
        optimizers.append(optim.Adam([{"params": ps[:6]}, {"params": ps[6:], "lr": 0.1}]))
    done = optim.fused_step(optimizers[0], max_norm=0.5, norms=True)
    grads = [p.grad for p in others if p.grad is not None]
    total_norm = torch.nn.utils.get_total_norm([g.double() for g in grads])
    for grad in grads:
        grad.mul_(0.5 / (total_norm + 1e-6))
    optimizers[1].step()
    torch.testing.assert_close(done.total_norm, total_norm, **EXACT)
    assert [*map(id, done.params)] == [id(p) for p in params if p.grad is not None]
    for p, other in zip(params, others):
        close = {torch.float64: EXACT, torch.float32: TOLERANCE[torch.float32]}
        torch.testing.assert_close(p, other, **close.get(p.dtype, {"rtol": 0.01, "atol": 0.01}))
    torch.testing.assert_close(done.grad_norms[:2], torch.tensor([12, 1]).double().sqrt(), **EXACT)
    empty = optim.fused_step(optim.Adam(parameters()), max_norm=0.5, zero_grad=True, norms=True)
    assert (empty.params, empty.total_norm, len(empty.update_norms)) == ([], 0, 0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_spreads_as_in_torch(bad):
    results = []
    for fused in (True, False):
        params = parameters(shapes=[(3,), (4,)])
        optimizer = optim.SGD(params, lr=0.1)
        gradients(params, 0)
        params[0].grad[1] = bad
        if fused:
            optim.fused_step(optimizer, max_norm=1.0)
        else:
            separately(optimizer, max_norm=1.0)
        results.append(params)
    torch.testing.assert_close(*results, **EXACT, equal_nan=True)


def test_a_step_that_fails_leaves_no_trace():
    params = parameters()
    optimizer = optim.Adam(params)
    gradients(params, 0)
    optimizer.param_groups[0]["betas"] = ("a", "b")
    with pytest.raises(TypeError):
        optim.fused_step(optimizer, scale=0.0, zero_grad=True)
    assert all(p.grad.ne(0).any() for p in params if p.numel())
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    other_params = parameters()
    other = optim.Adam(other_params)
    gradients(other_params, 0)
    optimizer.step(), other.step()
    torch.testing.assert_close(params, other_params, **BITWISE)


def test_rules_of_ones_own_with_totals_and_outer_numbers():
    @formula(updates=("weight",), static=("twice",))
    def rule(weight, slope, *, rate, twice=False):
        return weight - (2 if twice else 1) * rate * slope, total(abs(slope))

    formula_of_it = extended(rule.formula, scaled=True, cleared=True, measured=True)
    assert formula_of_it is extended(rule.formula, scaled=True, cleared=True, measured=True)
    for engine in ("torch", "numba"):
        weights, slopes = ([torch.full((n,), value) for n in (3, 5)] for value in (1.0, 2.0))
        with use(engine):
            totals = formula_of_it.foreach_(weights, slopes, rate=0.5, twice=True, _scale=0.25)
        assert [w.tolist() for w in weights] == [[0.5] * 3, [0.5] * 5]
        assert all(s.eq(0).all() for s in slopes)
        expected = [[1.5, 2.5], [12, 20], [3, 5], [0.75, 1.25]]  # of the scaled gradient; of what was there
        assert [t.tolist() for t in totals] == expected


def test_copies_and_hooks_know_nothing_of_it():
    params = parameters()
    optimizer = optim.Adam(params)
    copies = []
    optimizer.register_step_pre_hook(lambda *a: copies.append(copy.deepcopy(optimizer)))
    gradients(params, 0)
    optim.fused_step(optimizer, max_norm=0.1)
    assert not hasattr(copies[0], "_extras")
    assert not hasattr(optimizer, "_extras")
    train(copies[0], copies[0].param_groups[0]["params"], 1)


def test_errors():
    optimizer = optim.SGD(parameters(shapes=SHAPES[:1]))
    with pytest.raises(
        TypeError, match=r"optimizer must be one of torch_bp.optim with a rule, got torch.optim.sgd.SGD"
    ):
        optim.fused_step(torch.optim.SGD(parameters()))
    for message, options in {
        r"max_norm must be >= 0, got -1; None": {"max_norm": -1},
        r"max_norm must be >= 0, got nan": {"max_norm": float("nan")},
        r"scale must be None where max_norm is given, got 2 and 1": {"max_norm": 1, "scale": 2},
        r"scale must have one element, got shape \(2,\)": {"scale": torch.ones(2)},
    }.items():
        with pytest.raises(ValueError, match=f"^fused_step: {message}"):
            optim.fused_step(optimizer, **options)


class Wrapper:
    """As Lightning and others wrap optimizers: what it does not have is the optimizer's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


def test_a_wrapper_is_not_the_optimizer():
    """`step` would look for what there is to do in the one, and not find it in the other."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(TypeError, match="must be the optimizer itself, got Wrapper"):
        optim.fused_step(Wrapper(optim.SGD([weight], lr=1.0)), max_norm=1.0)
    assert torch.equal(weight.detach(), torch.ones(2))


def test_a_hook_that_clears_gradients():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = optim.SGD([weight], lr=1.0)
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    done = optim.fused_step(optimizer, norms=True)
    assert done.params[0] is weight
    assert done.update_norms.item() == pytest.approx(2**0.5)


def test_gradients_with_a_pending_conjugation():
    weights = [torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j])) for _ in range(2)]
    for w in weights:
        (w.conj() * torch.tensor([0.5 - 1j, 2j])).real.sum().backward()
    assert weights[0].grad.is_conj()
    weights[1].grad = weights[1].grad.resolve_conj()  # torch cannot clip the other
    mine, theirs = optim.SGD(weights[:1], lr=0.1), torch.optim.SGD(weights[1:], lr=0.1)
    done = optim.fused_step(mine, max_norm=1.0)
    norm = torch.nn.utils.clip_grad_norm_(weights[1:], 1.0)
    theirs.step()
    torch.testing.assert_close(done.total_norm.float(), norm)
    torch.testing.assert_close(weights[0], weights[1])
