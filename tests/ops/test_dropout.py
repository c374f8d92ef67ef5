"""Dropout draws torch's random numbers, and keeps a bit for each."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

import torch_bp.nn.functional as ours
from torch_bp.ops.dropout import pack, unpack

theirs = torch.nn.functional
SHAPES = [(), (1,), (7,), (8,), (9,), (64, 33), (2, 3, 4, 5)]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT if t.dim() > 1 else t,
    "strided": lambda t: torch.stack((t, t), -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() else t,
}


def run(module, x, p, **options):
    """Output and gradient with the same random numbers every time."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(3)
    output = module.dropout(x * 1 if options.get("inplace") else x, p, **options)
    return output, torch.autograd.grad(output.sin().sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_torch_bit_for_bit(shape, p, dtype):
    x = torch.randn(shape).to(dtype)
    for options in ({}, {"inplace": True}, {"training": False}):
        for got, expected in zip(run(ours, x, p, **options), run(theirs, x, p, **options)):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    for shape in SHAPES:
        x = LAYOUTS[layout](torch.randn(shape))
        for got, expected in zip(run(ours, x, 0.3), run(theirs, x, 0.3)):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
            assert got.stride() == expected.stride()


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_what_is_not_finite_as_torch(p):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]).repeat(8)
    for got, expected in zip(run(ours, x, p), run(theirs, x, p)):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_share_and_scale():
    output = ours.dropout(torch.ones(100_000), 0.2)
    assert set(output.tolist()) == {0.0, 1.25}
    assert abs(float(output.mean()) - 1) < 0.01


@pytest.mark.parametrize("shape", [*SHAPES, (0,), (3, 0)], ids=str)
def test_bits_come_back(shape):
    kept = torch.rand(shape) < 0.5
    bits = pack(kept)
    assert bits.dtype == torch.uint8
    assert bits.shape == (-(-kept.numel() // 8),)
    assert torch.equal(unpack(bits, kept.shape), kept.to(torch.uint8))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_bit_per_element_is_saved(inplace):
    x = torch.randn(1000, 8, requires_grad=True)
    hidden, kept = x * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours.dropout(hidden, 0.3, inplace=inplace)
    assert sum(t.numel() * t.element_size() for t in kept) == 1000


def test_nothing_is_saved_where_nothing_is_drawn():
    x = torch.randn(1000, requires_grad=True)
    for options in ({"p": 0.0}, {"p": 1.0}, {"training": False}):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            ours.dropout(x, **options)
        assert kept == []


def test_the_input_itself_where_nothing_is_done():
    x, empty = torch.randn(3), torch.randn(0, 3)
    for module in (ours, theirs):
        assert module.dropout(x, 0.5, training=False) is x
        assert module.dropout(x, 0.0) is x
        assert module.dropout(empty) is empty


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_errors_are_torchs(p):
    messages = []
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="between 0 and 1") as caught:
            module.dropout(torch.ones(2), p)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("x", [torch.ones(3, dtype=torch.long), torch.ones(3, dtype=torch.complex64)], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_dtypes_that_torch_refuses(x, inplace):
    messages = []
    for module in (ours, theirs):
        with pytest.raises(RuntimeError) as caught:
            module.dropout(x.clone(), 0.5, inplace=inplace)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def seeded(module, p=0.4):
    """Dropout that drops the same elements at every call."""

    def dropout(x):
        torch.manual_seed(1)
        return module.dropout(x, p)

    return dropout


def test_finite_differences():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    batched = {"check_batched_grad": True}
    assert gradcheck(seeded(ours), x, check_forward_ad=True, **batched)
    assert gradgradcheck(seeded(ours), x, check_fwd_over_rev=True, **batched)


def test_functional_transforms_equal_torch():
    x = torch.randn(3, 3, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        dropout = seeded(module)
        tangent = jvp(dropout, (x,), (x.cos(),))
        curvature = vmap(lambda v, f=dropout: jvp(grad(lambda x: f(x).pow(3).sum()), (x,), (v,))[1], randomness="same")
        found.append((*tangent, curvature(torch.eye(9, dtype=torch.float64).view(9, 3, 3))))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        hessian(lambda x: ours.dropout(x).pow(3).sum())(x)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_torchs_numbers(randomness):
    x = torch.randn(5, 9)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        output = vmap(module.dropout, randomness=randomness)(x)
        torch.manual_seed(0)
        slopes = vmap(grad(lambda x, f=module.dropout: f(x).square().sum()), randomness=randomness)(x)
        found.append((output, slopes))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    dropped = found[0][0] == 0
    assert bool((dropped == dropped[0]).all()) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(ours.dropout)(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_again(reentrant):
    x = torch.randn(64, requires_grad=True)
    output = checkpoint(ours.dropout, x, use_reentrant=reentrant)
    output.sum().backward()
    torch.testing.assert_close(x.grad * x, output)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_gradients_are_those_of_what_was_dropped():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ours.dropout(x, 0.25), fullgraph=True, backend="aot_eager")
    x = torch.rand(4000, requires_grad=True)
    output = compiled(x)
    (slope,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(slope * x, output)
    assert 0.7 < float((slope != 0).float().mean()) < 0.8
    assert not torch.equal(compiled(x), output)
    torch._dynamo.reset()
