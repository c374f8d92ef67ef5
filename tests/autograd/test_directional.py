"""`directional_check`: right layers pass in every precision, wrong ones are named, and nothing changes by a bit."""

import copy

import pytest
import torch
from torch import nn

import torch_bp.nn as ours
from torch_bp.autograd import Function, directional_check

PRECISIONS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def network(activation=nn.ReLU, dtype=torch.float32):
    layers = [nn.Linear(30, 64), activation(), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 64), activation()]
    return nn.Sequential(*layers, nn.LayerNorm(64), nn.Linear(64, 10)).to(dtype)


def batch(dtype=torch.float32):
    return torch.randn(64, 30, dtype=dtype), torch.randint(10, (64,))


class OffBy(Function):
    """An affine map whose gradient for the weight is off by a factor, or lacks a column."""

    @staticmethod
    def forward(x, weight, factor):
        return x @ weight.t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.factor = inputs[2]

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dw = dy.t() @ x
        if ctx.factor is None:
            dw[:, : dw.shape[1] // 2] = 0
        return dy @ weight, dw if ctx.factor is None else ctx.factor * dw, None


class Wrong(nn.Linear):
    factor = None

    def forward(self, x):
        return OffBy.apply(x, self.weight, self.factor)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, ours.ReLU], ids=lambda a: a.__module__)
def test_right_layers_pass(activation, dtype):
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = batch(dtype)
        report = directional_check(network(activation, dtype), nn.functional.cross_entropy, x, y, seed=seed)
        assert report, f"seed {seed}: {report}"
        assert [row.name for row in report.rows] == ["loss", "0", "2", "4", "6", "7"]
        if dtype in PRECISIONS[:2]:
            assert all(row.resolved for row in report.rows[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.5, 1.1, None])
def test_a_wrong_layer_is_named(factor, dtype):
    for seed in range(4):
        torch.manual_seed(seed)
        model = network(dtype=dtype)
        model[4] = Wrong(64, 64, bias=False, dtype=dtype)
        model[4].factor = factor
        x, y = batch(dtype)
        report = directional_check(model, nn.functional.cross_entropy, x, y, seed=seed)
        assert report.wrong == ["4"]
        assert "off by more than" in str(report)


def test_a_wrong_sign_is_seen_in_half_precision():
    model = network(nn.Tanh, torch.bfloat16)
    model[4] = Wrong(64, 64, bias=False, dtype=torch.bfloat16)
    model[4].factor = -1.0
    assert "4" in directional_check(model, nn.functional.cross_entropy, *batch(torch.bfloat16)).wrong


def test_a_wrong_loss_is_a_row_of_its_own():
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.square().mean()

        @staticmethod
        def backward(ctx, dy):
            (z,) = ctx.saved_tensors
            return 2 * z * dy

    assert directional_check(network(), Off.apply, batch()[0]).wrong == ["loss"]


def test_nothing_changes_by_a_bit():
    model, (x, y) = network(), batch()
    model[0].bias.requires_grad_(False)
    model[6].eval()
    nn.functional.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict()), [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    versions = [p._version for p in (*model.parameters(), *model.buffers())]
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    assert directional_check(model, nn.functional.cross_entropy, x, y)
    assert all(torch.equal(t, before[0][name]) for name, t in model.state_dict().items())
    for parameter, grad in zip(model.parameters(), before[1]):
        assert grad is None if parameter.grad is None else torch.equal(parameter.grad, grad)
    assert versions == [p._version for p in (*model.parameters(), *model.buffers())]
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())


def test_under_autocast_the_tolerance_is_that_of_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        report = directional_check(network(), nn.functional.cross_entropy, *batch())
    assert report.rtol == 0.5
    assert report


def test_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, a, b):
            return {"sum": self.inner(a + b), "none": None}

    a, b = torch.randn(4, 3), torch.randn(4, 3)
    for given in ((a, b), {"a": a, "b": b}):
        report = directional_check(Two(), lambda out: out["sum"].square().mean(), given, rtol=1e-2)
        assert report.errors.keys() == {"loss", "inner"}
        assert report.rtol == 1e-2
    assert list(directional_check(nn.Linear(3, 2), lambda z: z.sum(), a).errors) == ["loss", "Linear"]


def test_errors():
    x, _ = batch()
    with pytest.raises(ValueError, match="some parameter of the model must require grad"):
        directional_check(nn.Tanh(), nn.functional.mse_loss, x, x)
    with pytest.raises(ValueError, match=r"must return one finite number, got shape \(64, 10\)"):
        directional_check(network(), lambda z: z, x)
    with pytest.raises(ValueError, match="must return one finite number, got nan"):
        directional_check(network(), lambda z: z.sum() * float("nan"), x)
    for rtol in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="rtol must be positive and finite"):
            directional_check(network(), lambda z: z.sum(), x, rtol=rtol)
