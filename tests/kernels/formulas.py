"""Formulas that between them use everything a formula may use, with the tensors to try them on."""

import torch

from torch_bp.kernels import (
    column_sum,
    erf,
    exp,
    formula,
    log,
    maximum,
    minimum,
    one_hot,
    row_max,
    row_sum,
    sign,
    sqrt,
    tanh,
    total,
    where,
    zeros_like,
)


@formula
def product_rule(dy, y):
    return dy * y * (1 - y)


@formula
def choices(x, y):
    return where((x > y) & ~(x < 0) | (y == 0), maximum(x, y), minimum(x, 0.5)), maximum(0, y) - minimum(y, x)


@formula
def functions(x, y):
    return tanh(x) + erf(y) * sign(x) - exp(-abs(y)), log(abs(x)) / y, sqrt(y), -x


@formula
def powers(x, y):
    return x**2 + abs(y) ** 1.5, (x > 0) * y + (x != y) * x, 2 / (x * x + 1)


@formula(static=("signed",))
def scaled(x, *, factor, offset=1.0, signed=False):
    shifted = x * (1 - factor) + sqrt(offset)
    return -shifted if signed else shifted


@formula(updates=("param", "average", "largest"), static=("negative",))
def averaged(param, grad, average, largest=None, *, rate, beta, negative=False):
    grad = -grad if negative else grad
    average = beta * average + (1 - beta) * grad * grad
    if largest is not None:
        largest = maximum(largest, average)
        return param - rate * grad / (sqrt(largest) + 1e-8), average, largest
    return param - rate * grad / (sqrt(average) + 1e-8), average, None


@formula(updates=("param", "grad"), static=("clear",))
def measured(param, grad, *, rate, clear=False):
    step = rate * grad
    return param - step, zeros_like(grad) if clear else grad, total(grad * grad), total(abs(step))


@formula
def size(x, y=None):
    return total(x if y is None else x * y)


@formula(per_row=("r",), per_column=("c",), labels=("label",), static=("signed",))
def rows(x, y, r, label, c=None, *, factor, signed=False):
    top = row_max(x)
    whole = row_sum(exp(x - top) * (y > 0))
    centred = y - row_sum(where(x == top, whole, abs(y))) * r
    if c is not None:
        centred = c * centred + row_sum(where(c > 0, c, y))
    counted = where((label != 1) & (r > 0), r, -r)
    result = counted * centred + one_hot(label, x) * factor
    summed = column_sum(result * y)
    return result, top, -whole if signed else whole * factor, summed, column_sum(where(r > 0, y, 0))


PURE = [product_rule, choices, functions, powers]
SIZES = [(), (1,), (7, 3), (5000,), (0, 3), (40, 1000)]


def hostile(shape, dtype, seed=0):
    """Two tensors of normal numbers, with NaN, Inf, zeros of both signs, huge and tiny values at places of both."""
    generator = torch.Generator().manual_seed(seed)
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e20, 1e-39, -1e30, 3.0]
    tensors = []
    for _ in range(2):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        flat = x.view(-1)
        for place in range(min(flat.numel(), 200)):
            if torch.rand((), generator=generator) < 0.4:
                flat[place] = special[int(torch.randint(len(special), (), generator=generator))]
        tensors.append(x.to(dtype))
    return tensors


MATRICES = [(1, 1), (5, 3), (40, 1000), (3, 33000)]


def matrices(shape, dtype, seed=0):
    """Arguments of `rows`; NaN and Inf in some of the rows."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    for number, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        if shape[0] > 4:
            x[number + 1, (7 * number) % shape[1]] = value
    r = torch.randn(shape[0], 1, generator=generator, dtype=torch.float64)
    label = torch.randint(-1, shape[1], (shape[0], 1), generator=generator)
    c = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return [*(t.to(dtype) for t in (x, y, r)), label, c.to(dtype)]


def lists(dtype, seed=0, with_largest=True):
    """Four lists of tensors for `averaged`."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.rand(s, generator=generator, dtype=torch.float64).to(dtype) for s in SIZES] for _ in range(4)]
    return rows if with_largest else [*rows[:3], None]
