"""Every engine computes what torch computes with the same function, NaN and Inf included."""

import pytest
import torch

from tests.kernels.formulas import (
    MATRICES,
    PURE,
    SIZES,
    averaged,
    choices,
    hostile,
    lists,
    matrices,
    measured,
    powers,
    product_rule,
    rows,
    scaled,
    size,
)
from torch_bp.kernels import (
    FormulaError,
    Table,
    column_sum,
    cpu_text,
    exp,
    formula,
    half,
    native,
    row_max,
    row_sum,
    total,
    use,
)

DTYPES = [torch.float32, torch.float64]
HALF = [torch.bfloat16, torch.float16]
# A few units in the last place of terms of size 1, which may cancel in a sum.
TOLERANCE = {torch.float32: {"rtol": 3e-6, "atol": 4e-7}, torch.float64: {"rtol": 1e-14, "atol": 1e-15}}


def same(actual, expected, dtype):
    torch.testing.assert_close(actual, expected, equal_nan=True, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tried", PURE, ids=lambda f: f.__name__)
def test_numba_agrees_with_torch(tried, dtype):
    for shape in SIZES:
        x, y = hostile(shape, dtype)
        with use("torch"):
            expected = tried(x, y)
        with use("numba"):
            assert (tried.formula.by_kernel((x, y), {}) is not NotImplemented) == (x.numel() > 0)
            same(tried(x, y), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_rows_agree_with_torch(shape, dtype):
    everything = matrices(shape, dtype)
    for signed, arguments in ((False, everything), (True, [*everything[:4], None])):
        with use("torch"):
            wide = (t.double() if t is not None and t.is_floating_point() else t for t in arguments)
            exact = rows(*wide, factor=0.5, signed=signed)
        with use("numba"):
            assert rows.formula.by_kernel(arguments, {"factor": 0.5, "signed": signed}) is not NotImplemented
            actual = rows(*arguments, factor=0.5, signed=signed)
        for result, expected in zip(actual, exact):
            assert result.dtype == dtype
            # sums of rows: units in the last place of a sum as long as the row
            sizes = expected.where(expected.isfinite(), 0).abs().max()
            close = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps * float(sizes) * shape[1] ** 0.5}
            torch.testing.assert_close(result.double(), expected, equal_nan=True, **close)


@formula(per_row=())
def stored_before_it_is_needed(x, y):
    """A value that two loops need, and results that are written in the first of these."""
    e = exp(x)
    return 2 * y, row_sum(e / row_sum(e))


@formula(per_row=())
def stored_beside_what_is_kept(x, y):
    e = exp(x)
    whole = row_sum(e)
    return y, row_sum(e * (y - whole)), 2 * x, row_sum(e / whole), e * whole


@formula(per_row=())
def kept_where_it_is_written_last(x):
    e = exp(x - row_max(x))
    return e / row_sum(e)


@pytest.mark.parametrize(
    "function", [stored_before_it_is_needed, stored_beside_what_is_kept, kept_where_it_is_written_last]
)
@pytest.mark.parametrize("shape", MATRICES)
def test_values_that_several_loops_need(function, shape):
    given = [torch.randn(shape, dtype=torch.float64) for _ in function.formula.tensors]
    actual = function.formula.by_kernel(given, {})
    torch.testing.assert_close(actual, function.formula.function(*given), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    "function", [lambda x, w: (x, w * 2), lambda x, w: column_sum(w * 2), lambda x, w: row_sum(w) * x]
)
def test_values_of_columns_alone_are_no_results(function):
    tried = formula(per_row=(), per_column=("w",))(function)
    with use("numba"), pytest.raises(FormulaError, match=r"got column|of a column"):
        tried(torch.randn(3, 4), torch.randn(4))


def test_rows_run_on_several_threads_as_on_one():
    arguments, threads = matrices((40, 1000), torch.float32), torch.get_num_threads()
    with use("numba"):
        alone = rows(*arguments, factor=0.5)
        torch.set_num_threads(2)
        together = rows(*arguments, factor=0.5)
        torch.set_num_threads(threads)
    torch.testing.assert_close(alone, together, equal_nan=True)  # LLVM may add the elements in another order


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y, r, label, c: (x.t().contiguous().t(), y, r, label, c),
        lambda x, y, r, label, c: (x, y.double(), r, label, c),
        lambda x, y, r, label, c: (x, y, torch.stack((r, r), 1)[:, 0], label, c),
        lambda x, y, r, label, c: (x, y, r[:1], label, c),
        lambda x, y, r, label, c: (x, y, r, label.int(), c),
        lambda x, y, r, label, c: (x.requires_grad_(), y, r, label, c),
        lambda x, y, r, label, c: (x[:0], y[:0], r[:0], label[:0], c),
        lambda x, y, r, label, c: (x[None], y[None], r, label, c),
        lambda x, y, r, label, c: (x._neg_view(), y, r, label, c),
        lambda x, y, r, label, c: (x, y, r, label, c[None]),
    ],
)
def test_what_rows_leave_to_torch(change):
    arguments = change(*matrices((5, 3), torch.float32))
    with use("numba"):
        assert rows.formula.by_kernel(arguments, {"factor": 0.5}) is NotImplemented
        rows(*arguments, factor=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [False, True])
