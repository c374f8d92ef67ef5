"""exp, log, tanh and erf in CPU kernels: exact, whole vectors at a time, and without torch's vector functions too."""

import pytest
import torch

from torch_bp.kernels import cache, cpu_text, erf, exp, formula, library, log, tanh, use, vector

SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-39, 88.8, -104.0, 1e30, -1e30, 710.0, 1.0]


@formula
def all_four(x):
    return exp(x), log(x), tanh(x), erf(x)


@pytest.fixture
def without_vectors(monkeypatch):
    """Torch as if it had been built without SLEEF."""

    def missing(names):
        raise AttributeError("no such symbol")

    monkeypatch.setattr(library, "export", missing)
    vector._lanes.cache_clear()
    yield
    vector._lanes.cache_clear()


def check(dtype, tried):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_003, generator=generator, dtype=torch.float64) * 10
    x[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64)
    x = x.to(dtype)
    with use("numba"):
        actual = tried(x)
    # Units in the last place against float64; in float64 against torch, itself within one.
    for result, expected in zip(actual, (f(x.double()) for f in (torch.exp, torch.log, torch.tanh, torch.erf))):
        rounded = expected.to(dtype)
        torch.testing.assert_close(result, rounded, rtol=2 * torch.finfo(dtype).eps, atol=2e-45, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact(dtype):
    check(dtype, all_four)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_without_torchs_vector_functions(dtype, without_vectors):
    again = formula(all_four.formula.function)
    text = cpu_text.text_single(again.formula._program("numba", dtype, (), {}).expression, ["a"] * 4, dtype, False)
    assert "exp = math.exp" in text
    check(dtype, again)


@pytest.mark.skipif(not vector._lanes(torch.float32), reason="this processor or torch has no vector functions")
def test_loops_call_whole_vectors():
    program = all_four.formula._program("numba", torch.float32, (), {})
    text = cpu_text.text_single(program.expression, [f"out{i}" for i in range(4)], torch.float32, False)
    run = cache.load("vectors", text, on_disk=False).run  # what comes from disk has no text to look into
    machine_code = next(iter(run.inspect_asm().values()))
    for name in vector.FUNCTIONS:
        assert f"Sleef_{name}f8_u10" in machine_code
