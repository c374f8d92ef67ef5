"""The backward formulas of `torch_bp.ops` by file, and the calls that must tell each of their faults."""

from dataclasses import dataclass, field
from functools import cache, partial

import torch

from tests import tables
from tests.mutants.mutation import RAISED, WRONG, Namespace
from torch_bp.autograd import gradcheck, gradgradcheck


@dataclass(frozen=True)
class Target:
    """A file, functions in it, files built on it, and names of rows of `tests.tables` that use them."""

    file: str
    functions: set[str]
    rows: tuple[str, ...] = ()
    dependents: tuple[str, ...] = ()
    before: tuple[str, ...] = ()  # made anew as well: it keeps what is made of it
    numbers: dict[str, int] = field(default_factory=dict)  # of the module, set for these calls

    @property
    def path(self):
        return f"torch_bp.ops.{self.file}"

    def namespace(self, mutant):
        made = Namespace(mutant, tuple(f"torch_bp.ops.{name}" for name in (*self.before, self.file, *self.dependents)))
        for module in made.modules.values():
            module.__dict__.update({k: v for k, v in self.numbers.items() if hasattr(module, k)})
        return made


_POINTWISE = ("sigmoid", "tanh", "relu", "leaky_relu", "hardtanh", "elu", "softplus", "silu", "gelu")
_DEFAULTS = {
    "leaky_relu": {"negative_slope": 0.01},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "elu": {"alpha": 1.0},
    "softplus": {"beta": 1.0, "threshold": 20.0},
}
_LINEAR = ("linear_sigmoid", "linear_tanh", "linear_relu", "linear_leaky_relu", "linear_gelu")
_LOSSES = ("mse_loss", "half_mse_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits")
_CLASSES = ("nll_loss", "cross_entropy")
TARGETS = [
    Target(
        "pointwise", {f"{n}_backward" for n in (*_POINTWISE, "gelu_tanh")} | {"activation.Node.backward"}, _POINTWISE
    ),
    Target("linear", {"linear_backward", "Linear.backward", "Linear.setup_context"}, ("linear",)),
    Target(
        "softmax",
        {"softmax_backward", "log_softmax_backward", "_by_rows", "Softmax.backward"},
        ("softmax", "log_softmax"),
    ),
    Target("squared_error", {"squared_error_backward", "_squared_error_slopes"}, _LOSSES[:2]),
    Target(
        "binary_cross_entropy",
        {
            "bce_backward",
            "bce_target_backward",
            "bce_logits_backward",
            "bce_logits_target_backward",
            "_bce_slopes",
            "_bce_logits_slopes",
        },
        _LOSSES[2:],
    ),
    Target(
        "elementwise_loss",
        {"elementwise_loss.upstream", "elementwise_loss.Loss.backward", "elementwise_loss.Loss.setup_context"},
        _LOSSES,
        ("squared_error", "binary_cross_entropy"),
    ),
    Target(
        "nll_loss",
        {"nll_slope", "nll_backward", "NegativeLogLikelihood.backward", "CountedNegativeLogLikelihood.backward"},
        ("nll_loss",),
    ),
    Target(
        "cross_entropy",
        {
            "label_slope",
            "soft_slope",
            "cross_entropy_backward",
            "soft_cross_entropy_backward",
            "CrossEntropy.backward",
            "CountedCrossEntropy.backward",
            "SoftCrossEntropy.backward",
        },
        ("cross_entropy",),
    ),
    Target(
        "cross_entropy",
        {"RowCrossEntropy.backward", "RowCrossEntropy.setup_context"},
        ("cross_entropy",),
        numbers={"_WORTHWHILE": 0},
    ),
    Target("class_loss", {"along_classes", "column", "from_above"}, _CLASSES, ("nll_loss", "cross_entropy")),
    Target(
        "rows",
        {"to_rows", "from_rows"},
        ("softmax", "log_softmax", *_CLASSES),
        ("class_loss", "softmax", "nll_loss", "cross_entropy"),
    ),
    Target("dropout", {"Dropout.backward", "unpack"}, ("dropout",)),
    Target("layer_norm", {"layer_norm_backward", "LayerNorm.backward"}, ("layer_norm",)),
    Target(
        "batch_norm",
        {
            "_rows",
            "_sums_by.batch_norm_sums",
            "_slope",
            "_in_rows",
            "_sums",
            "_slopes",
            "batch_norm_backward",
            "BatchNorm.backward",
            "FixedBatchNorm.backward",
        },
        ("batch_norm",),
    ),
    Target(
        "linear_activation",
        {"linear_activation.LinearActivation.backward", "linear_activation.LinearActivation.setup_context"},
        _LINEAR,
        (),
        ("pointwise",),
    ),
    Target("batch_norm_activation", {"BatchNormActivation.backward"}, ("batch_norm_relu", "batch_norm_gelu")),
    Target("standardize", {"statistics_backward"}, ("batch_norm", "layer_norm"), ("batch_norm", "layer_norm")),
]


