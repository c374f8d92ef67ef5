"""Two processes that each see half of the batch read what one reads that sees all of it."""

from functools import partial

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests import processes
from torch_bp import nn, optim, watch

CASES = {}
cases = partial(processes.cases, CASES)
X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(2))
ALWAYS = {"every": 1, "budget": None, "level": "full"}


def train(model, x, y, output=None):
    loss_fn, optimizer = nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, output, loss_fn=loss_fn, **ALWAYS) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    return monitor.last


@cases()
def readings_of_all_processes(rank):
    def model():
        torch.manual_seed(0)
        return nn.MLP([5, 8, 7, 3]).double()

    mine = slice(6 * rank, 6 * rank + 6)
    folder = processes.folder / "logs"
    found = train(DistributedDataParallel(model()), X[mine], Y[mine], folder)
    expected = train(model(), X, Y)
    assert found.loss == pytest.approx(expected.loss)
    assert found.grad_norm == pytest.approx(expected.grad_norm)
    assert found.per_example.mean == pytest.approx(expected.per_example.mean)
    assert found.noise_scale == pytest.approx(expected.noise_scale)
    assert list(found.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        other = found.layers[name]
        assert (other.forward, other.dead_units) == (layer.forward, layer.dead_units)
        for field in (
            "signal_norm",
            "signal_ratio",
            "weight_factor",
            "derivative_factor",
            "activation_var",
            "update_ratio",
        ):
            value = getattr(layer, field)
            assert getattr(other, field) == (None if value is None else pytest.approx(value)), field
    torch.distributed.barrier()
    assert len(list(folder.glob("events*"))) == 1


def test_two_processes(tmp_path):
    processes.run(__name__, tmp_path)
