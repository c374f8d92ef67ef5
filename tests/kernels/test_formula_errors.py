"""A formula that no kernel can compute says which construct is to blame."""

import math
import math as m
import re
from math import exp as math_exp

import numpy as np
import pytest
import torch

from torch_bp.kernels import FormulaError, exp, formula, one_hot, row_sum, sqrt, use, where

X = torch.ones(3)
CONSTRUCTS = {
    "a condition on a value": lambda x: x if x > 0 else -x,
    "torch.sin": lambda x: torch.sin(x),
    "attribute .sum": lambda x: x.sum(),
    "iteration": lambda x: sum(x),
    "indexing": lambda x: x[0],
    r"len\(\)": lambda x: x * len(x),
    r"math.sin\(\) has no kernel; allowed are operators and sqrt": lambda x: math.sin(x),
    r"math.sqrt\(\) has no kernel; torch_bp.kernels.sqrt is meant": lambda x: 2 * math.sqrt(x),
    r"math.fabs\(\) has no kernel; torch_bp.kernels.abs is meant": lambda x: m.fabs(x),
    r"math.exp\(\) has no kernel; torch_bp.kernels.exp is meant": lambda x: math_exp(x + 1),
    r" float\(\) has no kernel": lambda x: float(x),
    r" int\(\) has no kernel": lambda x: int(x),
    r"torch.sqrt has no kernel; torch_bp.kernels.sqrt is meant": lambda x: torch.sqrt(x),
    r"attribute .tanh has no kernel; torch_bp.kernels.tanh is meant": lambda x: x.tanh(),
    "a Tensor cannot be part|torch.mul": lambda x: x * X,
    "a str cannot be part": lambda x: where(x > 0, x, "a"),
    "ufunc": lambda x: np.sin(x),
    "result 0 must be a value per element": lambda x: 1.0,
    "two numbers": lambda x: x * where(x > 0, 1, 2),
    "`and` on a number": lambda x: where(x & x, x, 0),
    "floordiv|unsupported operand": lambda x: x // 2,
}


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_construct_is_named(construct):
    body = CONSTRUCTS[construct]
    broken = formula(lambda x: body(x))
    with pytest.raises(FormulaError, match=construct) as refused:
        broken(X)
    whole = broken.formula.function if "result 0" in construct else body  # a result has no line of its own
    assert str(refused.value).startswith(f"{__file__}:{whole.__code__.co_firstlineno}: ")


def test_the_place_of_an_error():
    """The innermost line of the formula's own file, and where the formula begins if a result is to blame."""

    def helper(x):
        return x.sum()

    def several(x):
        y = x + 1
        return helper(y)

    def nothing(x):
        return None

    for function in (several, nothing):
        first = helper.__code__.co_firstlineno + 1 if function is several else nothing.__code__.co_firstlineno
        with pytest.raises(FormulaError, match=re.escape(f"{__file__}:{first}: formula {function.__name__}: ")):
            formula(function)(X)
    namespace = {"math": math}
    exec("def made(x):\n    y = x * 2\n    return math.sqrt(y)", namespace)
    with pytest.raises(FormulaError, match=r"^<string>:3: formula made: float\(\) has no kernel"):  # no source to read
        formula(namespace["made"])(X)


def test_signature():
    with pytest.raises(TypeError, match="named one by one"):
        formula(lambda *x: x)
    with pytest.raises(TypeError, match="must have a positional argument"):
        formula(lambda *, x: x)
    with pytest.raises(TypeError, match=r"updates must name arguments of the function \(x\), got 'y'"):
        formula(updates=("y",))(lambda x: x)
    with pytest.raises(TypeError, match="static must name arguments"):
        formula(static=("y",))(lambda x: x)


@formula(updates=("x",), static=("double",))
def shrink(x, *, rate, double):
    return x - rate * x * (2 if double else 1)


def test_calls():
    with pytest.raises(TypeError, match="rate"):
        shrink(torch.ones(3), double=True)
    with pytest.raises(TypeError, match="double"):
        shrink(torch.ones(3), rate=0.1)
    with pytest.raises(TypeError, match="unknown"):
        shrink(torch.ones(3), rate=0.1, double=True, unknown=1)
    with pytest.raises(TypeError, match="positional argument"):
        shrink(torch.ones(3), torch.ones(3), rate=0.1, double=True)
    with pytest.raises(ValueError, match=r"same length, got a: 1, b: 2"):
        formula(updates=("a",))(lambda a, b: a + b).foreach_([X], [X, X])
    with pytest.raises(TypeError, match="needs @formula"):
        formula(lambda a: a * 2).foreach_([X])
    with pytest.raises(TypeError, match="one result for each of updates"):
        formula(updates=("a", "b"))(lambda a, b: a + b)(torch.ones(3), torch.ones(3))