# Beside the rows of `tests.tables`: what some line alone is for.
_FAR = 2**30  # an index to ignore that float32 has no place for
_fixed_unit = tables.fixed(tables.unit(3))
_MORE = [
    *tables._indices("nll_loss", "ignored in rows", 4, 3, ignore_index=1),
    *tables._indices("nll_loss", "ignored far", 5, 3, ignore_index=_FAR),
    *tables._indices("nll_loss", "ignored image", 2, 3, 4, ignore_index=1),
    *tables._indices("nll_loss", "one", 3, reduction="mean"),
    *tables._indices("cross_entropy", "ignored in rows", 4, 3, ignore_index=1),
    *tables._indices("cross_entropy", "ignored far", 5, 3, ignore_index=_FAR, weight=_fixed_unit),
    *tables._indices("cross_entropy", "ignored far and smoothed", 5, 3, ignore_index=_FAR, label_smoothing=0.2),
    *tables._indices("cross_entropy", "ignored image", 2, 3, 4, ignore_index=1),
    *tables._indices("cross_entropy", "weighted and smoothed", 2, 3, 4, weight=_fixed_unit, label_smoothing=0.3),
    *tables._indices("cross_entropy", "one", 3, reduction="mean"),
    *tables._shares_loss("smoothed", 2, 3, 4, label_smoothing=0.3),
    *tables._shares_loss("weighted and smoothed", 2, 3, 4, weight=tables.unit(3), label_smoothing=0.3),
    *tables._logits_loss("pos_weight alone", 4, 3, pos_weight=_fixed_unit),
    *(
        tables.Row(
            f"batch_norm_{n}",
            "joint",
            input=tables.spread(5, 3),
            weight=tables.finite(3),
            bias=tables.finite(3),
            following=tables.normal(2, 3),
            following_bias=tables.normal(2),
        )
        for n in ("relu", "gelu")
    ),
    tables.Row("linear_gelu", "batch", input=tables.normal(4, 3), weight=tables.normal(2, 3), bias=tables.normal(2)),
]


def calls(target, namespace):
    """Yield functions and their tensors that use what the target names."""
    rows = [r for r in (*tables.ROWS, *_MORE) if r.name in target.rows and not r.empty and _is_finite(r)]
    for row in sorted(
        rows, key=lambda r: sum(m.shape == () for m in r.arguments.values() if isinstance(m, tables.Maker))
    ):
        drawn = row.draw(requires_grad=True)
        yield row.function(_called(row.name, namespace, drawn), drawn), tuple(drawn[k] for k in row.differentiable)
    if target.file == "pointwise":
        for name in ("sigmoid", "tanh"):
            z = torch.randn(3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).requires_grad_()
            yield getattr(namespace, name), (z,)
    if target.file == "dropout":
        x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for p in (0.3, 1.0):
            yield partial(_seeded, namespace.dropout, p), (x,)


@cache
def _is_finite(row):
    drawn = row.draw()
    return bool(row.function(row.theirs, drawn)(*(drawn[k] for k in row.differentiable)).isfinite().all())


def _seeded(dropout, p, x):
    torch.manual_seed(0)
    return dropout(x, p)


def _called(name, namespace, drawn):
    if name == "gelu" and drawn.get("approximate") == "tanh":
        return lambda input, approximate: namespace.gelu_tanh(input)
    if name in _DEFAULTS:
        return lambda input, **values: getattr(namespace, name)(input, *(_DEFAULTS[name] | values).values())
    if name.startswith("batch_norm_"):
        from torch_bp import ops

        def joint(input, weight, bias, following, following_bias):
            return namespace.batch_norm_activation(
                getattr(ops, name.removeprefix("batch_norm_")),
                (),
                input,
                None,
                None,
                weight,
                bias,
                True,
                following=(following, following_bias),
            )

        return joint
    return getattr(namespace, name)


def caught(target, mutant):
    """Return WRONG if a check of first or second derivatives finds the fault by its numbers.

    RAISED if the module cannot be made or a call fails, forward or backward, which is no merit of the check; else "".
    """
    try:
        namespace = target.namespace(mutant)
        made = list(calls(target, namespace))
        return _found(target, made)
    except Exception:
        return RAISED


def _found(target, made):
    last = _LAST.get(target.file, 0)  # what told the last fault probably tells this one
    verdict = ""
    for i in (last, *(i for i in range(len(made)) if i != last)):
        verdict = verdict or _verdict(gradcheck, *made[i], check_contract=False, check_undefined_grad=False)
        if verdict:
            _LAST[target.file] = i
            return verdict
    checks = [gradcheck, gradgradcheck]
    if "norm" in target.rows[0]:  # statistics are results there, with signals of their own
        checks.append(lambda f, tensors, **options: gradcheck(_with_gradient(f), tensors, **options))
    return next((verdict for check in checks for call in made if (verdict := _verdict(check, *call))), "")


def _verdict(check, f, tensors, **options):
    report = check(f, tensors, raise_exception=False, **options)
    return "" if report else RAISED if " raised" in report.failure else WRONG


_LAST: dict[str, int] = {}


def _with_gradient(f):
    """Return f and the gradient of its sum: signals from both come together in one node."""

    def both(*tensors):
        y = f(*tensors)
        asked = [t for t in tensors if t.requires_grad]
        return y, [g for g in torch.autograd.grad(y.sin().sum(), asked, create_graph=True) if g.requires_grad]

    return both
