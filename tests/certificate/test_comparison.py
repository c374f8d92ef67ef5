"""How far two sides are from each other."""

import math
from functools import partial

import pytest
import torch

from torch_bp.certificate.comparison import deviations, mismatch, tolerance


def test_deviations():
    tensor = partial(torch.tensor, dtype=torch.float64)
    expected = {"a: large": tensor([100.0, 0.0]), "a: small": tensor([1e-9]), "b: none": None, "c": tensor([])}
    got = {**expected, "a: large": tensor([100.0, 1.0]), "a: small": tensor([2e-9])}
    found = deviations(got, expected)
    assert found == pytest.approx({"a: large": 0.01, "a: small": 1e-9, "c": 0.0})
    nan, inf = math.nan, math.inf
    assert deviations({"a": tensor([nan, inf, 1.0])}, {"a": tensor([nan, inf, 1.0])}) == {"a": 0.0}
    assert deviations({"a": tensor([nan, -inf, 1.0])}, {"a": tensor([nan, inf, 1.0])}) == {"a": inf}
    assert deviations({"a": tensor([inf])}, {"a": tensor([nan])}) == {"a": inf}
    assert deviations({"a": tensor([1.0])}, {"a": tensor([nan])}) == {"a": inf}
    assert deviations({"a": tensor([1e-300])}, {"a": tensor([0.0])}) == {"a": inf}


def test_mismatches():
    one = torch.ones(2)
    assert mismatch({"a": one, "b": None}, {"a": one + 1, "b": None}) is None
    assert mismatch({}, {"a": one}) == ("a", "only torch has it")
    assert mismatch({"a": one}, {}) == ("a", "only torch_bp has it")
    assert mismatch({"a": one}, {"a": None}) == ("a", "None in torch only")
    assert mismatch({"a": one[None]}, {"a": one}) == ("a", "shape (1, 2) should be (2,)")
    assert mismatch({"a": one.double()}, {"a": one}) == ("a", "dtype torch.float64 should be torch.float32")
    assert mismatch({"a": one.to_sparse()}, {"a": one}) == ("a", "layout torch.sparse_coo should be torch.strided")
    assert mismatch({"a": one.long()}, {"a": 2 * one.long()}) == ("a", "2 of 2 entries differ")


def test_tolerances_are_many_roundings_and_few_digits():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert 2 * torch.finfo(dtype).eps < tolerance(dtype) < torch.finfo(dtype).eps ** 0.5
    assert tolerance(None) == 0
