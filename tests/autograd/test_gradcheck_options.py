"""Every option of torch's `gradcheck` and `gradgradcheck` works: what is right passes, and each finds its fault."""

import inspect
import json

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from tests.autograd.test_gradcheck import draw, function
from torch_bp.autograd import gradcheck, gradgradcheck

SQUARE = lambda x: x * x  # noqa: E731


def fails(check, *arguments, **options):
    return check(*arguments, raise_exception=False, **options).failure


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(gradcheck, torch.autograd.gradcheck), (gradgradcheck, torch.autograd.gradgradcheck)],
    ids=["gradcheck", "gradgradcheck"],
)
def test_all_arguments_of_torch_are_taken(ours, theirs):
    assert inspect.signature(theirs).parameters.keys() <= inspect.signature(ours).parameters.keys()


@pytest.mark.parametrize("func", [lambda x: x / 0, lambda x: x * x.detach()], ids=["no finite output", "wrong"])
def test_a_report_is_json(func):
    def refuse(constant):
        raise AssertionError(constant)

    report = gradcheck(func, draw(3), raise_exception=False)
    found = json.loads(json.dumps(report.to_dict()), parse_constant=refuse)
    assert not found["passed"]
    assert repr(float(found["eps"])) == repr(report.eps)


# Forward mode


def with_jvp(factor):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, dy):
            return 2 * ctx.saved_tensors[0] * dy

        @staticmethod
        def jvp(ctx, tangent):
            return factor * ctx.saved_tensors[0] * tangent

    return Square.apply


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_forward_mode(backward, full):
    options = {"check_forward_ad": True, "check_backward_ad": backward, "full": full}
    x = draw(3, 2)
    assert gradcheck(with_jvp(2), x, **options)
    for factor in (1, -2, 2.00001):
        assert "forward mode along a direction of input 0" in fails(gradcheck, with_jvp(factor), x, **options)
        assert gradcheck(with_jvp(factor), x)


@pytest.mark.parametrize("entry", [0.0, 1e-9, 1e-6])
def test_forward_mode_at_kinks(entry):
    x = torch.tensor([entry, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    for f in (torch.relu, torch.abs, lambda x: x.clamp(0, 1), lambda x: torch.stack([x, x.flip(0)]).amax(0)):
        assert gradcheck(f, x, check_forward_ad=True)
        assert gradcheck(f, x, check_forward_ad=True, check_backward_ad=False)


def test_forward_mode_where_terms_cancel():
    a = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = (a @ a.mT + 1e-3 * torch.eye(5)).requires_grad_()
    assert gradcheck(lambda x: torch.linalg.cholesky(x @ x.mT).inverse(), x, check_forward_ad=True, rtol=1e-5)


# vmap


def test_batched_gradients():
    both = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    for f in (torch.sin, lambda x: (x.exp(), x.sum())):
        assert gradcheck(f, draw(3), **both)
    by_value = function(SQUARE, lambda dy, x: 2 * x * dy * (1 if dy.sum() > -1e9 else 2))
    assert "under vmap" in fails(gradcheck, by_value, draw(3), check_batched_grad=True)
    assert gradcheck(by_value, draw(3))


def test_batched_gradients_in_single_precision_differ_by_rounding():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10))
    both = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(model, draw(16, 512, dtype=torch.float32), precise=False, **both)


