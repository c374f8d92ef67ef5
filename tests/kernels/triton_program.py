"""Run by `test_cuda.py` in a process of its own: kernels interpreted on the CPU, or compiled ahead of time."""

import sys

import torch

from tests.kernels.formulas import PURE, SIZES, averaged, hostile, lists, matrices, measured, rows, scaled
from torch_bp.kernels import cuda, cuda_text, use
from torch_bp.kernels.extension import with_column_sum
from torch_bp.ops import pointwise

TOLERANCE = {
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
    torch.float32: {"rtol": 5e-6, "atol": 1e-6},
    torch.float64: {"rtol": 1e-13, "atol": 1e-14},
}


def interpret():
    checked = 0
    for dtype, tolerance in TOLERANCE.items():
        for formula in PURE:
            for shape in SIZES[:-1]:
                x, y = hostile(shape, dtype)
                if dtype is torch.bfloat16:  # the interpreter widens subnormal bfloat16 to other numbers
                    x, y = (t.masked_fill(t.abs() < 1e-37, 0) for t in (x, y))
                with use("torch"):
                    expected = formula(x, y)
                with use("triton"):
                    assert (formula.formula.by_kernel((x, y), {}) is not NotImplemented) == (x.numel() > 0)
                    actual = formula(x, y)
                torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)
                checked += 1
        for shape in ((5, 3), (3, 1500)):
            arguments = matrices(shape, dtype)
            with use("torch"):
                expected = rows(*arguments, factor=0.5)
            with use("triton"):
                assert rows.formula.by_kernel(arguments, {"factor": 0.5}) is not NotImplemented
                actual = rows(*arguments, factor=0.5)
            close = {"rtol": 20 * tolerance["rtol"], "atol": 60 * tolerance["atol"]}  # sums of many elements
            torch.testing.assert_close(actual, expected, equal_nan=True, **close)
            checked += 1
        for slope in (pointwise.relu_backward, pointwise.gelu_backward):
            for shape in ((5, 3), (40, 700)):
                arguments = matrices(shape, dtype)[:2]
                both = with_column_sum(slope)
                with use("torch"):
                    expected = both(*(t.double() for t in arguments))
                with use("triton"):
                    assert both.formula.by_kernel(arguments, {}) is not NotImplemented
                    actual = both(*arguments)
                rounding = {"rtol": 4 * tolerance["rtol"], "atol": 8 * tolerance["atol"]}
                torch.testing.assert_close([t.double() for t in actual], [*expected], equal_nan=True, **rounding)
                checked += 1
        for factor in (0.999, torch.tensor(0.999, dtype=torch.float64)):
            with use("triton"):
                actual = scaled(torch.ones(9, dtype=dtype), factor=factor, offset=0.0)
            torch.testing.assert_close(actual, torch.full((9,), 1 - 0.999, dtype=dtype), **tolerance)
            checked += 1
        for with_largest in (True, False):
            lined, expected = lists(dtype, with_largest=with_largest), lists(dtype, with_largest=with_largest)
            with use("torch"):
                averaged.foreach_(*expected, rate=0.1, beta=0.9, negative=True)
            with use("triton"):
                averaged.foreach_(*lined, rate=0.1, beta=0.9, negative=True)
            torch.testing.assert_close(lined, expected, **tolerance)
            checked += 1
        (params, grads, *_), (expected, same, *_) = lists(dtype), lists(dtype)
        with use("torch"):
            wanted = measured.foreach_(expected, same, rate=0.1, clear=True)
        with use("triton"):
            totals = measured.foreach_(params, grads, rate=0.1, clear=True)
        torch.testing.assert_close([*params, *grads], [*expected, *same], **tolerance)
        torch.testing.assert_close(totals, wanted, rtol=max(1e-6, 2 * tolerance["rtol"]), atol=1e-12)
        checked += 1
    print("interpreted", checked + optimizers())


