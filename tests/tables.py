"""One row per operation and kind of input; a new operation joins every property by a row.

A row names the function of `torch_bp.nn.functional`, which is also its twin's in `torch.nn.functional`, and says by
makers what its arguments are. Makers of real tensors are differentiated, unless they are `fixed`.
"""

import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf, nan
from typing import Any

import torch

import torch_bp.nn.functional as ours
from torch_bp import ops

linear_activation = sys.modules["torch_bp.ops.linear_activation"]  # the name in the package is the function's
LOGITS = (0.0, -0.0, 1.0, -1.0, 1e4, -1e4, 1e-30, 40.0, inf, -inf, nan)
# Input and parameters of what is standardised: beside 1e4 float32 has no digits left for the rest, and what becomes of
# an infinite weight depends on the order of multiplication.
SPREAD = (0.0, -0.0, 1.0, -1.0, 1e-30, 40.0, inf, -inf, nan)
FINITE = (0.0, -0.0, 1.0, -1.0, 1e-30, 40.0)
UNIT = (0.0, 1.0, 0.5, 1e-30, 1 - 2.0**-24, 0.25)


@dataclass(frozen=True)
class Maker:
    """How to draw a tensor: `draw(shape, generator)` in float64, and values worth a look of their own."""

    draw: Callable[[tuple[int, ...], torch.Generator], torch.Tensor]
    shape: tuple[int, ...]
    special: tuple[float, ...] = LOGITS
    fixed: bool = False


def _normal(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _unit(shape, generator):
    return 0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)


def _shares(shape, generator):
    return torch.softmax(_normal(shape, generator), 0 if len(shape) == 1 else 1)


def _classes(shape, generator, count, ignored=None):
    found = torch.randint(count, shape, generator=generator)
    return found if ignored is None else torch.where(_unit(shape, generator) < 0.4, ignored, found)


def normal(*shape):
    """Any real numbers."""
    return Maker(_normal, shape)


def spread(*shape):
    """Any real numbers, to be standardised."""
    return Maker(_normal, shape, SPREAD)


def finite(*shape):
    """Any real numbers, to scale and shift with."""
    return Maker(_normal, shape, FINITE)


def unit(*shape):
    """Numbers in [0, 1]: probabilities and their targets, weights."""
    return Maker(_unit, shape, UNIT)


def shares(*shape):
    """Probabilities over classes."""
    return Maker(_shares, shape, UNIT)


def classes(*shape):
    """Class indices, of three classes."""
    return Maker(partial(_classes, count=3), shape, (), fixed=True)


def fixed(maker):
    """Like `maker`, but not differentiated."""
    return replace(maker, fixed=True)


def _half_mse_loss(input, target):
    n = len(input) if input.dim() else 1
    return torch.nn.functional.mse_loss(input, target, reduction="sum") / (2 * n)


def _standardized(x, over, eps):
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


def _batch_norm_in_steps(input, running_mean, running_var, weight=None, bias=None, training=False, eps=1e-5):
    if not training:
        return torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    y = _standardized(input, [d for d in range(input.dim()) if d != 1], eps).movedim(1, -1)
    return (y if weight is None else y * weight + bias).movedim(-1, 1)


