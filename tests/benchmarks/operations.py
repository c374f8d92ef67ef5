"""C5: one operation, forward and backward, in float32, against torch's own."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as theirs

import torch_bp.nn.functional as ours
from tests.benchmarks.protocol import Result, agree, paired

SIZES = {"1 element": ((1, 1), 1.5), "128x512": ((128, 512), 1.3), "1024x1024": ((1024, 1024), 1.05)}
# One value has no variance, and with two the gradient is nothing but rounding.
SMALLEST = {"batch_norm": (4, 1), "layer_norm": (1, 4)}


def _pointwise(name: str) -> Callable:
    return lambda f, x, t: getattr(f, name)(x)


def _batch_norm(f, x, t):
    return f.batch_norm(x, t["running_mean"], t["running_var"], t["scale"], t["bias"], training=True)


OPERATIONS: dict[str, Callable] = {
    **{name: _pointwise(name) for name in ("sigmoid", "tanh", "relu", "leaky_relu")},
    **{name: _pointwise(name) for name in ("gelu", "silu", "elu", "softplus", "hardtanh", "dropout")},
    "softmax": lambda f, x, t: f.softmax(x, dim=1),
    "log_softmax": lambda f, x, t: f.log_softmax(x, dim=1),
    "linear": lambda f, x, t: f.linear(x, t["weight"], t["bias"]),
    "batch_norm": _batch_norm,
    "layer_norm": lambda f, x, t: f.layer_norm(x, x.shape[1:], t["scale"], t["bias"]),
    "mse_loss": lambda f, x, t: f.mse_loss(x, t["uniform"]),
    "binary_cross_entropy": lambda f, x, t: f.binary_cross_entropy(t["probability"], t["uniform"]),
    "binary_cross_entropy_with_logits": lambda f, x, t: f.binary_cross_entropy_with_logits(x, t["uniform"]),
    "nll_loss": lambda f, x, t: f.nll_loss(x, t["label"]),
    "cross_entropy": lambda f, x, t: f.cross_entropy(x, t["label"]),
}
DIFFERENTIATED = {  # by what, where it is not the input alone
    "linear": ("input", "weight", "bias"),
    "batch_norm": ("input", "scale", "bias"),
    "layer_norm": ("input", "scale", "bias"),
    "binary_cross_entropy": ("probability",),
}


def _tensors(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    rows, columns = shape
    return {
        "input": torch.randn(shape, requires_grad=True),
        "weight": torch.randn(columns, columns, requires_grad=True),
        "bias": torch.randn(columns, requires_grad=True),
        "scale": torch.rand(columns, requires_grad=True),
        "running_mean": torch.zeros(columns),
        "running_var": torch.ones(columns),
        "uniform": torch.rand(shape),
        "probability": torch.rand(shape).requires_grad_(),
        "label": torch.randint(columns, (rows,)),
    }


def sides(what: str, shape: tuple[int, int]) -> tuple[Callable, Callable]:
    """Return ours and torch's: functions that run an operation forward and backward and return output and gradients."""
    call, t = OPERATIONS[what], _tensors(shape)
    inputs = [t[name] for name in DIFFERENTIATED.get(what, ("input",))]
    upstream = torch.randn_like(call(theirs, t["input"], t))

    def run(library):
        output = call(library, t["input"], t)
        return output, *torch.autograd.grad(output, inputs, upstream)

    return lambda: run(ours), lambda: run(theirs)


def check(mine: Callable, peer: Callable) -> None:
    """Raise unless both agree, dropout by the same random numbers."""
    results = []
    for run in (mine, peer):
        torch.manual_seed(1)
        results.append(run())
    agree(*results)


def sizes(what: str) -> Iterator[tuple[str, tuple[int, int], float]]:
    """Yield the name, the shape and the target of each size of an operation."""
    for workload, (shape, target) in SIZES.items():
        if workload == "1 element" and what in SMALLEST:
            workload, shape = "4 elements", SMALLEST[what]
        yield workload, shape, target


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the ratio for each operation and size; torch has one setting here."""
    for what in OPERATIONS:
        for workload, shape, target in sizes(what):
            mine, peer = sides(what, shape)
            check(mine, peer)
            yield Result(group, what, workload, "torch", *paired(mine, peer, pairs), target)