@pytest.mark.parametrize("engine", ["numba", "torch"])
@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("0.1", "got the string '0.1'; write it without quotes"),
        ("fast", r"got 'fast', of type str; name it in @formula\(static=...\)"),
        ((0.1, 0.2), r"got \(0.1, 0.2\), of type tuple; give each of its numbers a keyword of its own"),
        (None, "got None, of type NoneType"),
    ],
)
def test_scalars_that_are_no_numbers(rate, message, engine):
    @formula
    def scaled(x, *, rate):
        return x * rate

    @formula(updates=("x",))
    def shrunk(x, *, rate):
        return x - rate * x

    for function in (scaled, shrunk, lambda x, **keywords: shrunk.foreach_([x], **keywords)):
        with use(engine), pytest.raises(TypeError, match=f"rate must be a number or a one-element tensor, {message}"):
            function(torch.ones(3), rate=rate)


@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_a_result_for_each_update(engine):
    few = formula(updates=("a", "b"))(lambda a, b: a + b)
    with use(engine), pytest.raises(TypeError, match=r"must return one result for each of updates=.*, got 1"):
        few(torch.ones(3), torch.ones(3))


def test_formulas_need_no_source():
    namespace = {"formula": formula, "exp": exp, "sqrt": sqrt}
    exec("@formula\ndef made(x, *, a):\n    return exp(a) * sqrt(abs(x))", namespace)
    torch.testing.assert_close(namespace["made"](X * 4, a=0.0), X * 2)
    factor = 3
    torch.testing.assert_close(formula(lambda x: x * factor)(X), X * 3)


def test_functions_take_numbers():
    from torch_bp import kernels as k

    assert (k.sqrt(4.0), k.exp(0), k.log(1), k.tanh(0), k.erf(0), k.sign(-2)) == (2.0, 1.0, 0.0, 0.0, 0.0, -1)
    assert (k.maximum(1, 2), k.minimum(1, 2), k.where(True, 1, 2), k.abs(-1)) == (2, 1, 1, 1)
    assert all(math.isnan(v) for v in (k.sqrt(-1.0), k.log(-1.0), k.maximum(math.nan, 1), k.minimum(1, math.nan)))
    assert (k.log(0.0), k.exp(1e4)) == (-math.inf, math.inf)


def test_signature_of_rows():
    for options, message in (
        ({"per_row": ("q",)}, "per_row must name arguments"),
        ({"per_row": (), "per_column": ("q",)}, "per_column must name arguments"),
        ({"per_row": ("r",), "labels": ("r",)}, "r must be in one of per_row, per_column and labels"),
        ({"per_row": ("x", "r")}, "an argument must be a matrix"),
        ({"per_row": (), "updates": ("x",)}, "go without updates"),
    ):
        with pytest.raises(TypeError, match=message):
            formula(**options)(lambda x, r: x * r)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x, r, t: row_sum(x > 0), "comparisons|a mask"),
        (lambda x, r, t: row_sum(r) * x, "row_sum of a row"),
        (lambda x, r, t: t * x, "arithmetic on class indices"),
        (lambda x, r, t: one_hot(r, x), "one_hot of a row"),
        (lambda x, r, t: None, "must return a value per element, got None"),
    ],
)
def test_rows_name_what_no_kernel_can_compute(body, message):
    broken = formula(per_row=("r",), labels=("t",))(lambda x, r, t: body(x, r, t))
    with use("numba"), pytest.raises(FormulaError, match=message):
        broken(torch.ones(2, 3), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))


def test_arguments_may_be_called_like_results():
    @formula
    def doubled(out0):
        return 2 * out0

    with use("numba"):
        assert torch.equal(doubled(X), 2 * X)


def test_a_vector_is_no_column():
    """torch would take it for one value per column."""

    @formula(per_row=("t",))
    def shifted(z, t):
        return z - t

    for engine in ("numba", "torch"):
        with use(engine), pytest.raises(ValueError, match=r"t must be \(R, 1\), one value per row, got \(3,\)"):
            shifted(torch.ones(3, 3), torch.ones(3))
