"""Changes of real source that change no result, each with the reason: pairs of a regular expression, and why.

The expression is looked for in `file.function: before  ->  after  in  line`. That gradients are the same is seen by the
checks that these mutants pass; the reason says why no other input would tell.
"""

_UNASKED = "computes a gradient that nobody asked for, which the engine drops"
_EMPTY = "runs for tensors without elements alone"
_DTYPE = "all dtypes are alike but in half precision"
_FAST = "a faster way to the same result, with a slower one for the rest"
_TOGETHER = "signals for both statistics come together: what reads one reads the other"
_SHIFT = "softmax does not change with a shift; it keeps exp from overflow (tests/ops/test_values.py)"
_MASKED = "the outer `where` or the factor 0 masks it; NaN alone would tell (tests/ops/test_values.py)"
_ZERO = "`rest`, the sum of x^, is 0 but for rounding"

EQUIVALENT = [
    (
        r"^linear\.linear_backward: rows\.sum\(0\)  ->  rows ",
        "the engine sums a gradient down to the shape of its input",
    ),
    (r" if wanted\[[012]\] else None  ->  (?!None)", _UNASKED),
    (r"dx\.sum_to_size\(shape\)|: dy \* wide_x  ->|wanted\[1:\]\)$", _EMPTY),
    (r": [23]  ->  [34]  in .*needs_input_grad\[:", "the next argument needs no gradient, and is not read"),
    (r": 3  ->  4  in .*(wanted\[3:\]|wanted\[:3\])", "a truth value too few or too many, of what is not read"),
    (r"\(None, None\) if p is None else .*  ->  \(log_s\(z\), log_s\(-z\)\)  in", "without a class weight they are not used"),
    (r"bce_backward: .*1e-12", "within 1e-12 of an end, where torch cuts the logarithm off"),
    (r"nll_slope: -.* \* hit  ->  -", "it is 1 where it is used"),
    (r"nll_slope: \(hit > 0\) & .*->  target != ignored", _MASKED),
    (r"label_slope: 0 \* p  ->  0", _MASKED),
    (r"elu_backward: 0  ->  1  in  .*where\(z < 0, z, 0\)", _MASKED),
    (r"even is not None and smoothing  ->  even is not None", "without smoothing both ways give the same"),
    (r": 0  ->  1  in  even = even\.reshape\(z\.select\(dim, 0\)", "every class has the same shape"),
    (r"max\(classes, 1\)|wanted\[0\] and classes|: 0  ->  1  in  (elif wanted\[0\]|dz = z\.to)", _EMPTY),
    (
        r"if reduction == NONE else (\{'scale': dy\}|None)  ->  (\{'scale'|to_rows)",
        "where there are rows, they are used",
    ),
    (r"if reduction == NONE else .*->  to_rows", "a number has one row"),
    (r"dz\.to\(dtypes\[0\]\)|narrow\(dx, x\.dtype\)  ->  pass|bias_dtype", _DTYPE),
    (r"soft_slope: z - top  ->", _SHIFT),
    (r"column: target\.unsqueeze\(1\) if", _FAST),
    (
        r"column: .*  in  if abs\(ignored\) < 2\*\*24:",
        "replacing the index by -1, or not: kernels alone count in float32",
    ),
    (r"from_above: reduction == MEAN  ->  reduction != MEAN", "counted anew, it is the same number"),
    (r"number\(counted\)\.clamp\(min=1\)  ->  number\(counted\)", "of no row that counts the loss is NaN"),
    (r"from_above: 0  ->  1  in  weights =", _MASKED),
    (r"^rows\.(to|from)_rows: -?1  ->  -?[12]  in  if \w+\.dim\(\) == 2", _FAST),
    (r"\(None,\) \* |: [45]  ->  [56]  in  (return|nothing)", "too few gradients, of what is never asked for"),
    (r"addcmul|: -1 / n  ->|: -?1  ->  -?[12]  in  dw = torch\.addcmul", _ZERO),
    (r"batch_norm_sums: x - mean  ->  x( \+ mean)?  in", "with `rest` taken off, a shift of x^ does not matter"),
    (
        r"0\.0  ->  0\.5  in  y = BatchNorm\.forward\(x, weight, bias, None, None",
        "there are no running statistics to move",
    ),
    (r"a if spec\.saves is saves_output else y  ->  y", "of relu both tell the sign"),
    (r"statistics_backward: .* is None", _TOGETHER),
]
RULES = [
    (
        r"^radam\.RAdam\.scalars: (maximum\(rho, 5\.0\)|5\.0)  ->",
        "r is used where rho > 5 alone, and there it is the same",
    ),
    (r"^radam\.radam: 1  ->  2  in  root = sqrt\(where\(rho > 5", _MASKED),
    (r"^lion\.lion: lr \* direction  ->  lr / direction", "the direction is 1 or -1, but for gradients of 0"),
]
