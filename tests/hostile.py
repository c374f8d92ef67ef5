"""Rows like those of `tests.tables` whose inputs make it hard to be exact: what rounds, cancels, saturates or adds up.

They are larger than those: among 72 numbers the largest error says more than among 12.
"""

from dataclasses import replace
from functools import partial

import torch

from tests.tables import ROWS, Maker, Row, fixed, normal, unit


def _normal(shape, generator, mean=0.0, deviation=1.0):
    return mean + deviation * torch.randn(shape, generator=generator, dtype=torch.float64)


def _between(shape, generator, low, high):
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _scales(shape, generator):
    """Six orders of magnitude in one tensor."""
    return _normal(shape, generator) * 10 ** _between(shape, generator, -3, 3)


def _far(shape, generator):
    """Far from zero on both sides."""
    z = _normal(shape, generator)
    return z + 1e4 * _normal(shape, generator).sign()


def _near_certain(shape, generator):
    """Probabilities near 0 and 1."""
    share = 10 ** _between(shape, generator, -7, -1)
    return torch.where(_normal(shape, generator) < 0, share, 1 - share)


def _confident(shape, generator):
    """The first class is so far ahead that its probability differs from 1 in the last digits alone."""
    z = _normal(shape, generator)
    z[:, 0] += 12
    return z


def _class(shape, generator, count):
    return torch.randint(count, shape, generator=generator)


def _shares(shape, generator):
    """Probabilities over classes, most of them small."""
    return torch.softmax(3 * _normal(shape, generator), 1)


HARD = {
    "scales": _scales,
    "far": _far,
    "offset": partial(_normal, mean=1e4),
    "below": partial(_between, low=-20, high=-4),
    "above": partial(_between, low=4, high=20),
}
STANDARDISED = {
    "scales": _scales,
    "little variance": partial(_normal, deviation=1e-4),  # less than eps
    "little variance beside 1": partial(_normal, mean=1, deviation=1e-3),
    "beside 1e2": partial(_normal, mean=1e2),
    "beside 1e4": partial(_normal, mean=1e4),
}
SHAPE = (8, 9)
MANY = 4096
ACTIVATIONS = ("sigmoid", "tanh", "relu", "leaky_relu", "hardtanh", "elu", "softplus", "silu", "gelu")


def _rows(name, case="", shape=SHAPE, kinds=HARD, **arguments):
    """A row for each kind of input."""
    return [Row(name, f"{kind} {case}".strip(), input=Maker(draw, shape), **arguments) for kind, draw in kinds.items()]


def _labels(count=SHAPE[1], rows=SHAPE[0]):
    return Maker(partial(_class, count=count), (rows,), (), fixed=True)


def _pointwise():
    for name in ACTIVATIONS:
        yield from _rows(name)
    yield from _rows("gelu", "approximate tanh", approximate="tanh")
    yield from _rows("softplus", "beta 2.0", beta=2.0, threshold=15.0)
    yield from _rows("dropout", "p 0.3", p=0.3)


def _linear():
    affine = {"shape": (8, 33), "weight": normal(5, 33), "bias": normal(5)}
    values = {
        "leaky_relu": {"negative_slope": 0.01},
        "hardtanh": {"min_val": -1.0, "max_val": 1.0},
        "elu": {"alpha": 1.0},
        "softplus": {"beta": 1.0, "threshold": 20.0},
    }
    yield from _rows("linear", **affine)
    for name in ACTIVATIONS:
        yield from _rows(f"linear_{name}", **affine, **values.get(name, {}))
    mixed = {"input": (8, 33), "weight": (5, 33), "bias": (5,)}
    yield Row("linear", "scales everywhere", **{k: Maker(_scales, shape) for k, shape in mixed.items()})
    yield Row("linear", "many examples", input=normal(MANY, 5), weight=normal(3, 5), bias=normal(3))


def _normalised():
    options = {"kinds": STANDARDISED, "running_mean": None, "running_var": None, "training": True}
    many = {"normal": _normal, "beside 1e2": STANDARDISED["beside 1e2"]}
    for shape in ((32, 5), (4, 5, 6)):
        yield from _rows("batch_norm", f"{shape}", shape, **options, weight=normal(5), bias=normal(5))
    options["kinds"] = many
    yield from _rows("batch_norm", "many examples", (MANY, 5), **options, weight=normal(5), bias=normal(5))
    running = {"running_mean": fixed(normal(5)), "running_var": fixed(Maker(partial(_between, low=0, high=1e-5), (5,)))}
    yield from _rows("batch_norm", "evaluation", (32, 5), STANDARDISED, **running, weight=normal(5), bias=normal(5))
    for count in (33, 1024):
        options = {"normalized_shape": (count,), "weight": normal(count), "bias": normal(count)}
        yield from _rows("layer_norm", f"{count}", (8, count), STANDARDISED, **options)
    options = {"normalized_shape": (5,), "weight": normal(5), "bias": normal(5)}
    yield from _rows("layer_norm", "many examples", (MANY, 5), many, **options)
    following = {"following": normal(3, 5), "following_bias": normal(3)}
    for name in ("batch_norm_relu", "batch_norm_gelu"):
        yield from _rows(name, "", (32, 5), STANDARDISED, weight=normal(5), bias=normal(5), **following)


