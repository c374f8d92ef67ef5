"""Totals over lists of the same sizes: the numbers are torch's, of whatever tensors come; None where none can be."""

import math

import numpy as np
import pytest
import torch

from torch_bp.diagnostics.quantities import moments_of
from torch_bp.kernels import use
from torch_bp.kernels.norm import sum_of_squares
from torch_bp.kernels.totals import Totals

SIZES = ((3, 5), (1,), (70000,), (128, 784))


def tensors(dtype=torch.float32):
    return [torch.randn(size, dtype=dtype) for size in SIZES]


def expected(given):
    return torch.stack([torch.stack([t.double().sum(), t.double().square().sum()]) for t in given]).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_lists_that_come_and_go(dtype):
    totals = Totals(moments_of)
    for _ in range(3):
        given = tensors(dtype)
        np.testing.assert_allclose(totals(given), expected(given), rtol=1e-5)


def test_memory_behind_the_same_tensors_may_be_another():
    totals, given = Totals(moments_of), tuple(tensors())
    totals(given)
    given[0].set_(torch.full((15,), 2.0), 0, (3, 5))  # as a captured step does with its batch
    np.testing.assert_allclose(totals(given), expected(given), rtol=1e-5)
    given[1].fill_(math.inf)
    assert totals(given)[1].tolist() == [math.inf, math.inf]


def test_other_sizes_and_layouts_are_looked_at_anew():
    totals = Totals(moments_of)
    totals(tensors())
    for given in ([torch.randn(4)], [torch.randn(4, 6).t(), torch.randn(2)], [torch.randn(9) for _ in range(40)]):
        np.testing.assert_allclose(totals(given), expected(given), rtol=1e-5)


def test_what_no_kernel_serves_has_none():
    totals = Totals(sum_of_squares)
    assert totals([torch.empty(0), torch.ones(2)]) is None
    assert totals([torch.ones(4, 4)[:, ::2]]) is None
    assert totals([torch.ones(2), torch.ones(2, dtype=torch.float64)]) is None
    assert totals([torch.ones(2, requires_grad=True)]) is None
    with use("torch"):
        assert totals([torch.ones(2)]) is None
    assert totals([torch.ones(2)]).tolist() == [[2.0]]


def test_squares_have_room_for_every_number():
    """Squares of float32 that are no float32: a gradient that vanishes has a norm, and a large one too."""
    given = [torch.full((100,), 1e-30), torch.full((3,), 1e30), torch.full((5,), torch.finfo(torch.float32).max)]
    found = sum_of_squares.foreach_(given)
    torch.testing.assert_close(found, torch.stack([t.double().square().sum() for t in given]), rtol=1e-12, atol=0)
    np.testing.assert_allclose(Totals(sum_of_squares)(given)[:, 0], found.numpy(), rtol=1e-12)
