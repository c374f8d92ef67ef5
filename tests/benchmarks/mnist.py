"""An epoch of MNIST: 60000 images in batches of 128, a perceptron 784-1000-500-100-10, cross-entropy, Adam.

Ours is `TrainStep.epoch`. Torch's are a loop over a shuffled data set in memory, with Adam as it is and fused, and the
loop that most people write, over a `DataLoader`. The images are where `--mnist` says, in the files of their authors.
"""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import torch_bp.nn
import torch_bp.optim
from tests.benchmarks.network import perceptron
from tests.benchmarks.protocol import Result, few, paired
from torch_bp import TrainStep

WIDTHS, BATCH = (784, 1000, 500, 100, 10), 128
FOLDER = Path("../shared/data/mnist")


def read(path: Path) -> torch.Tensor:
    """Return the array of a compressed IDX file: two zeros, the type, the number of dimensions, sizes, and elements."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    sizes = np.frombuffer(data, ">i4", dimensions, 4)
    return torch.from_numpy(np.frombuffer(data, np.uint8, -1, 4 + 4 * dimensions).reshape(sizes).copy())


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training images, in 0 to 1, and their classes."""
    if not FOLDER.is_dir():
        raise SystemExit(f"benchmark epoch: MNIST must be in {FOLDER}, got no such folder; put the four files there.")
    x = read(FOLDER / "train-images-idx3-ubyte.gz").flatten(1) / 255
    return x, read(FOLDER / "train-labels-idx1-ubyte.gz").long()


def sides(x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return functions that train for one epoch more and return the mean loss."""
    network = perceptron(torch_bp.nn, WIDTHS)
    step = TrainStep(network, torch_bp.nn.CrossEntropyLoss(), torch_bp.optim.Adam(network.parameters()))

    def indexed() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in torch.randperm(len(x)).split(BATCH):
            yield x[part], y[part]

    def loaded() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        dataset = torch.utils.data.TensorDataset(x, y)
        yield from torch.utils.data.DataLoader(dataset, BATCH, shuffle=True)

    def loop(batches: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]], fused: bool) -> Callable:
        network, loss_fn = perceptron(torch.nn, WIDTHS), torch.nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(network.parameters(), fused=fused or None)

        def run() -> torch.Tensor:
            losses = []
            for inputs, targets in batches():
                optimizer.zero_grad()
                loss = loss_fn(network(inputs), targets)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return torch.stack(losses).mean()

        return run

    return {
        "torch_bp": lambda: step.epoch([x, y], BATCH).mean(),
        "torch": loop(indexed, False),
        "torch, fused Adam": loop(indexed, True),
        "torch, DataLoader": loop(loaded, False),
    }


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield seconds of an epoch: ours, and torch's by setting."""
    runs = sides(*data())
    mine = runs.pop("torch_bp")
    for name, run in runs.items():
        *ratios, ours, theirs = paired(mine, run, few(pairs) // 2 or 1)
        yield Result(group, "epoch", "MNIST, batch 128", name, *ratios, ours / 1e6, theirs / 1e6, unit="s")
