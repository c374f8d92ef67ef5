"""C6: the affine map and its activation as one node, forward and backward, against torch's two operations."""

from collections.abc import Callable, Iterator

import torch

from tests.benchmarks.protocol import Result, agree, paired
from torch_bp import ops

ACTIVATIONS = ("relu", "tanh", "sigmoid")
SIZES = {"32x64->64": ((32, 64, 64), 1.10), "128x512->512": ((128, 512, 512), 1.0)}  # batch, inputs, outputs


def sides(name: str, sizes: tuple[int, int, int]) -> dict[str, Callable]:
    """Return functions that run forward and backward and return output and gradients: ours, torch's and compiled."""
    torch.manual_seed(0)
    batch, inputs, outputs = sizes
    x, upstream = torch.randn(batch, inputs, requires_grad=True), torch.randn(batch, outputs)
    layer = torch.nn.Linear(inputs, outputs)
    activation, fused = getattr(torch, name), ops.linear_activation(getattr(ops, name))

    def two(x, weight, bias):
        return activation(torch.nn.functional.linear(x, weight, bias))

    def run(function):
        output = function(x, layer.weight, layer.bias)
        return output, *torch.autograd.grad(output, (x, layer.weight, layer.bias), upstream)

    torch._dynamo.reset()  # or it takes a new size for a size that varies
    compiled = torch.compile(two)
    return {"ours": lambda: run(fused), "torch": lambda: run(two), "compiled": lambda: run(compiled)}


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the ratios for each activation and size to torch's two operations, and to the same compiled."""
    for name in ACTIVATIONS:
        for workload, (sizes, target) in SIZES.items():
            runs = sides(name, sizes)
            ours = runs.pop("ours")
            for peer, run in runs.items():
                agree(ours(), run())
                found = paired(ours, run, pairs)
                yield Result(group, f"linear_{name}", workload, peer, *found, target if peer == "torch" else None)
