"""A rule that is not shipped: sign momentum, as README has it, by every engine, with a kill and a resume."""

import functools
import math
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

    @formula(updates=("param", "average"))
    def rule(param, grad, average, *, lr):
        return param - lr * grad, average + grad

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


@formula(updates=("param", "average"))
def debiased(param, grad, average, *, lr, beta, step):
    average = beta * average + (1 - beta) * grad
    return param - lr / (1 - beta**step) * average, average


def debiased_class(**body):
    """A class of this rule, whose constructor takes everything by name."""

    def build(self, params, **options):
        super(made, self).__init__(params, {"lr": 0.1, "beta": 0.5} | options)

    whole = {"rule": debiased, "state_names": ("average",), "__init__": build} | body
    made = type("Mine", (optim.RuleOptimizer,), whole)
    return made


def one_step(kind, engine, **options):
    params = parameters(torch.float64)
    with use(engine):
        optimizer = kind(params, **options)
        train(optimizer, params, 1)
    return params


def test_state_that_the_rule_does_not_return():
    @formula(updates=("param",))
    def forgetful(param, grad, average, *, lr):
        average = average + grad
        return param - lr * average

    message = (
        r"^Mine: updates of the rule must name all its state \(average\), got updates=\('param',\) without 'average'; "
        r"write @formula\(updates=\('param', 'average'\)\) over forgetful"
    )
    with pytest.raises(TypeError, match=message):
        debiased_class(rule=forgetful)


@pytest.mark.parametrize("engine", ["torch", "numba"])
def test_a_keyword_called_step_is_the_number_of_the_update(engine):
    params, by_torch = parameters(torch.float64), parameters(torch.float64)
    averages = [torch.zeros_like(p) for p in by_torch]
    with use(engine):
        optimizer = debiased_class(counts_steps=True)(params)
        for step in (1, 2, 3):
            train(optimizer, params, 1, seed=step)
            for p, mine, average in zip(by_torch, params, averages):
                average.mul_(0.5).add_(mine.grad, alpha=0.5)
                p.data -= 0.1 / (1 - 0.5**step) * average
    torch.testing.assert_close(params, by_torch)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"scalars": lambda self, group, step: {}},
            r"scalars must take \(self, group, step, fresh\), got \(self, group, step\); write `def scalars\(self, gr",
        ),
        ({"numbers": ("mu",), "counts_steps": True}, r"scalars must take \(self, group, step, fresh, mu\)"),
        ({"numbers": ("mu",)}, r"numbers are kept beside the step count, .* set counts_steps = True"),
        ({"numbers": "mu"}, "numbers must be a tuple of names, got 'mu'"),
    ],
)
def test_a_class_that_a_step_could_not_use(body, message):
    with pytest.raises(TypeError, match=f"^Mine: {message}"):
        debiased_class(**body)


def test_scalars_that_a_step_can_call():
    debiased_class(scalars=staticmethod(lambda group, step, fresh: {}))
    debiased_class(scalars=functools.partialmethod(lambda self, other, group, step, fresh: {}, 1))
    debiased_class(scalars=lambda self, *arguments, **numbers: {}, numbers=("mu",), counts_steps=True)


def returning(result):
    return {"scalars": lambda self, group, step, fresh: result}


AT_A_STEP = {
    "no count": ({}, {}, ValueError, "got no 'step'; set counts_steps = True in the class"),
    "no keyword": (
        {"counts_steps": True, "rule": formula(updates=("p", "m"))(lambda p, g, m, *, eps: (p - eps * g, m))},
        {},
        ValueError,
        "got no 'eps'; add them to `defaults` or override `scalars`",
    ),
    "nothing": (
        returning(None),
        {},
        TypeError,
        r"must return a dict of the rule's keywords \(lr, beta, step\), got None",
    ),
    "other keys": (
        returning({"lr": 0.1, "step": 1, "betas": 0.5}),
        {},
        TypeError,
        "got no 'beta' and 'betas', which it does not take",
    ),
    "a string": (
        returning({"lr": "0.1", "step": 1, "beta": 0.5}),
        {},
        TypeError,
        "lr must be a number, got the string '0.1'; write it without quotes",
    ),
    "a dict": (
        returning({"lr": {}, "step": 1, "beta": 0.5}),
        {},
        TypeError,
        r"lr must be a number, got \{\}, of type dict",
    ),
    "division": (
        {"scalars": lambda self, group, step, fresh: {"lr": group["lr"] / (1 - 0.5**step)}},
        {},
        ValueError,
        r"scalars has failed \(ZeroDivisionError: .*, and `step` is 0 in it, .* set counts_steps = True",
    ),
    "logarithm": (
        {"scalars": lambda self, group, step, fresh: {"lr": math.log(step)}},
        {},
        ValueError,
        r"scalars has failed \(ValueError: .* set counts_steps = True",
    ),
}


