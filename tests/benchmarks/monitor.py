"""C10: what watching costs: a step with Adam, each recorded and every 50th written, over one unwatched.

Through autograd in a loop, and by `TrainStep`.

Scalars are level "summary": loss, norms of gradients, weights, updates and error signals, counts of what is not finite;
written to TensorBoard. Beside them: the norms of single examples' gradients and the noise scale; level "layers"; and
the cadence that `watch` has if nothing is said.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

import torch_bp
import torch_bp.nn
import torch_bp.optim
from tests.benchmarks.network import batch, perceptron
from tests.benchmarks.protocol import Result, paired
from torch_bp import watch

WIDTHS, COUNT = (784, 1000, 500, 100, 10), 128
EACH: dict[str, Any] = {"every": 1, "budget": None, "write_every": 50}
SETTINGS: dict[str, tuple[dict[str, Any], float | None]] = {
    "scalars": ({"level": "summary", **EACH}, 1.03),
    "scalars, norms of examples, noise scale": ({"level": "summary", "per_example": True, **EACH}, 1.05),
    "layers": ({"level": "layers", **EACH}, None),
    "as it comes: layers, every 10th": ({}, None),
}


def stepper(explicit: bool) -> tuple[Callable[[], torch.Tensor], tuple[Any, ...], dict[str, Any]]:
    """Return a function that does one step, and what `watch` is given to watch it."""
    torch.manual_seed(0)
    x, y = batch(COUNT, WIDTHS)
    y = y.argmax(1)
    network, loss_fn = perceptron(torch_bp.nn, WIDTHS), torch_bp.nn.CrossEntropyLoss()
    optimizer = torch_bp.optim.Adam(network.parameters())
    if explicit:
        step = torch_bp.TrainStep(network, loss_fn, optimizer)
        return lambda: step(x, y), (step, None), {}

    def run() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_fn(network(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run, (network, optimizer), {"loss_fn": loss_fn}


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the ratio of a watched step to one that is not, for each setting."""
    for explicit in (True, False):
        for what, (options, target) in SETTINGS.items():
            watched, given, more = stepper(explicit)
            alone, *_ = stepper(explicit)
            with tempfile.TemporaryDirectory() as folder, watch(*given, folder, **more, **options):
                for _ in range(3):
                    torch.testing.assert_close(watched(), alone(), rtol=0, atol=0)
                found = paired(many(watched), many(alone), pairs)
                ratio, low, high, mine, peer = found
            what = f"{'TrainStep' if explicit else 'loop'}: {what}"
            workload = f"{'-'.join(map(str, WIDTHS))}, batch {COUNT}"
            yield Result(group, what, workload, "unwatched", ratio, low, high, mine / 50, peer / 50, target)


def many(step: Callable[[], object], count: int = 50) -> Callable[[], None]:
    """As many steps as there are from one that is written to the next."""

    def run() -> None:
        for _ in range(count):
            step()

    return run
