"""guard: a training loop with `DivergenceGuard` over the same loop without it, its snapshots included.

A step: forward through linear layers with ReLU between, cross-entropy, backward, Adam; 100 of them, in which one
snapshot is taken, by default. Losses and gradients are looked at in every step.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

import torch_bp
from tests.benchmarks.loops import WORKLOADS
from tests.benchmarks.network import perceptron
from tests.benchmarks.protocol import Result, agree, counted, few, paired
from tests.benchmarks.train_step import data

STEPS = 100
SIZES = {name: WORKLOADS[name] for name in ("784-1000-500-100-10, batch 128", "64-32-10, batch 32")}
TARGETS = dict(zip(SIZES, (1.02, None)))
LOOPS = ("autograd", "TrainStep")


def sides(widths: Sequence[int], count: int, loop: str) -> tuple[Callable, Callable, torch_bp.DivergenceGuard]:
    """Return functions that do `STEPS` steps and return the parameters, with the guard and without, and the guard."""
    x, y = data(widths, count)

    def stepper(guarded: bool) -> tuple[Callable, torch_bp.DivergenceGuard]:
        network, loss_fn = perceptron(torch_bp.nn, widths), torch_bp.nn.CrossEntropyLoss()
        optimizer = torch_bp.optim.Adam(network.parameters(), lr=1e-5)
        step = torch_bp.TrainStep(network, loss_fn, optimizer)
        guard = torch_bp.DivergenceGuard(network, optimizer)

        def by_autograd() -> list[torch.Tensor]:
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss = loss_fn(network(x), y)
                loss.backward()
                if guarded:
                    guard.step(loss)
                else:
                    optimizer.step()
            return list(network.parameters())

        def by_train_step() -> list[torch.Tensor]:
            for _ in range(STEPS):
                if guarded:
                    guard.call(step, x, y)
                else:
                    step(x, y)
            return list(network.parameters())

        return by_autograd if loop == "autograd" else by_train_step, guard

    (ours, guard), (peer, _) = stepper(True), stepper(False)
    return ours, peer, guard


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the ratio of times for each network and loop, and the memory of the snapshots over that of the run."""
    for workload, (widths, count) in SIZES.items():
        for loop in LOOPS:
            ours, peer, guard = sides(widths, count, loop)
            agree(ours(), peer(), rtol=0, atol=0)
            large = max(widths) >= 1000
            found = paired(ours, peer, few(pairs) if large else pairs)
            assert not guard.events, guard.events
            yield Result(group, f"{STEPS} steps, {loop}", workload, "no guard", *found, TARGETS[workload])
        run = 3 * sum(p.numel() * p.element_size() for p in ours())  # with two moments
        kept = sum(guard.memory().values())
        yield Result(group, "memory of the snapshots", workload, "model and Adam", *counted(kept, run), None, "bytes")
