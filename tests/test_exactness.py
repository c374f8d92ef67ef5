"""How exactness is measured: what counts as an error, and how much of it."""

from math import inf, nan, sqrt

import pytest
import torch

from tests import exactness
from tests.exactness import compare
from tests.tables import ROWS, Row, normal

HALF = torch.tensor([[1.0, 1.5], [0.5, 0.0]], dtype=torch.float16)  # two draws
ULP = 2.0**-10  # of numbers from 1 to 2; of those from 1/2 to 1 it is half as much


def test_errors_are_root_mean_squares_of_the_largest():
    exact = HALF.double() + torch.tensor([[0.0, 3 * ULP], [ULP, -4 * ULP]], dtype=torch.float64)
    found = compare("output", HALF, HALF + ULP, exact)
    assert found.ours == ULP * sqrt((9 + 16) / 2)
    assert found.theirs == ULP * sqrt((4 + 25) / 2)
    assert found.half_ulp == ULP / 2 * sqrt((1 + 0.25) / 2)
    assert found.ratio == found.ours / found.theirs


def test_less_than_half_an_ulp_is_no_merit():
    found = compare("output", HALF, HALF, HALF.double() + ULP / 8)
    assert found.ratio == found.ours / found.half_ulp < 1
    zeros = torch.zeros(2, 3, dtype=torch.float16)
    assert compare("output", zeros, zeros, zeros.double()).half_ulp == 2.0**-25  # of the subnormal numbers


@pytest.mark.parametrize(
    ("ours", "theirs", "exact", "ratio"),
    [
        (inf, inf, 1e6, 0),  # both overflow
        (inf, inf, inf, 0),
        (nan, nan, 1, 0),
        (nan, nan, nan, 0),
        (nan, 1, 1, inf),
        (inf, 1, 1, inf),
        (1, nan, 1, 0),
        (inf, nan, 1, inf),
        (1, 1, nan, inf),
    ],
)
def test_what_is_not_finite(ours, theirs, exact, ratio):
    half = (torch.tensor([[1.0, value]], dtype=torch.float16) for value in (ours, theirs))
    assert compare("output", *half, torch.tensor([[1.0, exact]], dtype=torch.float64)).ratio == ratio


def test_every_result_is_measured():
    row = next(row for row in ROWS if row.name == "linear")
    for dtype in exactness.DTYPES:
        assert [found.result for found in exactness.measure(row, dtype)] == ["output", "input", "weight", "bias"]


@pytest.mark.parametrize("dtype", exactness.DTYPES, ids=str)
def test_what_is_less_exact_is_seen(dtype):
    row = Row("tanh", "coarse", input=normal(8, 9))
    row.ours = lambda input: torch.tanh(input) * (1 + 4 * torch.finfo(dtype).eps)
    assert all(found.ratio > exactness.WORST for found in exactness.measure(row, dtype))


def test_dropout_drops_the_same_elements():
    for found in exactness.measure(Row("dropout", "half", input=normal(8, 9), p=0.5), torch.float32):
        assert found.ours < 1e-6
