"""C5: one operation, forward and backward, in float32, against torch's own."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as theirs

import torch_bp.nn.functional as ours
from tests.benchmarks.protocol import Result, paired

SIZES = {"1 element": ((1, 1), 1.5), "128x512": ((128, 512), 1.3), "1024x1024": ((1024, 1024), 1.05)}


def _pointwise(name: str) -> Callable:
    return lambda f, x, t: getattr(f, name)(x)


OPERATIONS: dict[str, Callable] = {
    **{name: _pointwise(name) for name in ("sigmoid", "tanh", "relu", "leaky_relu")},
    "softmax": lambda f, x, t: f.softmax(x, dim=1),
    "log_softmax": lambda f, x, t: f.log_softmax(x, dim=1),
    "linear": lambda f, x, t: f.linear(x, t["weight"], t["bias"]),
    "mse_loss": lambda f, x, t: f.mse_loss(x, t["uniform"]),
    "binary_cross_entropy": lambda f, x, t: f.binary_cross_entropy(t["probability"], t["uniform"]),
    "binary_cross_entropy_with_logits": lambda f, x, t: f.binary_cross_entropy_with_logits(x, t["uniform"]),
    "nll_loss": lambda f, x, t: f.nll_loss(x, t["label"]),
    "cross_entropy": lambda f, x, t: f.cross_entropy(x, t["label"]),
}


def _tensors(shape: tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    rows, columns = shape
    return torch.randn(shape, requires_grad=True), {
        "weight": torch.randn(columns, columns, requires_grad=True),
        "bias": torch.randn(columns, requires_grad=True),
        "uniform": torch.rand(shape),
        "probability": torch.rand(shape).requires_grad_(),
        "label": torch.randint(columns, (rows,)),
    }


def measure(group: str = "C5") -> Iterator[Result]:
    """Yield the ratio for each operation and size; torch has one setting here."""
    for what, call in OPERATIONS.items():
        for workload, (shape, target) in SIZES.items():
            x, t = _tensors(shape)
            inputs = [x] if what != "linear" else [x, t["weight"], t["bias"]]
            inputs = [t["probability"]] if what == "binary_cross_entropy" else inputs
            upstream = torch.randn_like(call(theirs, x, t))

            def run(library, call=call, x=x, t=t, inputs=inputs, upstream=upstream):
                return torch.autograd.grad(call(library, x, t), inputs, upstream)

            for a, b in zip(run(ours), run(theirs)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            yield Result(group, what, workload, "torch", *paired(lambda: run(ours), lambda: run(theirs)), target)