def test_scalars_are_computed_in_float64(dtype, signed):
    x = torch.randn(100, dtype=dtype)
    expected = x.double() * (1 - 0.999) + 2.0**0.5
    expected = (-expected if signed else expected).to(dtype)
    for factor in (0.999, torch.tensor(0.999, dtype=torch.float64)):
        with use("numba"):
            torch.testing.assert_close(scaled(x, factor=factor, offset=2.0, signed=signed), expected)


def test_one_minus_beta_is_not_rounded_first():
    """1 - 0.999 in float32 is 1.3e-5 off; the average must not show it."""
    grad = torch.ones(8)
    param, average = torch.zeros(8), torch.zeros(8)
    with use("numba"):
        averaged(param, grad, average, rate=0.0, beta=0.999)
    assert abs(average[0].item() / (1 - 0.999) - 1) < 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_largest", [True, False])
@pytest.mark.parametrize("negative", [True, False])
def test_list_kernel_agrees_with_torch(dtype, with_largest, negative):
    rows, expected = lists(dtype, with_largest=with_largest), lists(dtype, with_largest=with_largest)
    with use("torch"):
        averaged.foreach_(*expected, rate=0.1, beta=0.9, negative=negative)
    with use("numba"):
        averaged.foreach_(*rows, rate=0.1, beta=0.9, negative=negative)
    for row, wanted in zip(rows, expected):
        assert (row is None) == (wanted is None)
        if row is not None:
            same(row, wanted, dtype)


def test_results_come_back_as_they_are_returned():
    pair, row_pair = formula(lambda x: (x + 1, None)), formula(per_row=())(lambda x: (None, x + row_sum(x)))
    x = torch.ones(2, 2)
    for engine in ("torch", "numba"):
        with use(engine):
            first, nothing = pair(x)
            missing, second = row_pair(x)
        assert nothing is None
        assert missing is None
        assert torch.equal(first, x + 1)
        assert torch.equal(second, x + 2)


def test_updates_write_in_place_and_say_so():
    param, grad, average = torch.ones(4), torch.ones(4), torch.zeros(4)
    address = param.data_ptr()
    for engine in ("torch", "numba"):
        versions = [t._version for t in (param, grad, average)]
        with use(engine):
            assert averaged(param, grad, average, rate=0.1, beta=0.9) is None
        grown = [t._version - v for t, v in zip((param, grad, average), versions)]
        assert grown[0] > 0
        assert grown[1] == 0
        assert grown[2] > 0
    assert param.data_ptr() == address
    torch.testing.assert_close(grad, torch.ones(4))


