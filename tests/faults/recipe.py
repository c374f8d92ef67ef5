"""A training run as data: what a fault changes is one of its fields."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

import torch_bp


@functools.cache
def digits():
    """Training and validation images, in -1..1 or so, and labels."""
    x, y = load_digits(return_X_y=True)
    return split(standardized(torch.tensor(x, dtype=torch.float32) / 16, each=False), torch.tensor(y))


@functools.cache
def diabetes():
    """Regression, standardized."""
    x, y = (torch.tensor(t, dtype=torch.float32) for t in load_diabetes(return_X_y=True))
    return split(standardized(x), standardized(y[:, None]))


@functools.cache
def blobs(classes=4, features=20, examples=6000):
    """Synthetic classes that overlap a little."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(classes, (examples,), generator=generator)
    centers = torch.randn(classes, features, generator=generator)
    return split(standardized(centers[y] + torch.randn(examples, features, generator=generator)), y)


@functools.cache
def sines(features=8, examples=6000):
    """Synthetic regression with noise."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(examples, features, generator=generator)
    y = x.sin().sum(1, keepdim=True) + 0.3 * torch.randn(examples, 1, generator=generator)
    return split(x, standardized(y))


def standardized(x, each=True):
    mean, std = (x.mean(0), x.std(0)) if each else (x.mean(), x.std())
    return (x - mean) / std


def split(x, y):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, valid = order[: len(x) * 4 // 5], order[len(x) * 4 // 5 :]
    return x[train], y[train], x[valid], y[valid]


def mlp(widths, activation=nn.ReLU, norm=False, init=None, last=None):
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out)]
        if norm and len(layers) < 3 * (len(widths) - 2):
            layers += [nn.BatchNorm1d(fan_out)]
        layers += [activation()]
    layers[-1:] = [last] if last is not None else []
    model = nn.Sequential(*layers)
    if init is not None:
        for module in model:
            if isinstance(module, nn.Linear):
                init(module.weight)
                nn.init.zeros_(module.bias)
    return model


def as_it_is(x, y):
    return x, y


@dataclass
class Recipe:
    """A healthy run on digits, unless a field says otherwise.

    Attributes:
        batch_of: changes a batch before it is used; `data_of` changes the whole of the training data.
        prepare: changes the model, once.
        parameters: those the optimizer gets.
    """

    data: Callable[[], Any] = digits
    widths: tuple[int, ...] = (64, 64, 32, 10)
    activation: Callable[[], nn.Module] = nn.ReLU
    norm: bool = False
    init: Any = nn.init.kaiming_normal_
    last: Callable[[], nn.Module] | None = None
    loss: Callable[..., Any] = field(default_factory=nn.CrossEntropyLoss)
    optimizer: Callable[..., Any] = torch.optim.Adam
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-3})
    batch: int = 32
    steps: int = 60
    seed: int = 0
    shuffle: bool = True
    zero_grad: bool = True
    clip: float | None = None
    batch_of: Callable[..., Any] = as_it_is
    data_of: Callable[..., Any] = as_it_is
    prepare: Callable[[nn.Sequential], None] = lambda model: None
    parameters: Callable[[nn.Sequential], Any] = lambda model: model.parameters()

    def model(self):
        torch.manual_seed(self.seed)
        model = mlp(self.widths, self.activation, self.norm, self.init, self.last and self.last())
        self.prepare(model)
        return model

    def batches(self):
        """Batches without end; the data in another order each epoch, or the same."""
        x, y = self.data_of(*self.data()[:2])
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(x), generator=generator) if self.shuffle else torch.arange(len(x))
            for chosen in order.split(self.batch)[: max(1, len(x) // self.batch)]:
                yield self.batch_of(x[chosen], y[chosen])

    def watched(self, level="full", every=1, output=None):
        """Train as users do, and return the readings and the verdicts of `torch_bp.watch`."""
        model = self.model()
        optimizer = self.optimizer(self.parameters(model), **self.options)
        *_, valid_x, valid_y = self.data()
        loss_fn = self.loss if isinstance(self.loss, nn.Module) else None
        options = {"level": level, "every": every, "budget": None, "keep": self.steps, "silent": True}
        with torch_bp.watch(model, optimizer, output, loss_fn=loss_fn, **options) as monitor:
            for step, (x, y) in zip(range(self.steps), self.batches()):
                if self.zero_grad:
                    optimizer.zero_grad()
                loss = self.loss(model(x), y)
                if loss_fn is None:
                    monitor.loss(loss)
                if step % 20 == 19:
                    self._validate(model, valid_x, valid_y)
                loss.backward()
                if self.clip is not None:
                    monitor.clipped(nn.utils.clip_grad_norm_(model.parameters(), self.clip), self.clip)
                optimizer.step()
        return monitor.readings, monitor.findings

    def _validate(self, model, x, y):
        model.eval()
        with torch.no_grad():
            loss = self.loss(model(x), y)
        model.train()
        return float(loss)
