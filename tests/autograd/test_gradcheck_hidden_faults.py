"""Backwards that are right at a first look: each is found, and the right one beside it passes."""

import pytest
import torch
from torch import nn

from tests.autograd.test_gradcheck import draw, function
from torch_bp.autograd import gradcheck

SQUARE = lambda x: x * x  # noqa: E731
LINEAR = nn.functional.linear


def failure(f, inputs, **options):
    return gradcheck(f, inputs, raise_exception=False, **options).failure


def last_row(dy, x):
    gradient = 2 * x * dy
    gradient[-1] *= 1.001
    return gradient


def at_an_offset(dy, x):
    return 2 * x * torch.as_strided(dy, dy.shape, dy.stride(), 0)


def without_strides(dy, x):
    return 2 * x * torch.as_strided(dy, dy.shape, torch.empty(dy.shape).stride(), dy.storage_offset())


def zeroing(dy, x):
    gradient = 2 * x * dy
    dy.data.zero_()
    return gradient


def writing(dy, x):
    gradient = 2 * x * dy
    x.data.add_(1e-3)
    return gradient


FAULTS = {
    "one row": (last_row, "should be"),
    "where values are large": (lambda dy, x: torch.where(x.abs() > 1.2, x, 2 * x) * dy, "should be"),
    "strides": (without_strides, "non-contiguous"),
    "offset": (at_an_offset, "non-contiguous"),
    "non-contiguous": (lambda dy, x: 2 * x * dy * (1 if dy.is_contiguous() else 0.5), "non-contiguous"),
    "expanded": (lambda dy, x: 2 * x * dy * (0.5 if 0 in dy.stride() else 1), "expanded"),
    "clipped at 3": (lambda dy, x: 2 * x * dy.clamp(-3, 3), "1024 times as large"),
    "number of examples": (lambda dy, x: 2 * x * dy * len(x) / 16, "for 8 of 16 examples"),
    "dy altered": (zeroing, "altered the gradient it was given"),
    "input altered": (writing, "input 0 was altered in place by its backward"),
    "a constant added": (lambda dy, x: 2 * x * dy + 1e-3, "should be"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_of_a_square(fault):
    backward, words = FAULTS[fault]
    assert gradcheck(function(SQUARE, lambda dy, x: 2 * x * dy), draw(16, 3))
    assert words in failure(function(SQUARE, backward), draw(16, 3))


def test_of_a_parameter_for_this_number_of_examples_only():
    tensors = draw(16, 3), draw(2, 3)
    assert gradcheck(function(LINEAR, lambda dy, x, w: (dy @ w, dy.t() @ x)), tensors)
    wrong = function(LINEAR, lambda dy, x, w: (dy @ w, dy.t() @ x * len(x) / 16))
    assert "the gradient of input 1 for 8 of 16 examples changes" in failure(wrong, tensors)


@pytest.mark.parametrize(("f", "by"), [(torch.mean, 48), (torch.sum, 1)])
def test_of_a_loss_for_this_number_of_examples_only(f, by):
    loss = lambda x: f(x * x)  # noqa: E731
    x = draw(16, 3)
    assert gradcheck(function(loss, lambda dy, x: 2 * x * dy / (x.numel() if by > 1 else 1)), x)
    scaled = function(loss, lambda dy, x: 2 * x * dy / by * len(x) / 16 * (16 / len(x) if by > 1 else 1))
    assert failure(scaled, x).startswith("for 8 of 16 examples, the gradient of input 0")


def test_where_an_index_occurs_twice():
    def spread(accumulate):
        def backward(dy, index, table):
            return None, torch.zeros_like(table).index_put_((index,), dy, accumulate=accumulate)

        return function(lambda index, table: table[index], backward)

    inputs = torch.tensor([0, 1, 1, 2]), draw(4, 3)
    assert gradcheck(spread(True), inputs)
    assert "input 1" in failure(spread(False), inputs)


def test_of_what_is_broadcast():
    tensors = draw(3, 3), draw(3)
    for wrong in (lambda dy: dy.mean(0), lambda dy: dy.sum(1), lambda dy: dy[0]):
        found = function(torch.add, lambda dy, x, b, wrong=wrong: (dy, wrong(dy)))
        assert "input 1" in failure(found, tensors)


class Keeping(torch.autograd.Function):
    """Keeps its input on the class: what came last, or first."""

    kept: torch.Tensor
    first = True

    @classmethod
    def forward(cls, ctx, x):
        if not (cls.first and hasattr(cls, "kept")):
            cls.kept = x.detach().clone()
        return x * x

    @classmethod
    def backward(cls, ctx, dy):
        return 2 * cls.kept * dy


def test_what_is_kept_of_another_call():
    Keeping.kept = torch.ones(6, 3, dtype=torch.float64)
    assert failure(Keeping.apply, draw(6, 3))
    Keeping.first = False
    assert failure(Keeping.apply, draw(6, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_precision_of_the_inputs(dtype):
    """Double precision, in which the rest is checked, does not see it."""
    inner = lambda dy, x: 2 * x * dy * (1 if x.dtype is torch.float64 else 0.5)  # noqa: E731
    x = draw(4, 3, dtype=dtype)
    assert gradcheck(function(SQUARE, lambda dy, x: 2 * x * dy), x)
    found = failure(function(SQUARE, inner), x)
    assert f"in {dtype} the gradient of input 0 is 0." in found
    assert "times that in double precision" in found
    raising = function(SQUARE, lambda dy, x: 2 * x * dy @ torch.eye(3, dtype=torch.float64))
    assert "in the precision of the inputs: backward" in failure(raising, x)


def test_none_from_above():
    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x)
            return x * x, x * 3

        @staticmethod
        def backward(ctx, da, db):
            return 2 * ctx.saved_tensors[0] * da + 3 * db  # a TypeError where one is None

    assert "backward raised with no gradient from above" in failure(Pair.apply, draw(3))
    assert gradcheck(Pair.apply, draw(3), check_undefined_grad=False)


@pytest.mark.parametrize("size", [1e-100, 1e-30, 1e-12, 1.0, 1e12, 1e30, 1e100])
def test_at_every_scale(size):
    x = (torch.randn(3, 3, dtype=torch.float64) * size).requires_grad_()
    scaled = lambda x: size * x.sin()  # noqa: E731
    for full in (False, True):
        assert gradcheck(SQUARE, x, full=full)
        assert gradcheck(scaled, draw(3, 3), full=full)
        assert failure(function(SQUARE, lambda dy, x: x * dy), x, full=full)
        assert failure(function(scaled, lambda dy, x: 0.5 * size * x.cos() * dy), draw(3, 3), full=full)
