"""C9 and G4: a whole training step of wide layers over its bare matrix products, which nothing can spare.

Step: forward through linear layers with ReLU between, mean squared error, backward, Adam. Bare: each layer's three
products (forward, weight gradient, input gradient; the first layer needs no input gradient) into memory that is there.
A step here goes through autograd, where torch_bp has no target of its own on the CPU.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

import torch_bp.nn
import torch_bp.optim
from tests.benchmarks.network import HALF, batch, perceptron
from tests.benchmarks.protocol import Result, agree, few, paired

# Layers, width, batch, device, dtype; targets of ours against the bare products and against torch's default.
WORKLOADS = {
    "C9": ((4, 2048, 1024, "cpu", torch.float32), (None, None)),
    "G4": ((4, 4096, 8192, "cuda", torch.bfloat16), (1.08, 0.93)),
}
SETTINGS = {"torch": {}, "torch, fused Adam": {"fused": True}}


def products(widths: Sequence[int], count: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable:
    """Return a function that multiplies all matrices of a step, and returns the weight gradients.

    They are those of linear layers without biases and activations, whose error signal is the output itself.
    """
    x, _ = batch(count, widths, device, dtype)
    weights = [layer.weight.detach() for layer in perceptron(torch.nn, widths, device, dtype)[::2]]
    z = [torch.empty(count, width, device=device, dtype=dtype) for width in widths[1:]]
    dz = [torch.empty_like(t) for t in z[:-1]]
    dw = [torch.empty_like(w) for w in weights]

    def run():
        a = x
        for weight, out in zip(weights, z):
            a = torch.mm(a, weight.t(), out=out)
        signal = a
        for layer in reversed(range(len(weights))):
            torch.mm(signal.t(), z[layer - 1] if layer else x, out=dw[layer])
            if layer:
                signal = torch.mm(signal, weights[layer], out=dz[layer - 1])
        return dw

    return run


def steps(
    widths: Sequence[int], count: int, device: str = "cpu", dtype: torch.dtype = torch.float32, loss: str = "MSELoss"
) -> dict:
    """Return functions that do one training step and return its loss: ours and torch's by setting."""
    x, y = batch(count, widths, device, dtype)
    if loss == "CrossEntropyLoss":
        y = y.argmax(1)

    def stepper(library, options):
        network, loss_fn = perceptron(library.nn, widths, device, dtype), getattr(library.nn, loss)()
        optimizer = library.optim.Adam(network.parameters(), **options)

        def run():
            optimizer.zero_grad()
            loss = loss_fn(network(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    return {"torch_bp": stepper(torch_bp, {})} | {name: stepper(torch, options) for name, options in SETTINGS.items()}


def check(runs: dict, tolerances: dict) -> None:
    """Raise unless the losses of three steps agree."""
    losses = {name: [run().clone() for _ in range(3)] for name, run in runs.items()}
    mine = losses.pop("torch_bp")
    for theirs in losses.values():
        agree(mine, theirs, **tolerances)


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the ratio of each step to the bare products, and of ours to torch's steps."""
    (layers, width, count, device, dtype), (bare_target, torch_target) = WORKLOADS[group]
    shape = (width,) * (layers + 1), count, device, dtype
    runs, bare = steps(*shape), products(*shape)
    check(runs, {} if dtype is torch.float32 else HALF)
    workload = f"{layers} layers of {width}, batch {count}, {str(dtype).removeprefix('torch.')}"
    pairs = few(pairs) if device == "cpu" else pairs
    for name, run in runs.items():
        target = bare_target if name == "torch_bp" else None
        yield Result(group, f"step, {name}", workload, "bare products", *paired(run, bare, pairs, device), target)
    mine = runs.pop("torch_bp")
    for name, run in runs.items():
        target = torch_target if name == "torch" else None
        yield Result(group, "step, torch_bp", workload, name, *paired(mine, run, pairs, device), target)