def test_backward_notices_that_a_kernel_wrote_a_saved_tensor():
    weight = torch.ones(3, requires_grad=True)
    y = (weight * weight).sum()
    with torch.no_grad(), use("numba"):
        averaged(weight, torch.ones(3), torch.zeros(3), rate=0.1, beta=0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_strides_are_kept():
    x, y = torch.randn(6, 5).t(), torch.rand(6, 5).t()
    with use("numba"):
        assert PURE[0].formula.by_kernel((x, y), {}) is not NotImplemented
        result = PURE[0](x, y)
    assert result.stride() == x.stride()
    torch.testing.assert_close(result, x * y * (1 - y))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tried", [product_rule, choices, powers], ids=lambda f: f.__name__)
def test_half_precision_is_rounded_once(tried, dtype):
    """Every value there is, NaN, infinities and subnormal numbers among them, to the last bit."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    y = x[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    with use("torch"):
        expected = tried(x.float(), y.float())
    with use("numba"):
        assert tried.formula.by_kernel((x, y), {}) is not NotImplemented
        actual = tried(x, y)
    for result, wanted in zip(*(r if isinstance(r, tuple) else (r,) for r in (actual, expected))):
        torch.testing.assert_close(result, wanted.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", MATRICES)
def test_rows_in_half_precision(shape, dtype):
    arguments = matrices(shape, dtype)
    with use("torch"):
        wide = (t.double() if t.is_floating_point() else t for t in arguments)
        exact = rows(*wide, factor=0.5)
    with use("numba"):
        assert rows.formula.by_kernel(arguments, {"factor": 0.5}) is not NotImplemented
        actual = rows(*arguments, factor=0.5)
    for result, expected in zip(actual, exact):
        expected = expected.to(dtype)
        sizes = expected.where(expected.isfinite(), 0).abs().max()
        close = {"rtol": 0, "atol": torch.finfo(dtype).eps * float(sizes)}
        torch.testing.assert_close(result, expected, equal_nan=True, **close)


def test_a_processor_that_cannot_convert_float16_leaves_it_to_torch(monkeypatch):
    monkeypatch.setattr(half, "usable", lambda dtype: dtype is not torch.float16)
    x = torch.rand(4).half()
    with use("numba"):
        assert formula(lambda x: 2 * x).formula.by_kernel((x,), {}) is NotImplemented
        assert formula(lambda x: 2 * x).formula.by_kernel((x.bfloat16(),), {}) is not NotImplemented


@pytest.mark.parametrize("dtype", [*DTYPES, *HALF])
@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_totals_are_one_value_per_tensor(dtype, clear, compiled, monkeypatch):
    if not compiled:  # tensors are then asked one by one
        monkeypatch.setattr(native, "functions", lambda: None)
    shapes = [*SIZES, (3 * cpu_text.CHUNK + 5,)]
    start = [[torch.randn(s, generator=torch.Generator().manual_seed(k)).to(dtype) for s in shapes] for k in (0, 1)]
    found = {}
    for engine in ("torch", "numba"):
        params, grads = ([t.clone() for t in row] for row in start)
        with use(engine):
            served = measured.formula.launch(([params[0].clone()], [grads[0].clone()]), Table(), {"rate": 0.5})
            assert (served is None) == (engine == "torch")
            totals = measured.foreach_(params, grads, rate=0.5, clear=clear)
        assert all(t.shape == (len(shapes),) and t.dtype is torch.float64 for t in totals)
        assert all(torch.count_nonzero(g) == (0 if clear else g.numel()) for g in grads)
        found[engine] = [*params, *grads, *totals]
    loose = {"rtol": 2e-3, "atol": 2e-3} if dtype in HALF else TOLERANCE[dtype]
    torch.testing.assert_close(found["numba"], found["torch"], **loose)
    exact = torch.stack([(g.double() ** 2).sum() for g in start[1]])
    torch.testing.assert_close(found["numba"][-2], exact, rtol=1e-6 if dtype is not torch.float64 else 1e-14, atol=0)


def test_totals_of_one_tensor_and_of_none():
    x = torch.tensor([1.0, 2.0])
    for engine in ("torch", "numba"):
        with use(engine):
            assert size(x).item() == 3.0
            assert size(x, x).item() == 5.0
            assert size.foreach_([x, 2 * x]).tolist() == [3.0, 6.0]
            assert size.foreach_([x], [x]).tolist() == [5.0]
    x.requires_grad_()
    size(x, x).backward()
    assert x.grad.tolist() == [2.0, 4.0]


def test_a_total_is_only_returned():
    for wrong, message in (
        (lambda x: (total(x), x + 1), "totals must be the last of the results"),
        (lambda x: x / total(x), "arithmetic on a total"),
        (lambda x, *, n: total(n), "total of a scalar"),
    ):
        keywords = {"n": 1.0} if "scalar" in message else {}
        with use("numba"), pytest.raises(FormulaError, match=message):
            formula(wrong)(torch.ones(2), **keywords)
    with use("numba"), pytest.raises(FormulaError, match="total"):
        formula(per_row=())(lambda x: total(x))(torch.ones(2, 2))
    with use("numba"), pytest.raises(TypeError, match="foreach_ needs @formula"):
        product_rule.foreach_([torch.ones(2)], [torch.ones(2)])


@pytest.mark.parametrize("engine", ["torch", "numba"])
def test_a_result_may_be_the_old_value_of_another_target(engine):
    @formula(updates=("current", "previous"))
    def keep(current, previous, *, lr):
        return current - lr, current

    current, previous = torch.ones(2), torch.zeros(2)
    with use(engine):
        keep(current, previous, lr=0.25)
    assert (current[0].item(), previous[0].item()) == (0.75, 1.0)


def test_numbers_from_outside_are_not_frozen():
    factor = 0.5

    @formula
    def scale(x):
        return factor * x

    with use("numba"):
        assert scale(torch.ones(1)).item() == 0.5
        factor = 7.0
        assert scale(torch.ones(1)).item() == 7.0


def test_static_values_that_are_equal_are_not_the_same():
    @formula(static=("mode",))
    def choose(x, *, mode):
        return x if isinstance(mode, bool) else 4 * x

    with use("numba"):
        assert [choose(torch.ones(1), mode=mode).item() for mode in (True, 1, 1.0)] == [1, 4, 4]
        with pytest.raises(TypeError, match=r"static keywords must be hashable, got mode=\[1\]"):
            choose(torch.ones(1), mode=[1])
