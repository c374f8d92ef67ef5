"""Copies of parameters in half precision, written by the update."""

import copy

import pytest
import torch

from tests.optim.table import PAIRS, parameters, train
from torch_bp import optim
from torch_bp.kernels import formula, use
from torch_bp.optim.copies import Copies

HALVES = [torch.bfloat16, torch.float16]


def rounded(params, dtype):
    return [p.detach().to(dtype) for p in params]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", PAIRS)
def test_copies_are_what_a_cast_gives(name, dtype):
    kind, _ = PAIRS[name]
    params = [torch.nn.Parameter(p.detach()) for p in parameters(torch.float32, shapes=[(40, 50), (5,), (), (0, 3)])]
    plain = copy.deepcopy(params)
    copies, optimizer, reference = Copies(dtype), kind(params), kind(plain)
    halves = [copies.of(p) for p in params[:-1]]  # not of all
    copies.attach(optimizer)
    for _ in range(4):  # the later ones as the one before (`torch_bp.optim.again`)
        train(optimizer, params, 1)
        train(reference, plain, 1)
        assert copies.stale() == []
        torch.testing.assert_close(halves, rounded(params[:-1], dtype), rtol=0, atol=0)
    torch.testing.assert_close(params, plain, rtol=1e-6, atol=1e-7)  # products and sums are contracted differently


@pytest.mark.parametrize("dtype", HALVES)
def test_large_parameters_on_several_threads(dtype):
    params = [torch.nn.Parameter(torch.randn(300, 301)), torch.nn.Parameter(torch.randn(70000))]
    copies, optimizer = Copies(dtype), optim.Adam(params, lr=0.1)
    halves = [copies.of(p) for p in params]
    copies.attach(optimizer)
    for _ in range(3):
        train(optimizer, params, 1)
        torch.testing.assert_close(halves, rounded(params, dtype), rtol=0, atol=0)


def test_what_is_not_finite_and_halfway_cases():
    values = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 1 + 2.0**-8, 1 + 3 * 2.0**-8, 65520.0, 1e-40, -0.0]
    )
    for dtype in HALVES:
        weight = torch.nn.Parameter(values.clone())
        copies, optimizer = Copies(dtype), optim.SGD([weight], lr=1.0)
        half = copies.of(weight)
        copies.attach(optimizer)
        weight.grad = torch.zeros_like(weight)
        half.zero_()
        optimizer.step()
        torch.testing.assert_close(half, weight.detach().to(dtype), rtol=0, atol=0, equal_nan=True)


def test_writes_of_others_are_seen():
    weight, other = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))
    copies, optimizer = Copies(torch.bfloat16), optim.SGD([weight, other], lr=0.5)
    halves = [copies.of(weight), copies.of(other)]
    copies.attach(optimizer)
    with torch.no_grad():
        weight.mul_(3)
    assert copies.stale() == [weight]
    copies.refresh()
    assert copies.stale() == []
    torch.testing.assert_close(halves[0], weight.detach().bfloat16())
    weight.grad, other.grad = torch.ones_like(weight), torch.ones_like(other)
    with use("torch"):  # one by one
        optimizer.step()
    assert copies.stale() == [weight, other]
    copies.refresh()
    torch.testing.assert_close(halves, rounded([weight, other], torch.bfloat16))


def test_what_has_no_copy():
    copies = Copies(torch.bfloat16)
    assert copies.find(torch.nn.Parameter(torch.ones(2, dtype=torch.float64)), torch.bfloat16) is None
    assert copies.find(torch.ones(2), torch.bfloat16) is None
    assert copies.find(torch.nn.Parameter(torch.ones(2)), torch.float16) is None
    assert copies.find(torch.nn.Parameter(torch.ones(4)[::2]), torch.bfloat16) is None
    torch_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    copies.attach(torch_optimizer)
    assert "_copies" not in vars(torch_optimizer)


@formula(updates=("momentum_buffer", "param"))
def backwards(param, grad, momentum_buffer, *, lr):
    momentum_buffer = 0.9 * momentum_buffer + grad
    return momentum_buffer, param - lr * momentum_buffer


class Backwards(optim.RuleOptimizer):
    """Names its state before the parameter."""

    rule, state_names = backwards, ("momentum_buffer",)

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})


def test_the_copy_is_of_the_parameter_wherever_it_is_named():
    weight = torch.nn.Parameter(torch.randn(5, 3))
    copies, optimizer = Copies(torch.bfloat16), Backwards([weight])
    half = copies.of(weight)
    copies.attach(optimizer)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        torch.testing.assert_close(half, weight.detach().bfloat16(), rtol=0, atol=0)


def test_a_copy_that_is_wanted_later():
    params = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    copies, optimizer = Copies(torch.bfloat16), optim.SGD(params, lr=0.1)
    halves = [copies.of(params[0])]
    copies.attach(optimizer)
    for number in range(6):
        if number == 3:  # the step repeats itself by then
            halves.append(copies.of(params[1]))
        train(optimizer, params, 1)
        assert copies.stale() == []
        torch.testing.assert_close(halves, rounded(params[: len(halves)], torch.bfloat16), rtol=0, atol=0)
    copies.clear()
    train(optimizer, params, 1)
    assert copies.stale() == []
