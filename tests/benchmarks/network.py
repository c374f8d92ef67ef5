"""G2: forward and backward of a multilayer perceptron in bfloat16. Its parts serve other benchmarks of networks."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import ModuleType

import torch

import torch_bp.nn
from tests.benchmarks.protocol import Result, agree, paired

WIDTHS, BATCH, DEVICE, DTYPE = (480, 1024, 1024, 512, 256, 1), 1024, "cuda", torch.bfloat16
TARGETS = {"torch": 0.5, "best": 0.9}
HALF = {"rtol": 2e-2, "atol": 2e-2}  # bfloat16 has 8 bits, and compiled code rounds less often


def perceptron(
    nn: ModuleType, widths: Sequence[int], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """Return linear layers with ReLU between, from `torch_bp.nn` or `torch.nn`, with the same weights at every call."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(device, dtype)


def batch(
    count: int, widths: Sequence[int], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and a tensor like the outputs."""
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randn(count, width, generator=generator) for width in (widths[0], widths[-1]))
    x, y = (t.to(device, dtype) for t in drawn)
    return x, y


def sides(widths: Sequence[int], count: int, device: str, dtype: torch.dtype) -> dict[str, Callable]:
    """Return functions that run forward and backward and return outputs and the parameters' gradients."""
    x, upstream = batch(count, widths, device, dtype)

    def runner(network, call):
        parameters = list(network.parameters())

        def run():
            output = call(x)
            return output, *torch.autograd.grad(output, parameters, upstream)

        return run

    mine, theirs = (perceptron(nn, widths, device, dtype) for nn in (torch_bp.nn, torch.nn))
    torch._dynamo.reset()
    settings = {"compiled": torch.compile(theirs)}
    if device == "cuda":
        settings["reduce-overhead"] = torch.compile(theirs, mode="reduce-overhead")
    runs = {"ours": runner(mine, mine), "torch": runner(theirs, theirs)}
    return runs | {name: runner(theirs, call) for name, call in settings.items()}


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the ratio to torch's default and to the fastest of torch's settings."""
    runs = sides(WIDTHS, BATCH, DEVICE, DTYPE)
    mine, results = runs.pop("ours"), {}
    for peer, run in runs.items():
        agree(mine(), run(), **HALF)
        results[peer] = paired(mine, run, pairs, DEVICE)
    best = min((peer for peer in results if peer != "torch"), key=lambda peer: results[peer][4])
    workload = f"{'-'.join(map(str, WIDTHS))}, batch {BATCH}, {str(DTYPE).removeprefix('torch.')}"
    yield Result(group, "forward, backward", workload, "torch", *results["torch"], TARGETS["torch"])
    yield Result(group, "forward, backward", workload, f"best: {best}", *results[best], TARGETS["best"])