def _layer_norm_in_steps(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    y = _standardized(input, tuple(range(-len(normalized_shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _linear_activation(activation):
    return lambda input, weight, bias=None, **values: activation(
        torch.nn.functional.linear(input, weight, bias), *values.values()
    )


def _batch_norm_activation(activation):
    """In training, without running statistics; followed by an affine map."""

    def joint(input, weight, bias, following, following_bias):
        affine = (following, following_bias)
        return ops.batch_norm_activation(activation, (), input, None, None, weight, bias, True, following=affine)

    return joint


def _batch_norm_then(activation):
    def steps(input, weight, bias, following, following_bias):
        y = torch.nn.functional.batch_norm(input, None, None, weight, bias, training=True)
        return torch.nn.functional.linear(activation(y), following, following_bias)

    return steps


JOINT = {f"batch_norm_{name}": _batch_norm_activation(getattr(ops, name)) for name in ("relu", "gelu")}
TWINS = {
    "half_mse_loss": _half_mse_loss,
    **{
        f"linear_{name}": _linear_activation(getattr(torch.nn.functional, name))
        for name in ("sigmoid", "tanh", "relu", "leaky_relu", "hardtanh", "elu", "softplus", "silu", "gelu")
    },
    **{f"batch_norm_{name}": _batch_norm_then(getattr(torch.nn.functional, name)) for name in ("relu", "gelu")},
}
# Under `torch.func` torch's second derivatives of these are wrong, and without a weight `layer_norm` has none at all.
TWICE = {"batch_norm": _batch_norm_in_steps, "layer_norm": _layer_norm_in_steps}


class Row:
    """A function by name, a word on the case, and its arguments: makers, or values passed as they are."""

    upstream = staticmethod(_normal)  # draws the gradient at the output

    def __init__(self, name: str, case: str = "", **arguments: Any) -> None:
        self.name, self.id = name, f"{name}-{case}" if case else name
        self.ours = JOINT.get(name) or getattr(ours, name, None) or getattr(linear_activation, name)
        self.theirs = TWINS.get(name) or getattr(torch.nn.functional, name)
        self.theirs_twice = TWICE.get(name) or self.theirs
        self.arguments = arguments
        makers = {k: v for k, v in arguments.items() if isinstance(v, Maker)}
        self.differentiable = [k for k, v in makers.items() if not v.fixed]
        self.empty = any(0 in v.shape for v in makers.values())

    def draw(self, dtype=torch.float64, requires_grad=False, number=0) -> dict[str, Any]:
        """All arguments by name; the same numbers for every dtype, others for each `number`."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()) + number)
        values = dict(self.arguments)
        for name, maker in values.items():
            if isinstance(maker, Maker):
                tensor = maker.draw(maker.shape, generator)
                values[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
                values[name].requires_grad_(requires_grad and not maker.fixed)
        return values

    def function(self, which: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any]:
        """`which` (`row.ours` or `row.theirs`) as a function of the differentiable tensors alone."""
        return lambda *tensors: which(**{**arguments, **dict(zip(self.differentiable, tensors))})

    def pair(self, dtype=torch.float64, requires_grad=False, twice=False):
        """Both functions of the differentiable tensors, theirs to be differentiated twice or not, and these tensors."""
        drawn = self.draw(dtype, requires_grad)
        tensors = tuple(drawn[k] for k in self.differentiable)
        theirs = self.theirs_twice if twice else self.theirs
        return self.function(self.ours, drawn), self.function(theirs, drawn), tensors


def _reduced(name, case, **arguments):
    """A row for each reduction, or the one in `arguments`."""
    reductions = [arguments.pop("reduction")] if "reduction" in arguments else ["none", "mean", "sum"]
    return [Row(name, f"{case} {r}", reduction=r, **arguments) for r in reductions]


def _pointwise(name, **parameters):
    shapes = {"matrix": (4, 3), "number": (), "four dimensions": (2, 1, 3, 2), "empty": (0, 3)}
    case = "".join(f" {k} {v}" for k, v in parameters.items())
    return [Row(name, key + case, input=normal(*shape), **parameters) for key, shape in shapes.items()]


def _linear(case, *lead, inputs=3, outputs=2, bias=True):
    bias = {"bias": normal(outputs)} if bias else {}
    return Row("linear", case, input=normal(*lead, inputs), weight=normal(outputs, inputs), **bias)


def _linear_activations():
    for name in ("linear_sigmoid", "linear_tanh", "linear_relu"):
        yield Row(name, "batch", input=normal(4, 3), weight=normal(2, 3), bias=normal(2))
    shapes = {"no bias": (4, 3), "one example": (3,), "leading dimensions": (2, 1, 3, 3), "empty": (0, 3)}
    for case, shape in shapes.items():
        bias = {"bias": normal(2)} if case == "one example" else {}
        yield Row("linear_tanh", case, input=normal(*shape), weight=normal(2, 3), **bias)
        values = {"negative_slope": 0.1}
        yield Row("linear_leaky_relu", case, input=normal(*shape), weight=normal(2, 3), bias=normal(2), **values)


def _batch_norm(case, *shape, affine=True, **options):
    """In training without running statistics, which change at every call: they have tests of their own."""
    training = options.setdefault("training", True)
    channels = shape[1]
    running = {"running_mean": fixed(finite(channels)), "running_var": fixed(unit(channels))}
    options |= {"running_mean": None, "running_var": None} if training else running
    options |= {"weight": finite(channels), "bias": finite(channels)} if affine else {}
    return Row("batch_norm", case, input=spread(*shape), **options)


def _layer_norm(case, lead, *shape, weight=True, bias=True):
    options = {"weight": finite(*shape)} if weight else {}
    options |= {"bias": finite(*shape)} if bias else {}
    return Row("layer_norm", case, input=spread(*lead, *shape), normalized_shape=shape, **options)


def _softmax(name):
    cases = [((4, 3), 1), ((4, 3), 0), ((3,), 0), ((2, 3, 2), 1), ((2, 3, 2), -1), ((), 0), ((0, 3), 1)]
    return [Row(name, f"{shape} along {dim}", input=normal(*shape), dim=dim) for shape, dim in cases]


def _elementwise_loss(name, input, target):
    rows = _reduced(name, "matrix", input=input(4, 3), target=target(4, 3))
    rows += _reduced(name, "fixed target", input=input(4), target=fixed(target(4)), reduction="mean")
    for case, shape in {"three dimensions": (2, 2, 3), "number": (), "empty": (0, 3)}.items():
        rows.append(Row(name, case, input=input(*shape), target=target(*shape)))
    return rows


def _logits_loss(case, *shape, **weights):
    name = "binary_cross_entropy_with_logits"
    return _reduced(name, case, input=normal(*shape), target=unit(*shape), **weights)


def _indices(name, case, *shape, **options):
    target = classes(*shape[:1], *shape[2:]) if len(shape) > 1 else classes()
    target = replace(target, draw=partial(_classes, count=3, ignored=options.get("ignore_index")))
    return _reduced(name, case, input=normal(*shape), target=target, **options)


def _class_loss(name):
    return [
        *_indices(name, "indices", 4, 3),
        *_indices(name, "unbatched", 3, weight=fixed(unit(3)), reduction="mean"),
        *_indices(name, "ignored", 4, 3, ignore_index=1, reduction="none"),
        *_indices(name, "images", 2, 3, 2, 2, weight=fixed(unit(3)), reduction="sum"),
        *_indices(name, "weight ignored", 2, 3, 4, ignore_index=-1, weight=fixed(unit(3))),
        *_indices(name, "empty", 0, 3, reduction="mean"),
    ]


def _shares_loss(case, *shape, **options):
    return _reduced("cross_entropy", case, input=normal(*shape), target=shares(*shape), **options)


ROWS = [
    *_pointwise("sigmoid"),
    *_pointwise("tanh"),
    *_pointwise("relu"),
    *_pointwise("leaky_relu"),
    *_pointwise("leaky_relu", negative_slope=0.0),
    *_pointwise("leaky_relu", negative_slope=-0.5),
    *_pointwise("hardtanh"),
    *_pointwise("hardtanh", min_val=-0.3, max_val=1.0),
    *_pointwise("elu"),
    *_pointwise("elu", alpha=-0.5),
    *_pointwise("softplus"),
    *_pointwise("softplus", beta=2.0, threshold=1.5),
    *_pointwise("silu"),
    *_pointwise("gelu"),
    *_pointwise("gelu", approximate="tanh"),
    *_pointwise("dropout", p=1.0)[:-1],  # nothing is drawn, nor done with no elements
    _batch_norm("batch", 4, 3),
    _batch_norm("length", 2, 3, 4),
    _batch_norm("images", 2, 2, 2, 2),
    _batch_norm("one example", 1, 3, 4),
    _batch_norm("without parameters", 2, 3, 4, affine=False),
    _batch_norm("empty", 0, 3),
    _batch_norm("evaluation", 4, 3, training=False),
    _batch_norm("evaluation of one value", 1, 3, training=False),
    _batch_norm("evaluation length", 2, 3, 4, training=False, eps=0.1),
    _batch_norm("evaluation without parameters", 4, 3, training=False, affine=False),
    _layer_norm("rows", (4,), 3),
    _layer_norm("one example", (), 3),
    _layer_norm("two dimensions", (2, 2), 3, 2),
    _layer_norm("without bias", (4,), 3, bias=False),
    _layer_norm("without weight", (4,), 3, weight=False),
    _layer_norm("without parameters", (2, 3), 4, weight=False, bias=False),
    _layer_norm("empty", (0,), 3),
    _linear("batch", 4),
    _linear("without bias", 4, bias=False),
    _linear("one example"),
    _linear("leading dimensions", 2, 1, 3),
    _linear("empty", 0),
    _linear("empty with leading dimensions", 0, 2),
    _linear("no inputs", 4, inputs=0),
    _linear("no inputs with leading dimensions", 2, 2, inputs=0),
    _linear("no outputs with leading dimensions", 2, 2, outputs=0),
    Row("linear", "weight vector", input=normal(4, 3), weight=normal(3)),
    *_linear_activations(),
    *_softmax("softmax"),
    *_softmax("log_softmax"),
    *_elementwise_loss("mse_loss", normal, normal),
    *_reduced("mse_loss", "weight", input=normal(4, 3), target=normal(4, 3), weight=unit(4, 3)),
    *_reduced("mse_loss", "fixed weight", input=normal(4), target=normal(4), weight=fixed(unit(4)), reduction="mean"),
    *[
        Row("half_mse_loss", f"{shape}", input=normal(*shape), target=normal(*shape))
        for shape in ((4, 3), (), (2, 2, 3), (0, 3))
    ],
    *_elementwise_loss("binary_cross_entropy", unit, unit),
    *_reduced("binary_cross_entropy", "weight", input=unit(4, 3), target=unit(4, 3), weight=fixed(unit(3))),
    *_elementwise_loss("binary_cross_entropy_with_logits", normal, unit),
    *_logits_loss("weight", 4, 3, weight=fixed(unit(4, 1)), reduction="mean"),
    *_logits_loss("pos_weight", 2, 2, 3, pos_weight=fixed(unit(3)), reduction="none"),
    *_logits_loss("both weights", 4, 3, weight=fixed(unit(3)), pos_weight=fixed(unit(3))),
    *_logits_loss("number weights", weight=fixed(unit()), pos_weight=fixed(unit()), reduction="mean"),
    *_class_loss("nll_loss"),
    *_class_loss("cross_entropy"),
    *_indices("cross_entropy", "smoothing", 4, 3, label_smoothing=0.2, reduction="sum"),
    *_indices("cross_entropy", "all smoothing", 4, 3, 2, ignore_index=2, weight=fixed(unit(3)), label_smoothing=1.0),
    *_shares_loss("probabilities", 4, 3),
    *_shares_loss("probabilities unbatched", 3, weight=unit(3), reduction="sum"),
    *_shares_loss("probabilities images", 2, 3, 1, 2, weight=fixed(unit(3)), label_smoothing=0.1, reduction="none"),
    *_shares_loss("probabilities weight", 2, 3, 2, weight=unit(3), label_smoothing=0.1),
    *_shares_loss("probabilities empty", 0, 3, reduction="mean"),
]
