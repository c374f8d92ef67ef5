"""A rule that is not shipped: sign momentum, as README has it, by every engine, with a kill and a resume."""

import os
import subprocess
import sys

import pytest
import torch

from tests.optim.table import parameters, train
from torch_bp import optim
from torch_bp.kernels import formula, sign, use


@formula(updates=("param", "momentum_buffer"))
def sign_momentum(param, grad, momentum_buffer, *, lr, beta):
    momentum_buffer = beta * momentum_buffer + (1 - beta) * grad
    return param - lr * sign(momentum_buffer), momentum_buffer


class SignMomentum(optim.RuleOptimizer):
    rule, state_names, counts_steps = sign_momentum, ("momentum_buffer",), True

    def __init__(self, params, lr=1e-3, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})


def check_resume(engine, path, dtype):
    """Train, save and forget; another optimizer goes on from the file, to the last bit of one that was not stopped."""
    with use(engine):
        reference = parameters(dtype)
        whole = SignMomentum(reference, lr=0.1, beta=0.8)
        train(whole, reference, 5)
        torch.save({"params": reference, "optimizer": whole.state_dict()}, path)
        train(whole, reference, 5, seed=2)
        saved = torch.load(path, weights_only=True)
        resumed = SignMomentum(saved["params"])
        resumed.load_state_dict(saved["optimizer"])
        train(resumed, saved["params"], 5, seed=2)
    torch.testing.assert_close(saved["params"], reference, rtol=0, atol=0)
    assert resumed.param_groups[0]["lr"] == 0.1
    assert all(state["step"] == 10 for state in resumed.state.values())
    if engine != "torch":
        assert resumed._plan.shares[0].buckets[0].table.elements == sum(p.numel() for p in reference)
    return resumed, saved["params"]


def by_hand(dtype):
    """The rule in operations of torch."""
    params = parameters(dtype)
    buffers = [torch.zeros_like(p) for p in params]
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(5):
            for p, b in zip(params, buffers):
                b.mul_(0.8).add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=1 - 0.8)
                p.data -= 0.1 * b.sign()
    return params


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("engine", ["torch", "numba"])
def test_resume_is_bitwise(engine, dtype, tmp_path):
    resumed, params = check_resume(engine, tmp_path / "checkpoint", dtype)
    torch.testing.assert_close(params, by_hand(dtype))
    scheduler = torch.optim.lr_scheduler.StepLR(resumed, 1)
    train(resumed, params, 1)
    scheduler.step()
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.01)


def test_engines_in_lock_step(tmp_path):
    runs = [check_resume(engine, tmp_path / engine, torch.float64)[1] for engine in ("torch", "numba")]
    torch.testing.assert_close(*runs, rtol=0, atol=1e-15)


def test_interpreted_by_triton(tmp_path):
    pytest.importorskip("triton", reason="Triton is published for Linux and Windows only")
    environment = {"TRITON_INTERPRET": "1", "TORCH_BP_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.test_own_rule", str(tmp_path / "checkpoint")],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_rule_is_checked_when_its_class_is_made():
    from torch_bp.kernels import formula

    @formula
    def pure(param, grad, *, lr):
        return param - lr * grad

    @formula(updates=("grad",))
    def writes_gradient(param, grad, *, lr):
        return param - lr * grad

    @formula(updates=("param",))
    def rule(param, grad, average, *, lr):
        return param - lr * grad

    for body in (
        {"rule": pure},
        {"rule": writes_gradient},
        {"rule": rule},
        {"rule": rule, "state_names": ("a", "b")},
        {"rule": rule, "state_names": "average"},
        {"rule": lambda param, grad: None},
    ):
        with pytest.raises(TypeError, match=r"^Bad: "):
            type("Bad", (optim.RuleOptimizer,), body)
    type("Good", (optim.RuleOptimizer,), {"rule": rule, "state_names": ("average",)})
    with pytest.raises(TypeError, match="updates"):
        pure.foreach_([torch.ones(3)], [torch.ones(3)], lr=1.0)


if __name__ == "__main__":  # in a process of its own, where Triton interprets
    for dtype in (torch.float64, torch.float32):
        torch.testing.assert_close(check_resume("triton", sys.argv[1], dtype)[1], by_hand(dtype))


def test_state_in_another_order_than_the_rules():
    """A checkpoint would have each under the other's name."""

    @formula(updates=("p", "m", "v"))
    def rule(p, g, m, v, *, lr):
        return p - lr * g, m + g, v + g * g

    with pytest.raises(TypeError, match=r"Swapped: state_names must be in the rule's order"):
        type("Swapped", (optim.RuleOptimizer,), {"rule": rule, "state_names": ("v", "m")})
    renamed = type("Renamed", (optim.RuleOptimizer,), {"rule": rule, "state_names": ("first", "second")})
    optimizer = renamed([torch.nn.Parameter(torch.ones(2))], {"lr": 0.1})
    train(optimizer, optimizer.param_groups[0]["params"], 2)
    assert list(next(iter(optimizer.state.values()))) == ["first", "second"]


def test_a_class_without_a_rule_makes_no_optimizer():
    with pytest.raises(TypeError, match="the class must have a rule, got none"):
        type("Empty", (optim.RuleOptimizer,), {})([torch.zeros(1)], {"lr": 0.1})