def optimizers():
    """Steps of every optimizer by interpreted kernels and by the torch formula, plain and with all that goes along."""
    from tests.optim.table import PAIRS, parameters, train
    from torch_bp.optim import fused_step
    from torch_bp.optim.copies import Copies

    options = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9, "centered": True}, "Adam": {"amsgrad": True}}
    for name, (kind, _) in PAIRS.items():
        for dtype in (torch.float32, torch.float64):
            trained = []
            for engine in ("torch", "triton"):
                params = parameters(dtype, shapes=[(3, 4), (5,), (), (0, 3)])
                optimizer = kind(params, **options.get(name, {}))
                with use(engine):
                    train(optimizer, params, 8)
                    done = fused_step(optimizer, max_norm=1.0, zero_grad=True, norms=True)
                grads = [p.grad for p in params]
                trained.append((params, grads, done.total_norm, done.grad_norms, done.weight_norms, done.update_norms))
            assert optimizer._plan.shares[0].buckets, "no list kernel served"
            torch.testing.assert_close(*trained, **TOLERANCE[dtype])
        for half in (torch.bfloat16, torch.float16):
            params = [torch.nn.Parameter(p.detach()) for p in parameters(torch.float32, shapes=[(40, 50), (5,), ()])]
            optimizer, copies = kind(params, **options.get(name, {})), Copies(half)
            halves = [copies.of(p) for p in params[:-1]]
            copies.attach(optimizer)
            with use("triton"):
                train(optimizer, params, 2)
            assert not copies.stale()
            cut_off = 2.0**-7 if half is torch.bfloat16 else 0.0  # by the interpreter, where a device rounds
            torch.testing.assert_close(halves, [p.detach().to(half) for p in params[:-1]], rtol=cut_off, atol=0)
        for dtype in (torch.float16, torch.bfloat16):
            params = parameters(dtype, shapes=[(40, 50), (5,)])
            optimizer = kind(params, lr=1e-3)
            train(optimizer, params, 2)
            before = [p.detach().double() for p in params]
            for p in params:
                p.grad.fill_(1.0)
            with use("triton"):
                done = fused_step(optimizer, norms=True)
            changes = torch.stack([(p.detach().double() - b).norm() for p, b in zip(params, before)])
            torch.testing.assert_close(done.update_norms, changes, rtol=1e-5, atol=0)
    return 6 * len(PAIRS)


