"""C3, C9, C12, G1 and G4: whole training steps by TrainStep, which has no autograd graph, against torch's loops.

A step: forward through linear layers with ReLU between, cross-entropy, backward, Adam. Torch's best are the same with
`fused=True`, and with the loss compiled besides; on CUDA also in the mode "reduce-overhead", with CUDA graphs.
"""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch

import torch_bp.nn
import torch_bp.optim
from tests.benchmarks import honesty, huge_pages
from tests.benchmarks.loops import WORKLOADS
from tests.benchmarks.memory import peak
from tests.benchmarks.network import HALF, batch, perceptron
from tests.benchmarks.protocol import Result, counted, few, paired
from torch_bp import TrainStep

# Against torch's default and against the faster of its best settings.
TARGETS = dict(zip(WORKLOADS, ((0.26, 0.38), (0.36, 0.52), (0.40, 0.75), (0.40, 0.66))))
GROWTH = (64, 128, 256, 512, 1024)  # widths of four layers, batch 256
WITHOUT_FAULTS = 0.90  # of torch's best on the large one, its page faults removed
BARE = {"C9": 1.10, "G4": 1.08}
ON_DEVICE = (0.17, 0.85)  # of torch's default, and of its best


def data(widths: Sequence[int], count: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and classes."""
    x, y = batch(count, widths, device)
    return x, y.argmax(1)


def sides(widths: Sequence[int], count: int, device: str = "cpu") -> dict[str, Callable[[], torch.Tensor]]:
    """Return functions that do one step and return its loss: ours, and torch's by setting."""
    x, y = data(widths, count, device)
    network = perceptron(torch_bp.nn, widths, device)
    step = TrainStep(network, torch_bp.nn.CrossEntropyLoss(), torch_bp.optim.Adam(network.parameters()))

    def stepper(fused: bool, mode: str | None) -> Callable[[], torch.Tensor]:
        network, loss_fn = perceptron(torch.nn, widths, device), torch.nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(network.parameters(), fused=fused or None)

        def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return loss_fn(network(x), y)

        compute = loss_of if mode is None else torch.compile(loss_of, mode=mode)

        def run() -> torch.Tensor:
            optimizer.zero_grad()
            loss = compute(x, y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    torch._dynamo.reset()
    runs = {
        "torch_bp": lambda: step(x, y),
        "torch": stepper(False, None),
        "torch, fused Adam": stepper(True, None),
        "torch, compiled loss, fused Adam": stepper(True, "default"),
    }
    if device == "cuda":
        runs["torch, compiled loss (reduce-overhead), fused Adam"] = stepper(True, "reduce-overhead")
    return runs


def measure_on_device(group: str, pairs: int) -> Iterator[Result]:
    """Yield G1: a captured step against torch's."""
    workload = "784-1000-500-100-10, batch 128"
    runs = sides(*WORKLOADS[workload], "cuda")
    honesty.check(runs, HALF)
    mine = runs.pop("torch_bp")
    results = {name: paired(mine, run, pairs, "cuda") for name, run in runs.items()}
    best = min((name for name in results if name != "torch"), key=lambda name: results[name][4])
    for name, found in results.items():
        target = dict(zip(("torch", best), ON_DEVICE)).get(name)
        yield Result(group, "step", workload, name, *found, target)


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
        for name in ("torch", best):
            found = paired(least(widths, count), runs[name], few(pairs) if large else pairs)
            yield Result(group, "bare products and update", workload, name, *found)
        if large and sys.platform == "linux":
            for name, found in huge_pages.compared(workload, few(pairs)).items():
                target = WITHOUT_FAULTS if name == best else None
                yield Result(group, "step, in large pages", workload, name, *found, target)
        for what, sizes in peaks(widths, count).items():
            yield Result(group, what, workload, "torch", *counted(*sizes), 1.0, "bytes")


def least(widths: Sequence[int], count: int) -> Callable[[], None]:
    """Return a function that does what no step can spare: the products, and an update of the parameters."""
    products = honesty.products(widths, count)
    network = perceptron(torch_bp.nn, widths)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    for layer, dw in zip(network[::2], products()):
        layer.weight.grad = dw
    optimizer = torch_bp.optim.Adam(network.parameters(), lr=1e-5)

    def run() -> None:
        products()
        optimizer.step()

    return run


def peaks(widths: Sequence[int], count: int) -> dict[str, tuple[int, int]]:
    """Return by name the bytes that a step takes beyond parameters, optimizer state and the batch: ours, and torch's.

    Ours are its buffers, which stay and hold the gradients too, and what it allocates on the way. The first step is
    captured.
    """
    theirs = peak(sides(widths, count)["torch"])
    x, y = data(widths, count)
    network = perceptron(torch_bp.nn, widths)
    optimizer, loss_fn = torch_bp.optim.Adam(network.parameters()), torch_bp.nn.CrossEntropyLoss()

    def first() -> None:
        for p in network.parameters():
            p.grad = None
        TrainStep(network, loss_fn, optimizer)(x, y)

    first()  # makes the optimizer's state
    step = TrainStep(network, loss_fn, optimizer)
    step(x, y)
    later = step.memory()["buffers"] + peak(lambda: step(x, y))
    return {"memory of a step": (later, theirs), "memory of the first step": (peak(first), theirs)}


def bare(group: str, pairs: int) -> Iterator[Result]:
    """Yield C9 or G4: a step of wide layers over its matrix products into memory that is there."""
    (layers, width, count, device, dtype), _ = honesty.WORKLOADS[group]
    widths = (width,) * (layers + 1)
    x, y = batch(count, widths, device, dtype)
    network = perceptron(torch_bp.nn, widths, device, dtype)
    step = TrainStep(network, torch_bp.nn.MSELoss(), torch_bp.optim.Adam(network.parameters()))
    products = honesty.products(widths, count, device, dtype)
    workload = f"{layers} layers of {width}, batch {count}, {str(dtype).removeprefix('torch.')}"
    found = paired(lambda: step(x, y), products, few(pairs), device)
    yield Result(group, "step, TrainStep", workload, "bare products", *found, BARE[group])


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
