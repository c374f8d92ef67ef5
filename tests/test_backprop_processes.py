"""`BackpropModule` in two processes over gloo on the CPU, under Lightning's DDPStrategy."""

import logging
import math
import os
from functools import partial

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import torch_bp
from tests import processes
from torch_bp import nn, optim
from torch_bp.lightning import BackpropModule, BackpropMonitor, DivergenceGuard
from torch_bp.optim import lr_scheduler

CASES = {}
cases = partial(processes.cases, CASES)
close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
numbers = torch.Generator().manual_seed(0)
X, Y = torch.randn(56, 6, generator=numbers), torch.randint(3, (56,), generator=numbers)


class Grads(Callback):
    """The gradients after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])


class Unused(torch.nn.Sequential):
    """Has a layer that no gradient is for."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.nobody = nn.Linear(2, 2)

    def forward(self, x):
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


def make(engine, norm=False, kind=torch.nn.Sequential):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), nn.Linear(8, 3)]
    return BackpropModule(
        kind(*layers),
        nn.CrossEntropyLoss(),
        partial(optim.Adam, lr=1e-2, weight_decay=0.1),
        partial(lr_scheduler.OneCycleLR, max_lr=0.05),
        engine=engine,
        metrics={"accuracy": partial(MulticlassAccuracy, num_classes=3, validate_args=False)},
    )


def fit(module, rank, together=None, **options):
    """Train on all rows, 8 for each step: in one process, or 4 of them on each rank, where `together` has options."""
    grads = Grads()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    given = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "callbacks": [grads],
        "use_distributed_sampler": False,  # which would shuffle
    }
    if together is not None:
        os.environ["LOCAL_RANK"] = str(rank)  # the processes are there already
        strategy = DDPStrategy(cluster_environment=LightningEnvironment(), **together)
        given |= {"strategy": strategy, "devices": processes.WORLD}
    trainer = Trainer(**given | options)
    rows = 4 if together is not None else 8
    loaders = []
    for last in (52, 56):
        data = TensorDataset(X[:last], Y[:last])
        sampler = None if together is None else DistributedSampler(data, processes.WORLD, rank, shuffle=False)
        loaders.append(DataLoader(data, rows, sampler=sampler))
    trainer.fit(module, *loaders)
    return grads.seen, {name: value.item() for name, value in trainer.callback_metrics.items()}


def alike_everywhere(tensors):
    mine = torch.cat([tensor.detach().flatten() for tensor in tensors])
    others = [torch.empty_like(mine) for _ in range(processes.WORLD)]
    distributed.all_gather(others, mine)
    return all(torch.equal(other, mine) for other in others)


@cases(
    plain={},
    accumulated={"accumulate_grad_batches": 3},
    clipped={"gradient_clip_val": 0.1, "accumulate_grad_batches": 3},
    value={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
)
def as_one_process(options, rank):
    alone, together = make("step"), make("step")
    _, expected = fit(alone, rank, **options)
    grads, found = fit(together, rank, {}, **options)
    close(together.state_dict(), alone.state_dict())
    assert found == pytest.approx(expected, rel=1e-5)
    assert alike_everywhere(together.parameters())
    talks = [number + 1 for number, each in enumerate(grads) if alike_everywhere(each)]
    window = options.get("accumulate_grad_batches", 1)
    assert talks == [e * 7 + b for e in range(2) for b in range(1, 8) if b % window == 0 or b == 7]


@cases(
    plain={},
    unused={"find_unused_parameters": True},
    static={"static_graph": True},
    views={"gradient_as_bucket_view": True},
)
def as_by_autograd(together, rank):
    """With batch statistics, those of the first rank, and parameters without gradients."""
    kind = Unused if "find_unused_parameters" in together else torch.nn.Sequential
    runs = []
    for engine in ("autograd", "step"):
        module = make(engine, norm=True, kind=kind)
        grads, metrics = fit(module, rank, together, accumulate_grad_batches=1 if "static_graph" in together else 2)
        runs.append([grads[-1], metrics, module.state_dict()])
    close(*runs, rtol=1e-5, atol=1e-5)
    assert alike_everywhere(module.parameters())
    assert kind is not Unused or all(p.grad is None for p in module.model.nobody.parameters())


@cases(plain={}, accumulated={"accumulate_grad_batches": 2})
def a_monitor_reads_the_same_of_each_engine(options, rank):
    readings = []
    for engine in ("autograd", "step"):
        callback = BackpropMonitor(every=1, budget=None, silent=True)
        fit(make(engine), rank, {}, callbacks=[callback], max_epochs=1, limit_train_batches=4, **options)
        readings.append(callback.monitor.readings)
    assert len(readings[0]) == len(readings[1]) == 4 // options.get("accumulate_grad_batches", 1)
    for one, other in zip(*readings):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        for name, layer in one.layers.items():
            assert other.layers[name].signal_norm == pytest.approx(layer.signal_norm, rel=1e-5), name
            assert other.layers[name].forward == layer.forward


class OneBad(Callback):
    """In one step the loss of one process is NaN."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            batch[0].fill_(math.nan)


@cases(autograd="autograd", step="step")
def all_go_back_where_one_diverges(engine, rank):
    guard = DivergenceGuard(every=2, trust=1, keep=2)
    module = make(engine)
    fit(module, rank, {}, callbacks=[OneBad(1, 5), guard])
    assert [(event.reason, event.action) for event in guard.events] == [("loss", "rollback")]
    events = [None] * processes.WORLD
    distributed.all_gather_object(events, [(e.step, e.back_to, e.factor) for e in guard.events])
    assert events[0] == events[1] == [(6, 4, 0.5)]
    assert alike_everywhere(module.parameters())
    assert all(p.isfinite().all() for p in module.parameters())
    rates = [None] * processes.WORLD
    distributed.all_gather_object(rates, module.trainer.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == rates[1]


@cases()
def a_guard_of_a_plain_loop_is_given_the_mean(rank):
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    guard = torch_bp.DivergenceGuard(model, optimizer, every=2, trust=1, keep=2)
    for step in range(8):
        x = X[rank::2] * (math.nan if step == 5 and rank == 1 else 1)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), Y[rank::2])
        loss.backward()
        mean = loss.detach() / processes.WORLD
        distributed.all_reduce(mean)
        assert guard.step(mean) == (step != 5)
    assert [(event.step, event.back_to) for event in guard.events] == [(6, 4)]
    assert alike_everywhere(model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())


@cases()
def hooks_are_refused(rank):
    module = make("step")
    module.model[0].weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(RuntimeError, match="parameters must have no hooks for engine='step' in several processes"):
        fit(module, rank, {})


def test_two_processes(tmp_path):
    processes.run(__name__, tmp_path, seconds=120)