def kernels():
    """Every text that a program of the package may load: (formula's program, form, from_table)."""
    import torch_bp.ops.batch_norm
    import torch_bp.ops.cross_entropy
    import torch_bp.ops.layer_norm
    import torch_bp.ops.nll_loss
    import torch_bp.ops.softmax  # noqa: F401
    from torch_bp import optim
    from torch_bp.kernels.extension import SCALE, extended
    from torch_bp.kernels.norm import sum_of_squares
    from torch_bp.ops.binary_cross_entropy import bce_backward, bce_logits_backward, bce_target_backward
    from torch_bp.ops.squared_error import squared_error_backward

    batch_norm, cross_entropy, layer_norm, nll_loss, softmax = (
        sys.modules[f"torch_bp.ops.{name}"]
        for name in ("batch_norm", "cross_entropy", "layer_norm", "nll_loss", "softmax")
    )
    for formula in (*PURE, pointwise.sigmoid_backward, pointwise.tanh_backward, pointwise.relu_backward):
        yield formula.formula, [torch.ones(2)] * len(formula.formula.tensors), {}
    yield pointwise.leaky_relu_backward.formula, [torch.ones(2)] * 2, {"negative_slope": 0.1}
    yield pointwise.softplus_backward.formula, [torch.ones(2)] * 2, {"beta": 1.0, "threshold": 20.0}
    for formula in (pointwise.gelu_backward, pointwise.gelu_tanh_backward, pointwise.silu_backward):
        yield formula.formula, [torch.ones(2)] * 2, {}
    for formula in (squared_error_backward, bce_backward, bce_target_backward):
        yield formula.formula, [None, torch.ones(2), torch.ones(2)], {"scale": 1.0, "factor": 1.0}
    yield bce_logits_backward.formula, [torch.ones(2)] * 4, {"scale": 1.0, "factor": 1.0}
    yield rows.formula, [torch.ones(2, 2)] * 4, {"factor": 1.0}
    yield measured.formula, [torch.ones(2)] * 2, {"rate": 1.0, "clear": True}
    for formula in (softmax.softmax_backward, softmax.log_softmax_backward, softmax.log_softmax_tangent):
        yield formula.formula, [torch.ones(2, 2)] * 2, {}
    labels = {"ignored": -100, "hit": 0.9, "spread": 0.1}
    yield cross_entropy.label_losses.formula, [torch.ones(2, 2)] * 3, {**labels, "smoothed": True}
    yield cross_entropy.label_slope.formula, [torch.ones(2, 2)] * 2 + [None, None, None, None], labels
    yield cross_entropy.label_slope.formula, [torch.ones(2, 2)] * 2 + [None, None] + [torch.ones(2, 2)] * 2, labels
    yield cross_entropy.soft_slope.formula, [torch.ones(2, 2)] * 2 + [None], {}
    yield layer_norm.layer_norm_backward.formula, [torch.ones(2, 2)] * 5, {"count": 2.0, "wanted": (True,) * 3}
    yield batch_norm.batch_norm_sums.formula, [torch.ones(2, 2)] * 4, {}
    yield nll_loss.nll_slope.formula, [torch.ones(2, 2)] * 2 + [None], {"ignored": -100}
    for kind, options in (
        (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (optim.Adagrad, {"lr_decay": 0.1}),
        (optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
        (optim.AdamW, {}),
        (optim.NAdam, {"weight_decay": 0.1}),
        (optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        (optim.Adamax, {"maximize": True}),
        (optim.Adadelta, {"weight_decay": 0.1}),
        (optim.Lion, {"weight_decay": 0.1}),
    ):
        optimizer = kind([torch.ones(2, requires_grad=True)], **options)
        group = optimizer.param_groups[0]
        tensors = [torch.ones(2), torch.ones(2)]
        tensors += [None if name is None else torch.ones(2) for name in optimizer.state_layout(group)]
        scalars = optimizer.scalars(group, 3, False, **dict.fromkeys(_numbers(kind), 0.5))
        yield kind.rule.formula, tensors, scalars
        if kind in (optim.Adam, optim.Lion):
            more = extended(kind.rule.formula, scaled=True, cleared=True, measured=True)
            yield more, tensors, {**scalars, SCALE: 0.5}
    for slope in (pointwise.relu_backward, pointwise.tanh_backward, pointwise.gelu_backward):
        yield with_column_sum(slope).formula, [torch.ones(2, 2)] * 2, {}
    yield sum_of_squares.formula, [torch.ones(2)], {}


def _numbers(kind):
    return getattr(kind, "numbers", ())


def compile_ahead():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
    compiled = 0
    for number, (formula, tensors, keywords) in enumerate(kernels()):
        for dtype in pointers if number == 0 else (torch.float32, torch.float64 if number % 2 else torch.bfloat16):
            absent = tuple(name for name, tensor in zip(formula.tensors, tensors) if tensor is None)
            program = formula._program("triton", dtype, absent, keywords)
            forms = [("kernel",), ("single",), ("list",)]
            if formula.updates and dtype is torch.float32:
                forms += [("list", True, None), ("list", True, (program.targets[0], torch.bfloat16))]
            for form, *guarded in forms:
                kernel = getattr(program, form, None)
                if kernel is None:
                    continue
                run = kernel._run(dtype is torch.float64 or bool(guarded), *guarded)
                types = dict.fromkeys(run.arg_names, "fp32")
                types |= {n: pointers[dtype] for n in run.arg_names if n.startswith("p_")}
                types |= {n: "*fp64" for n in run.arg_names if n in ("scalars", "totals")}
                kinds = getattr(formula, "kinds", {})
                types |= {f"p_{n}": "*i64" for n, kind in kinds.items() if kind == "label" and f"p_{n}" in types}
                types |= {"skip": "*i32", "copies": "*i64"} if guarded else {}
                types = {n: kind for n, kind in types.items() if n in run.arg_names}
                types |= {n: "*i64" for n in ("addresses", "tensor", "start", "length") if n in types}
                types |= {n: "i64" for n in ("count", "columns", "rows") if n in types}
                types |= {
                    f"p__result{i}": pointers[program.sums]
                    for i, output in enumerate(program.expression.outputs)
                    if output.kind == "column sum"
                }
                sizes = {
                    "BLOCK": cuda.COLUMNS if getattr(program, "by_columns", False) else cuda.BLOCK,
                    "CHUNK": cuda_text.CHUNK,
                }
                sizes = {n: v for n, v in sizes.items() if n in run.arg_names}
                types |= dict.fromkeys(sizes, "constexpr")
                source = ASTSource(run, types, constexprs={(run.arg_names.index(n),): v for n, v in sizes.items()})
                binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(cuda.LAUNCH))
                assert binary.asm["cubin"], formula.name
                compiled += 1
    print("compiled", compiled)


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_ahead}[sys.argv[1]]()