def _over_classes():
    some = {"normal": _normal, "above": HARD["above"]}  # of 4096 numbers of all scales one outshines the rest
    for name in ("softmax", "log_softmax"):
        yield from _rows(name, dim=1)
        yield from _rows(name, "many", (4, MANY), some, dim=1)
        yield from _rows(name, "many first", (MANY, 4), some, dim=0)
    weight, labels = fixed(unit(SHAPE[1])), _labels()
    for name in ("nll_loss", "cross_entropy"):
        yield from _rows(name, "none", target=labels, reduction="none")
        yield from _rows(name, "weight mean", target=labels, weight=weight)
        yield from _rows(name, "many weight", (4, MANY), some, target=_labels(MANY, 4), weight=fixed(unit(MANY)))
        yield from _rows(name, "many examples", (MANY, 4), some, target=_labels(4, MANY))
    for reduction in ("none", "mean"):
        options = {"target": _labels(1), "reduction": reduction}
        yield from _rows("cross_entropy", f"and right {reduction}", kinds={"confident": _confident}, **options)
    yield from _rows("cross_entropy", "smoothing", target=labels, label_smoothing=0.1)
    yield from _rows("cross_entropy", "weight smoothing", target=labels, weight=weight, label_smoothing=0.1)
    shares = Maker(_shares, SHAPE)
    yield from _rows("cross_entropy", "probabilities", target=shares, reduction="none")
    more = {"weight": unit(SHAPE[1]), "label_smoothing": 0.1}
    yield from _rows("cross_entropy", "probabilities weight smoothing", target=shares, **more)
    yield from _rows("cross_entropy", "many", (4, MANY), some, target=_labels(MANY, 4), label_smoothing=0.1)
    yield from _rows("cross_entropy", "many probabilities", (4, MANY), some, target=Maker(_shares, (4, MANY)))
    yield from _rows("cross_entropy", "many of both", (64, MANY), some, target=_labels(MANY, 64))


def _elementwise():
    for reduction in ("none", "mean"):
        for kind, draw in HARD.items():
            both = {k: Maker(draw, SHAPE) for k in ("input", "target")}
            yield Row("mse_loss", f"{kind} {reduction}", **both, reduction=reduction)
        for kind, target in {"": unit(*SHAPE), " target too": Maker(_near_certain, SHAPE)}.items():
            probabilities = {"input": Maker(_near_certain, SHAPE), "target": target}
            yield Row("binary_cross_entropy", f"near certain{kind} {reduction}", **probabilities, reduction=reduction)
        weights = {"weight": fixed(unit(SHAPE[1])), "pos_weight": fixed(unit(SHAPE[1]))}
        for case, options in {reduction: {}, f"weights {reduction}": weights}.items():
            options = {"target": unit(*SHAPE), "reduction": reduction, **options}
            yield from _rows("binary_cross_entropy_with_logits", case, **options)
    for kind, draw in HARD.items():
        yield Row("half_mse_loss", kind, input=Maker(draw, SHAPE), target=Maker(draw, SHAPE))
    for name in ("mse_loss", "binary_cross_entropy_with_logits"):
        yield Row(name, "many examples", input=normal(MANY, 3), target=unit(MANY, 3))
    yield Row("binary_cross_entropy", "many examples", input=unit(MANY, 3), target=unit(MANY, 3))


def _far_losses():
    """Every case of the tables that has weights, smoothing and what is ignored in it, far from zero."""
    for row in ROWS:
        if row.name in ("nll_loss", "cross_entropy", "binary_cross_entropy_with_logits") and not row.empty:
            far = replace(row.arguments["input"], draw=_far)
            yield Row(row.name, f"{row.id.removeprefix(f'{row.name}-')} far", **row.arguments | {"input": far})


def _one_sided():
    """What comes from above has a large part in common, which the derivative takes away."""
    in_training = {"running_mean": None, "running_var": None, "training": True}
    for name, shape, options in (
        ("softmax", SHAPE, {"dim": 1}),
        ("log_softmax", SHAPE, {"dim": 1}),
        ("batch_norm", (32, 5), {**in_training, "weight": normal(5), "bias": normal(5)}),
        ("layer_norm", (8, 33), {"normalized_shape": (33,)}),
    ):
        for row in _rows(name, "from above", shape, {"beside 1e2": _normal}, **options):
            row.upstream = partial(_normal, mean=100.0)
            yield row


HOSTILE = [
    *_pointwise(),
    *_linear(),
    *_normalised(),
    *_over_classes(),
    *_elementwise(),
    *_far_losses(),
    *_one_sided(),
]
