"""Each quantity, stated again with plain autograd or NumPy."""

import math

import numpy as np
import pytest
import torch

from torch_bp import nn
from torch_bp.diagnostics import quantities
from torch_bp.diagnostics.derivative import active_counts, differentiable, from_output
from torch_bp.kernels import use

ENGINES = pytest.mark.parametrize("engine", ["torch", "auto"])
NAN, INF = math.nan, math.inf
TENSORS = {
    "matrix": torch.randn(7, 5),
    "empty": torch.zeros(0, 3),
    "number": torch.tensor(2.0),
    "not finite": torch.tensor([[1.0, NAN, -INF], [INF, -2.0, NAN]]),
    "double": torch.randn(3, 4, dtype=torch.float64),
    "bfloat16": torch.randn(5, 3).bfloat16(),
    "complex": torch.randn(3, 2, dtype=torch.complex64),
    "transposed": torch.randn(4, 6).t(),
    "expanded": torch.ones(1).expand(5, 3),
}


def restated(x):
    x = torch.view_as_real(x) if x.is_complex() else x
    x = x.double().numpy().ravel()
    finite = x[np.isfinite(x)]
    return [finite.sum(), (finite**2).sum(), np.isnan(x).sum(), np.isinf(x).sum()]


@ENGINES
@pytest.mark.parametrize("name", TENSORS)
def test_sums(name, engine):
    with use(engine):
        found = quantities.sums([TENSORS[name]] * 2)
    assert found.dtype == torch.float64
    for row in found:
        np.testing.assert_allclose(row, restated(TENSORS[name]), rtol=1e-6, atol=1e-6)


@ENGINES
def test_sums_of_several_kinds_at_once(engine):
    with use(engine):
        found = quantities.sums([*TENSORS.values()])
    np.testing.assert_allclose(found, [restated(t) for t in TENSORS.values()], rtol=1e-6, atol=1e-6)


def test_mean_and_variance():
    x = np.random.default_rng(0).normal(3, 2, 50)
    mean, variance = quantities.mean_and_variance(50, x.sum(), (x**2).sum())
    assert (mean, variance) == pytest.approx((x.mean(), x.var()))
    assert all(map(math.isnan, quantities.mean_and_variance(0, 0.0, 0.0)))
    assert quantities.mean_and_variance(3, 3 * 0.1, 3 * 0.01)[1] >= 0


@pytest.mark.parametrize("shape", [(6,), (1,), (6, 4), (3, 2, 2), ()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_per_example_norms_are_those_of_gradients_one_by_one(shape, bias):
    layer = torch.nn.Linear(5, 3, bias, dtype=torch.float64)
    x = torch.randn(*shape, 5, dtype=torch.float64)
    z = layer(x)
    z.retain_grad()
    weights = torch.randn_like(z)
    (z.sin() * weights).sum().backward()
    expected = []
    for one, scale in zip(x, weights) if shape else [(x, weights)]:
        found = torch.autograd.grad((layer(one).sin() * scale).sum(), list(layer.parameters()))
        expected.append(sum(g.square().sum() for g in found))
    torch.testing.assert_close(quantities.per_example_squares(x, z.grad, bias), torch.stack(expected))


def test_noise_scale_of_known_gradients():
    """Drawn from a normal distribution with |G|^2 = 8 and tr(S) = 4.5; the mean over many batches."""
    generator = torch.Generator().manual_seed(0)
    g = math.sqrt(8 / 50) + 0.3 * torch.randn(20000, 8, 50, generator=generator, dtype=torch.float64)
    found = [
        quantities.noise(float(batch.square().sum(1).mean()), float(batch.mean(0).square().sum()), 8)
        for batch in g[:4000]
    ]
    spread, square = np.mean(found, axis=0)
    assert spread == pytest.approx(4.5, rel=0.01)
    assert square == pytest.approx(8, rel=0.01)


def test_predicted_decrease_is_the_directional_derivative():
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = lambda w, b: (w.sum(0) * b).sin().sum()  # noqa: E731
    steps = [torch.randn_like(w), torch.randn_like(b)]
    gradients = torch.autograd.grad(loss(w, b), (w, b))
    h = 1e-6
    ahead, behind = (loss(*(p + s * u for p, u in zip((w, b), steps))) for s in (h, -h))
    decrease = (behind - ahead).item() / (2 * h)
    assert quantities.predicted_decrease(gradients, steps).item() == pytest.approx(decrease, rel=1e-7)


@pytest.mark.parametrize("name", TENSORS)
def test_histograms_survive_what_is_not_finite(name):
    x = TENSORS[name]
    found = quantities.histogram(x, bins=4)
    x = torch.view_as_real(x) if x.is_complex() else x
    values = x.double().numpy().ravel()
    finite = values[np.isfinite(values)]
    assert found[2:6].sum() == len(finite)
    assert found[-2:].tolist() == restated(x)[2:]
    if len(finite):
        assert found[:2].tolist() == [finite.min(), finite.max()]
        assert found[6:8].tolist() == pytest.approx([finite.mean(), (finite**2).mean()], rel=1e-6)


def test_histogram_counts():
    x = torch.tensor([0.0, 0.1, 0.9, 1.0, 1.0, NAN, INF])
    assert quantities.histogram(x, bins=2).tolist()[:4] == [0, 1, 2, 3]
    wide = torch.tensor([-3e38, 3e38, 0.0, 1e38])
    assert quantities.histogram(wide, bins=2)[2:4].tolist() == [1, 3]
    assert quantities.histogram(torch.full((3,), NAN), bins=2).tolist() == [0, 0, 0, 0, 0, 0, 3, 0]


ACTIVATIONS = [
    *(
        kind()
        for kind in (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ELU, nn.Softplus, nn.SiLU, nn.GELU)
    ),
    *(
        torch.nn.ReLU(inplace=True),
        torch.nn.ReLU6(),
        torch.nn.LeakyReLU(0.3, inplace=True),
        torch.nn.Hardtanh(-2, 1, True),
    ),
    *(torch.nn.GELU("tanh"), torch.nn.LeakyReLU(0.001), torch.nn.Softplus(3.0, 1.0)),
]


@ENGINES
@pytest.mark.parametrize("module", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", [(40, 6), (5, 8, 6)], ids=str)
def test_active_units_are_those_with_a_derivative(module, shape, engine):
    assert differentiable(module)
    z = (6 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    with torch.enable_grad():
        a = module(z.clone())
        (slope,) = torch.autograd.grad(a.sum(), z)
    with use(engine):
        found = active_counts(module, a if from_output(module) else z.detach())
    assert found.tolist() == (slope.abs() >= 0.01).reshape(-1, 6).sum(0).tolist()


@pytest.mark.parametrize(
    "module", [torch.nn.SiLU(True), torch.nn.LeakyReLU(-0.1, True), torch.nn.Softmax(-1), torch.nn.Linear(1, 1)]
)
def test_derivatives_that_cannot_be_told(module):
    assert not differentiable(module)
