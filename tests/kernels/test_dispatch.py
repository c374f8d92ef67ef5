"""What a kernel may not serve, torch does, with the right result. One test for each reason."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.formulas import averaged, product_rule
from torch_bp.kernels import formula, use


def served(*tensors, **scalars):
    return product_rule.formula.by_kernel(tensors, scalars) is not NotImplemented


def reference(dy, y):
    return dy * y * (1 - y)


def pair(*shape, **options):
    torch.manual_seed(0)
    return torch.randn(*shape, **options), torch.rand(*shape, **options)


def zero_tensor(shape):
    return torch._efficientzerotensor(shape)


def negative_view(tensor):
    return torch._neg_view(tensor)


class Subclass(torch.Tensor):
    """A subclass may mean anything by an operation."""


UNSUITABLE = {
    "shapes differ": lambda: (torch.randn(3, 4), torch.rand(4)),
    "strides differ": lambda: (torch.randn(3, 4), torch.rand(4, 3).t()),
    "overlapping elements": lambda: (torch.randn(4, 1).expand(4, 3), torch.rand(4, 1).expand(4, 3)),
    "gaps": lambda: (torch.randn(4, 6)[:, ::2], torch.rand(4, 6)[:, ::2]),
    "dtypes differ": lambda: (torch.randn(3), torch.rand(3, dtype=torch.float64)),
    "integers": lambda: (torch.arange(3), torch.arange(3)),
    "complex": lambda: (torch.randn(3, dtype=torch.complex64), torch.rand(3, dtype=torch.complex64)),
    "negative bit": lambda: (negative_view(torch.randn(3)), negative_view(torch.rand(3))),
    "zero tensor": lambda: (zero_tensor((3,)), torch.rand(3)),
    "empty": lambda: (torch.randn(0), torch.rand(0)),
    "mkldnn": lambda: (torch.randn(3, 3).to_mkldnn(), torch.rand(3, 3).to_mkldnn()),
    "subclass": lambda: (torch.randn(3).as_subclass(Subclass), torch.rand(3).as_subclass(Subclass)),
    "graph recorded": lambda: (torch.randn(3, requires_grad=True), torch.rand(3)),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_unsuitable_tensors(case):
    dy, y = UNSUITABLE[case]()
    assert not served(dy, y)
    if case == "mkldnn":  # torch cannot subtract there
        return
    result, expected = product_rule(dy, y), reference(dy, y)
    assert type(result) is type(expected)
    torch.testing.assert_close(result, expected)
    if case == "graph recorded":
        (gradient,) = torch.autograd.grad(result.sum(), dy)
        torch.testing.assert_close(gradient, y * (1 - y))


def test_suitable_tensors_are_served():
    assert served(*pair(3, 4))
    assert served(*pair(3, 4, dtype=torch.float64))
    dy, y = pair(3, 4, requires_grad=True)
    with torch.no_grad():
        assert served(dy, y)
    assert served(torch.nn.Parameter(dy.detach(), requires_grad=False), y.detach())
    with torch.inference_mode():
        assert served(*pair(3))


def test_meta_tensors_leave_no_mark():
    """A device that no kernel serves is not CUDA."""
    tried = formula(lambda x: 2 * x)
    assert tried(torch.ones(3, device="meta")).device.type == "meta"
    assert not tried.formula._programs


def test_sparse():
    dy = torch.randn(3, 3).to_sparse()
    assert not served(dy, dy)
    with pytest.raises(RuntimeError):  # torch has no such operation, and says so
        product_rule(dy, dy)


def test_meta_tensors():
    dy, y = pair(3, 4, device="meta")
    assert not served(dy, y)
    assert product_rule(dy, y).shape == (3, 4)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        dy, y = mode.from_tensor(torch.ones(3)), mode.from_tensor(torch.ones(3))
        assert not served(dy, y)
        assert product_rule(dy, y).shape == (3,)
    assert not served(dy, y)


def test_forward_mode_keeps_the_tangent():
    dy, y = pair(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dy, torch.ones(3))
        assert not served(dual, y)
        tangent = forward_ad.unpack_dual(product_rule(dual, y)).tangent
    torch.testing.assert_close(tangent, y * (1 - y))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_functorch_transforms(transform):
    dy, y = pair(3, 4)
    seen = []

    def total(dy):
        seen.append(served(dy, y[0]))
        return product_rule(dy, y[0]).sum()

    if transform == "vmap":
        torch.testing.assert_close(torch.func.vmap(total)(dy), reference(dy, y[0]).sum(1))
    elif transform == "grad":
        torch.testing.assert_close(torch.func.grad(total)(dy[0]), y[0] * (1 - y[0]))
    else:
        _, tangent = torch.func.jvp(total, (dy[0],), (torch.ones(4),))
        torch.testing.assert_close(tangent, (y[0] * (1 - y[0])).sum())
    assert seen == [False]


def test_batched_gradients():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            return product_rule(dy, torch.full_like(dy, 0.5))

    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(Double.apply(x), x, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close(gradient, torch.eye(3) / 4)


def test_dispatch_modes_see_the_operations():
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    names = []
    dy, y = pair(3)
    with Record():
        assert not served(dy, y)
        product_rule(dy, y)
    assert any(n.startswith("mul") for n in names)


def test_jit_tracing_records_the_operations():
    dy, y = pair(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still used
        traced = torch.jit.trace(lambda a, b: product_rule(a, b), (dy, y))
    other = torch.randn(3)
    torch.testing.assert_close(traced(other, y), reference(other, y))


def test_compile_takes_the_formula_apart():
    dy, y = pair(3)
    compiled = torch.compile(lambda a, b: product_rule(a, b), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(dy, y), reference(dy, y))


@pytest.mark.parametrize("engine", ["auto", "torch", "numba"])
def test_partly_overlapping_writes(engine):
    memory, expected = torch.arange(9.0), torch.arange(9.0)
    param, grad, average = expected[1:], expected[:-1].clone(), torch.zeros(8)
    with use("torch"):
        averaged(param, grad, average, rate=0.1, beta=0.5)
    with use(engine):
        averaged(memory[1:], memory[:-1], torch.zeros(8), rate=0.1, beta=0.5)
    torch.testing.assert_close(memory, expected)


@pytest.mark.parametrize("engine", ["torch", "numba"])
def test_one_tensor_twice_in_a_list(engine):
    """Two updates of one tensor are made one after the other, not by two threads at once."""
    param, average = torch.ones(40000), torch.zeros(40000)
    with use(engine):
        averaged.foreach_([param, param], [torch.ones(40000)] * 2, [average, average], rate=0.1, beta=0.5)
    once, twice = torch.ones(1), torch.zeros(1)
    for _ in range(2):
        twice = 0.5 * twice + 0.5
        once = once - 0.1 / (twice.sqrt() + 1e-8)
    torch.testing.assert_close(param, once.expand(40000))


def test_inference_tensors_are_not_written_outside_inference_mode():
    with torch.inference_mode():
        param = torch.ones(3)
    for engine in ("torch", "numba"):
        with use(engine), pytest.raises(RuntimeError, match=r"[Ii]nference"):
            averaged(param, torch.ones(3), torch.zeros(3), rate=0.1, beta=0.5)


def test_a_leaf_is_not_written_while_a_graph_is_recorded():
    param = torch.ones(3, requires_grad=True)
    with use("numba"), pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        averaged(param, torch.ones(3), torch.zeros(3), rate=0.1, beta=0.5)
    with use("numba"), pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        averaged.foreach_([param], [torch.ones(3)], [torch.zeros(3)], rate=0.1, beta=0.5)


def test_use_restores_the_engine_and_checks_its_name():
    dy, y = pair(3)
    with use("torch"):
        assert not served(dy, y)
        with use("numba"):
            assert served(dy, y)
        assert not served(dy, y)
    assert served(dy, y)
    with (
        pytest.raises(ValueError, match=r"engine must be one of 'auto', 'torch', 'numba', 'triton', got 'cuda'"),
        use("cuda"),
    ):
        pass


def test_a_wrong_call_is_refused_on_the_short_way_too():
    x = torch.rand(3)
    for engine in ("torch", "numba"):
        with use(engine):
            tried_first = product_rule(x, x)
            assert tried_first.shape == x.shape
            for wrong in (
                lambda: product_rule(x, x, bogus=1),
                lambda: product_rule(x, x, None),
                lambda: product_rule(x, 2.0),
            ):
                with pytest.raises(TypeError):
                    wrong()
            with pytest.raises(TypeError):
                product_rule(None, x, x)
    with pytest.raises(ValueError, match="engine"):
        use("cuda")
