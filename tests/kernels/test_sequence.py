"""Records: torch's operations and our kernels, run by a compiled loop, give what they give from Python."""

import pytest
import torch

from torch_bp.kernels import formula, sequence
from torch_bp.kernels.cpu import usable
from torch_bp.kernels.sequence import Chain, Record, record

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(not usable(), reason="needs Numba")


def tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    z, other, wide = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 7), (5, 7), (7, 4)))
    return z, other, wide, torch.randn(4, generator=generator).to(dtype)


CALLS = {
    "mm": lambda z, o, w, b: (aten.mm.default, (z, w), {}),
    "mm of a transposed one": lambda z, o, w, b: (aten.mm.default, (z.t(), o), {}),
    "addmm": lambda z, o, w, b: (aten.addmm.default, (b, z, w), {}),
    "addmm, scaled": lambda z, o, w, b: (aten.addmm.default, (b, z, w), {"beta": 0.5, "alpha": 2}),
    **{
        name: lambda z, o, w, b, name=name: (getattr(aten, name).default, (z,), {})
        for name in ("relu", "sigmoid", "tanh", "silu", "neg", "gelu", "leaky_relu", "hardtanh", "softplus", "elu")
    },
    "gelu by tanh": lambda z, o, w, b: (aten.gelu.default, (z,), {"approximate": "tanh"}),
    "leaky_relu of 1": lambda z, o, w, b: (aten.leaky_relu.default, (z, 1), {}),
    "hardtanh of its own": lambda z, o, w, b: (aten.hardtanh.default, (z, -0.25, 2), {}),
    "softplus of its own": lambda z, o, w, b: (aten.softplus.default, (z, 3.0, 1.5), {}),
    "elu of its own": lambda z, o, w, b: (aten.elu.default, (z, 0.3, 2.0, 0.5), {}),
    "mul": lambda z, o, w, b: (aten.mul.Tensor, (z, o), {}),
    "div by one number": lambda z, o, w, b: (aten.div.Tensor, (z, b[0]), {}),
    "add": lambda z, o, w, b: (aten.add.Tensor, (z, o), {"alpha": -3}),
    "sub": lambda z, o, w, b: (aten.sub.Tensor, (z, o), {"alpha": 0.25}),
    "log_softmax": lambda z, o, w, b: (aten._log_softmax.default, (z, 1, False), {}),
    "log_softmax of columns": lambda z, o, w, b: (aten._log_softmax.default, (z, 0, False), {}),
    "sum of rows": lambda z, o, w, b: (aten.sum.dim_IntList, (z, [0]), {}),
    "sum of all": lambda z, o, w, b: (aten.sum.dim_IntList, (z, [0, 1], True), {}),
    "clamp": lambda z, o, w, b: (aten.clamp.default, (z, 0.25), {}),
    "clamp both": lambda z, o, w, b: (aten.clamp.default, (z, -1, 0.5), {}),
    "clamp above": lambda z, o, w, b: (aten.clamp.default, (z,), {"max": 1}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_torchs_operations(name, dtype):
    operation, args, keywords = CALLS[name](*tensors(dtype))
    expected = operation(*args, **keywords)
    out = torch.full_like(expected, torch.nan)
    made = record(operation, args, keywords, out)
    assert made is not None
    Chain([made])()
    assert torch.equal(out, expected)


def test_every_operation_that_is_listed_was_called():
    tried = {call(*tensors(torch.float32))[0] for call in CALLS.values()}
    in_place = {aten.relu_.default, aten.sigmoid_.default, aten.tanh_.default, aten.copy_.default}
    assert tried | in_place == set(sequence._CALLS)


def test_operations_in_place_and_in_order():
    z, other, _, _ = tensors(torch.float32)
    source = other.clone()
    expected = torch.tanh(torch.sigmoid(torch.relu(source)))
    calls = [record(aten.copy_.default, (z, source), {}, None)]
    calls += [record(getattr(aten, f"{n}_").default, (z,), {}, None) for n in ("relu", "sigmoid", "tanh")]
    chain = Chain(calls)
    chain()
    assert torch.equal(z, expected)
    source.neg_()
    chain()
    assert torch.equal(z, torch.tanh(torch.sigmoid(torch.relu(-other))))


def test_tensors_that_are_moved_are_followed():
    z, other, _, _ = tensors(torch.float32)
    given, out = torch.empty(0).set_(z), torch.empty_like(z)
    chain = Chain([record(aten.neg.default, (given,), {}, out)])
    chain()
    assert torch.equal(out, -z)
    given.set_(other)
    chain()
    assert torch.equal(out, -other)


@pytest.mark.parametrize(
    "call",
    [
        lambda z: (aten.mul.Tensor, (z, 2.0), {}),
        lambda z: (aten.sum.dim_IntList, (z, [0]), {"dtype": torch.float64}),
        lambda z: (aten.sum.dim_IntList, (z, None), {}),
        lambda z: (aten.sin.default, (z,), {}),
        lambda z: (aten.neg.default, (z.to_sparse(),), {}),
    ],
)
def test_what_cannot_be_a_record_is_none(call):
    z = torch.randn(3, 4)
    assert record(*call(z), torch.empty(3, 4)) is None


def test_without_the_symbol_an_operation_is_no_record(monkeypatch, caplog):
    caplog.set_level("INFO", "torch_bp.kernels")
    monkeypatch.setitem(sequence._CALLS, aten.cos.default, ("_ZN2at4_ops7cos_outNoSuchThing", "t:self t:out"))
    z = torch.randn(3)
    assert record(aten.cos.default, (z,), {}, torch.empty(3)) is None
    assert "called from Python" in caplog.text


@formula
def scaled(x, y, *, a, b=2.0):
    return (a / b) * x + y


@formula
def softened(x, *, a):
    from torch_bp.kernels import exp

    return x * exp(a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_with_numbers_and_with_numbers_in_memory(dtype):
    x, y, _, _ = tensors(dtype)
    out = torch.empty_like(x)
    made = scaled.formula.bound((x, y), (out,), {"a": 3.0})
    assert isinstance(made, Record)
    Chain([made])()
    assert torch.equal(out, scaled(x, y, a=3.0))
    for number in (torch.tensor(5.0), torch.tensor(5.0, dtype=torch.float64), torch.tensor(5)):
        made = scaled.formula.bound((x, y), (out,), {"a": number, "b": 4})
        assert isinstance(made, Record)
        chain = Chain([made])
        for value in (5, -2):
            number.fill_(value)
            chain()
            assert torch.equal(out, scaled(x, y, a=float(value), b=4))


def test_scalars_that_need_functions_are_computed_in_python():
    x, *_ = tensors(torch.float32)
    out, number = torch.empty_like(x), torch.tensor(0.5)
    call = softened.formula.bound((x,), (out,), {"a": number})
    assert not isinstance(call, Record)
    for value in (0.5, -1.0):
        number.fill_(value)
        call()
        assert torch.equal(out, softened(x, a=value))


def test_a_record_that_fails_is_told():
    wrong = [record(aten.mm.default, (torch.ones(2, 3), torch.ones(4, 5)), {}, torch.empty(2, 5))]
    with pytest.raises(RuntimeError, match="operation 0 of 1"):
        Chain(wrong)()
