"""C3, C9 and C12: whole training steps by TrainStep, which has no autograd graph, against torch's loops.

A step: forward through linear layers with ReLU between, cross-entropy, backward, Adam. Torch's best are the same with
`fused=True`, and with the loss compiled besides.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

import torch_bp.nn
import torch_bp.optim
from tests.benchmarks import honesty
from tests.benchmarks.loops import WORKLOADS
from tests.benchmarks.memory import peak
from tests.benchmarks.network import batch, perceptron
from tests.benchmarks.protocol import Result, counted, few, paired
from torch_bp import TrainStep

# Against torch's default and against the faster of its best settings.
TARGETS = dict(zip(WORKLOADS, ((0.26, 0.38), (0.36, 0.52), (0.40, 0.75), (0.40, 0.66))))
GROWTH = (64, 128, 256, 512, 1024)  # widths of four layers, batch 256
BARE = 1.10


def data(widths: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and classes."""
    x, y = batch(count, widths)
    return x, y.argmax(1)


def sides(widths: Sequence[int], count: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Return functions that do one step and return its loss: ours, and torch's by setting."""
    x, y = data(widths, count)
    network = perceptron(torch_bp.nn, widths)
    step = TrainStep(network, torch_bp.nn.CrossEntropyLoss(), torch_bp.optim.Adam(network.parameters()))

    def stepper(fused: bool, compiled: bool) -> Callable[[], torch.Tensor]:
        network, loss_fn = perceptron(torch.nn, widths), torch.nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(network.parameters(), fused=fused or None)

        def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return loss_fn(network(x), y)

        compute = torch.compile(loss_of) if compiled else loss_of

        def run() -> torch.Tensor:
            optimizer.zero_grad()
            loss = compute(x, y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    torch._dynamo.reset()
    return {
        "torch_bp": lambda: step(x, y),
        "torch": stepper(False, False),
        "torch, fused Adam": stepper(True, False),
        "torch, compiled loss, fused Adam": stepper(True, True),
    }


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield C3: for each network the ratios of times, and of memory at the peak of a step."""
    for workload, (widths, count) in WORKLOADS.items():
        runs = sides(widths, count)
        honesty.check(runs, {})
        mine, large = runs.pop("torch_bp"), max(widths) >= 1000
        results = {name: paired(mine, run, few(pairs) if large else pairs) for name, run in runs.items()}
        best = min((name for name in results if name != "torch"), key=lambda name: results[name][4])
        default_target, best_target = TARGETS[workload]
        for name, found in results.items():
            target = default_target if name == "torch" else best_target if name == best else None
            yield Result(group, "step", workload, name, *found, target)
        yield Result(group, "memory of a step", workload, "torch", *counted(*peaks(widths, count)), 1.0, "bytes")


def peaks(widths: Sequence[int], count: int) -> tuple[int, int]:
    """Return the bytes that a step takes beyond parameters, optimizer state and the batch: ours, and torch's.

    Ours are its buffers, which stay and hold the gradients too, and what it allocates on the way.
    """
    runs = sides(widths, count)
    x, y = data(widths, count)
    network = perceptron(torch_bp.nn, widths)
    step = TrainStep(network, torch_bp.nn.CrossEntropyLoss(), torch_bp.optim.Adam(network.parameters()))
    step(x, y)
    return step.memory()["buffers"] + peak(lambda: step(x, y)), peak(runs["torch"])


def bare(group: str, pairs: int) -> Iterator[Result]:
    """Yield C9: a step of wide layers over its matrix products into memory that is there."""
    (layers, width, count, _, _), _ = honesty.WORKLOADS[group]
    widths = (width,) * (layers + 1)
    x, y = batch(count, widths)
    network = perceptron(torch_bp.nn, widths)
    step = TrainStep(network, torch_bp.nn.MSELoss(), torch_bp.optim.Adam(network.parameters()))
    products = honesty.products(widths, count)
    workload = f"{layers} layers of {width}, batch {count}, float32"
    found = paired(lambda: step(x, y), products, few(pairs))
    yield Result(group, "step, TrainStep", workload, "bare products", *found, BARE)


def growth(group: str, pairs: int) -> Iterator[Result]:
    """Yield C12: time over (width^2) as the width doubles, each against the next; 1 is linear in the products."""
    for width in GROWTH[:-1]:
        runs = []
        for size in (width, 2 * width):
            x, y = data((size,) * 5, 256)
            network = perceptron(torch_bp.nn, (size,) * 5)
            step = TrainStep(network, torch_bp.nn.CrossEntropyLoss(), torch_bp.optim.Adam(network.parameters()))
            runs.append(lambda step=step, x=x, y=y: step(x, y))
        ratio, low, high, large, small = paired(runs[1], runs[0], few(pairs))
        workload = f"4 layers of {2 * width}, batch 256"
        yield Result(group, "growth", workload, f"four times of {width}", ratio / 4, low / 4, high / 4, large, small)