@pytest.mark.parametrize("engine", ["torch", "numba"])
@pytest.mark.parametrize("case", AT_A_STEP)
def test_numbers_that_a_step_cannot_use(case, engine):
    body, options, error, message = AT_A_STEP[case]
    with pytest.raises(error, match=f"^Mine: .*{message}"):
        one_step(debiased_class(**body), engine, **options)


def test_other_errors_of_scalars_are_left_as_they_are():
    def scalars(self, group, step, fresh):
        raise ValueError("lr is too large")

    with pytest.raises(ValueError, match=r"^lr is too large$"):
        one_step(debiased_class(scalars=scalars), "numba")
    with pytest.raises(ZeroDivisionError):
        one_step(debiased_class(scalars=lambda self, group, step, fresh: {"lr": 1 / 0}, counts_steps=True), "numba")


@formula(updates=("param",))
def pair(param, grad, *, lr, betas):
    first, second = betas
    return param - lr * first * second * grad


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        ({}, {"lr": "0.1"}, "lr must be a number, got the string '0.1'; write it without quotes"),
        ({}, {"lr": "fast"}, "lr must be a number, got 'fast', of type str"),
        (
            {"scalars": lambda self, group, step, fresh: {}},
            {"lr": "1e-3"},
            "lr must be a number, got the string '1e-3'",
        ),
        (returning({}), {"betas": ("0.9", 0.99)}, r"betas must be a number, got \('0.9', 0.99\)"),
        (
            {"rule": pair, "state_names": ()},
            {"betas": (0.9, 0.99)},
            r"betas must be a number, got the tuple \(0.9, 0.99\); unpack it in a `scalars` of the class's own, "
            r"`beta1, beta2 = group\['betas'\]`",
        ),
    ],
)
def test_hyperparameters_that_are_no_numbers(body, options, message):
    kind = debiased_class(counts_steps=True, **body)
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=f"^Mine: {message}"):
        kind([parameter], **options)
    with pytest.raises(TypeError, match=f"^Mine: {message}"):
        kind([{"params": [parameter], **options}])


def test_hyperparameters_that_are_strings_on_purpose():
    kind = debiased_class(**returning({"lr": 0.1, "beta": 0.5, "step": 1}))
    one_step(kind, "numba", direction="down")
    kind([("0", torch.nn.Parameter(torch.ones(2)))])  # a name of a parameter that reads as a number
    with pytest.raises(ValueError, match="`step` is the number of the update, got a hyperparameter of this name"):
        debiased_class(counts_steps=True)([torch.nn.Parameter(torch.ones(2))], step=1)


def test_a_number_that_becomes_a_string_later_is_named_and_changes_nothing():
    params = parameters()
    optimizer = debiased_class(counts_steps=True)(params)
    train(optimizer, params, 1)
    before = [p.clone() for p in params]
    optimizer.param_groups[0]["lr"] = "0.1"
    with pytest.raises(TypeError, match=r"^Mine: lr must be a number"):
        train(optimizer, params, 1)
    assert all(map(torch.equal, before, params))
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_a_constructor_that_forgets_its_super():
    class Forgetful(SignMomentum):
        def __init__(self, params):
            self.params = params

    message = r"^Forgetful: __init__ must call super\(\).__init__\(params, defaults\), got an optimizer without"
    optimizer = Forgetful([torch.ones(1)])
    for use_it in (optimizer.step, optimizer.zero_grad, lambda: optimizer.param_groups, lambda: optimizer.state):
        with pytest.raises(AttributeError, match=message):
            use_it()
    assert not hasattr(SignMomentum, "param_groups")


if __name__ == "__main__":  # in a process of its own, where Triton interprets
    for dtype in (torch.float64, torch.float32):
        torch.testing.assert_close(check_resume("triton", sys.argv[1], dtype)[1], by_hand(dtype))