def test_batched_forward_mode():
    class Exp(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(ctx, x):
            y = x.exp()
            ctx.save_for_forward(y)
            return y

        @staticmethod
        def jvp(ctx, tangent):
            return ctx.saved_tensors[0] * tangent * (1 if tangent.sum().item() > -1e9 else 2)

    options = {"check_forward_ad": True, "check_backward_ad": False}
    assert gradcheck(Exp.apply, draw(3), **options)
    assert "under vmap" in fails(gradcheck, Exp.apply, draw(3), check_batched_forward_grad=True, **options)


# Complex and sparse


def test_complex_numbers():
    z = draw(4, dtype=torch.complex128)
    for f in (SQUARE, torch.abs, torch.conj, lambda z: z * z.conj(), torch.view_as_real, lambda z: z.real.sin()):
        assert gradcheck(f, z, check_forward_ad=True)
        assert gradcheck(f, z, full=True)
        assert gradgradcheck(f, z)
    assert gradcheck(SQUARE, draw(4, dtype=torch.complex64)).rtol == 1e-7
    assert gradcheck(lambda x: torch.complex(x, x * x), draw(3))
    unconjugated = function(SQUARE, lambda dy, z: 2 * z * dy)
    for full in (False, True):
        assert "input 0" in fails(gradcheck, unconjugated, z, full=full)
    real_part = function(SQUARE, lambda dy, z: (2 * z.conj() * dy).real + 0j)
    assert "(imaginary part)" in fails(gradcheck, real_part, z)


@pytest.mark.parametrize("ours", [gradcheck, gradgradcheck], ids=lambda check: check.__name__)
def test_torch_gets_all_options_of_a_sparse_check(ours, monkeypatch):
    theirs, given = getattr(torch.autograd, ours.__name__), {}
    monkeypatch.setattr(torch.autograd, ours.__name__, lambda *_, **options: given.update(options))
    ours(torch.sparse.mm, (draw(3, 3).detach().to_sparse().requires_grad_(), draw(3, 2)))
    known = inspect.signature(theirs).parameters.keys()
    assert given.keys() == known - {"func", "inputs", "grad_outputs", "raise_exception"}


def test_sparse_tensors_are_checked_by_torch():
    dense = torch.eye(3, dtype=torch.float64)
    sparse = dense.to_sparse().requires_grad_()
    report = gradcheck(torch.sparse.mm, (sparse, draw(3, 2)), masked=True)
    assert "torch.autograd" in report.notes[0]
    for check in (gradgradcheck, torch.autograd.gradgradcheck):
        with pytest.raises(ValueError, match="Sparse output is not supported"):
            check(torch.sparse.mm, (sparse, draw(3, 2)), masked=True)
    wrong = function(lambda a: 2 * a.to_dense(), lambda dy, a: dy)
    assert "Jacobian mismatch" in fails(gradcheck, wrong, sparse, masked=False)
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        gradcheck(wrong, sparse, masked=False)
    assert gradcheck(lambda a: a.to_dense(masked_grad=True), sparse, masked=True, full=True, atol=1e-6, rtol=1e-4)
    for check in (gradcheck, torch.autograd.gradcheck):
        with pytest.raises(ValueError, match="Sparse output is not supported"):
            check(lambda x: x.to_sparse(), draw(3, 3))


# Tolerances


def test_a_tolerance_of_zero_leaves_it_to_the_other():
    off = function(SQUARE, lambda dy, x: 2 * x * dy + 1e-4 * dy)
    x = draw(3)
    assert gradcheck(torch.sin, x, atol=0)
    assert gradcheck(torch.sin, x, eps=1e-6, atol=0, rtol=1e-3)
    assert gradcheck(off, x, atol=1e-2, rtol=0)
    assert not gradcheck(off, x, atol=1e-6, rtol=0, raise_exception=False)
    assert not gradcheck(off, x, atol=0, rtol=0, raise_exception=False)


# Second derivatives


def cube(factor):
    """x^3, whose gradient is right, and the gradient of that `factor` times what it is."""

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 3 * x * x

        @staticmethod
        def backward(ctx, dy):
            return factor * 6 * ctx.saved_tensors[0] * dy

    return function(lambda x: x**3, lambda dy, x: dy * Slope.apply(x))


@pytest.mark.parametrize(
    "given",
    [None, draw(3, 2), torch.ones(3, 2, dtype=torch.float64), (draw(3, 2),)],
    ids=["drawn", "one", "constant", "tuple"],
)
@pytest.mark.parametrize("strided", [False, True])
def test_second_derivatives_with_given_gradients(given, strided):
    options = {"gen_non_contig_grad_outputs": strided}
    report = gradgradcheck(cube(1), draw(3, 2), given, **options)
    constant = isinstance(given, torch.Tensor) and not given.requires_grad
    assert [row.name for row in report.rows] == ["input 0", "grad_output 0"][: 1 if constant else 2]
    assert report.rows[0].error < 1e-7
    assert "input 0" in fails(gradgradcheck, cube(0.5), draw(3, 2), given, **options)


def test_second_derivatives_of_several_outputs():
    def f(x):
        return {"a": x.sin(), "b": (x * x.sum(), x.detach(), None, x.argmax())}

    assert [row.name for row in gradgradcheck(f, draw(3)).rows] == ["input 0", "grad_output 0", "grad_output 1"]
    assert gradgradcheck(f, draw(3), (draw(3), draw(3)))


def test_non_contiguous_gradients_are_what_they_say():
    seen = []

    def spy(dy, x):
        seen.append(dy.is_contiguous())
        return dy * 2 * x

    for strided in (False, True):
        seen.clear()
        assert gradgradcheck(function(SQUARE, spy), draw(3, 2), gen_non_contig_grad_outputs=strided)
        assert seen[0] is not strided


@pytest.mark.parametrize("check_rev_over_rev", [False, True])
def test_forward_over_backward(check_rev_over_rev):
    options = {"check_fwd_over_rev": True, "check_rev_over_rev": check_rev_over_rev}
    assert gradgradcheck(torch.tanh, draw(3), **options)
    assert gradgradcheck(lambda x: 3 * x, draw(3), **options)
    with pytest.raises(ValueError, match="one of check_fwd_over_rev and check_rev_over_rev must be True"):
        gradgradcheck(torch.tanh, draw(3), check_rev_over_rev=False)


def test_second_derivatives_that_are_rounding_or_nothing():
    assert gradgradcheck(torch.corrcoef, draw(2))
    assert gradgradcheck(torch.corrcoef, draw(3, 2), check_fwd_over_rev=True)
    empty = torch.ones(0, 0, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(torch.linalg.householder_product, (empty, draw(0)))
    once = function(SQUARE, torch.autograd.function.once_differentiable(lambda dy, x: 2 * x * dy))
    assert not gradgradcheck(once, draw(3), raise_exception=False)


# Surroundings


def test_a_default_device_of_another_kind():
    x = draw(4, 3)
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    kinked = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    wrong = function(SQUARE, lambda dy, x: x * dy)
    modes = {"full": True, "check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    torch.set_default_device("meta")
    try:
        assert gradcheck(layer, x)
        assert gradcheck(layer, x, **modes)
        assert gradcheck(torch.relu, kinked)
        assert gradgradcheck(layer, x)
        assert not gradcheck(wrong, x, raise_exception=False)
    finally:
        torch.set_default_device(None)
    with pytest.raises(ValueError, match="input 0 must have numbers, got a tensor on the meta device"):
        gradcheck(SQUARE, torch.ones(3, device="meta", requires_grad=True))
