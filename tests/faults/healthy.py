"""Healthy runs of every kind: widths, depths, activations, optimizers, usual rates, seeds, batch sizes."""

import random
from statistics import median

import torch
from torch import nn

from tests.faults.recipe import Recipe, blobs, diabetes, digits, sines

# The rates at which these optimizers are used; SGD's is the one for a network of this size.
RATES = {
    torch.optim.Adam: (3e-4, 5e-3),
    torch.optim.AdamW: (3e-4, 5e-3),
    torch.optim.RMSprop: (1e-4, 2e-3),
    torch.optim.Adagrad: (5e-3, 5e-2),
    torch.optim.SGD: (1e-2, 1e-1),
}
EPOCHS = 10  # at most: small data is soon learned by heart
DATA = {digits: (64, 10), blobs: (20, 4), diabetes: (10, 1), sines: (8, 1)}
INIT = {
    nn.ReLU: nn.init.kaiming_normal_,
    nn.LeakyReLU: nn.init.kaiming_normal_,
    nn.GELU: nn.init.kaiming_normal_,
    nn.SiLU: nn.init.kaiming_normal_,
    nn.Tanh: nn.init.xavier_uniform_,
    nn.Sigmoid: nn.init.xavier_uniform_,
    nn.ELU: nn.init.kaiming_normal_,
}


def learned(readings):
    """A run was healthy if its loss has fallen by a tenth: what is said of it has no part in this."""
    losses = [reading.loss for reading in readings]
    return median(losses[-20:]) < 0.9 * median(losses[:5])


def healthy(seed):
    """The recipe of one healthy run."""
    draw = random.Random(seed)
    data = draw.choice(list(DATA))
    features, outputs = DATA[data]
    activation = draw.choice(list(INIT))
    depth = draw.randint(1, 2 if activation is nn.Sigmoid else 5)
    optimizer = draw.choice(list(RATES))
    low, high = RATES[optimizer]
    options = {"lr": low * (high / low) ** draw.random()}
    if optimizer is torch.optim.SGD:
        options |= {"momentum": draw.choice([0.0, 0.9])}
        options["lr"] *= 0.3 if options["momentum"] else 1.0
        options["lr"] *= 0.3 if outputs == 1 else 1.0  # a squared error is steeper than a cross-entropy
        if activation is nn.Sigmoid:
            options["lr"] *= 3
    batch = draw.choice([16, 32, 64, 128])
    return Recipe(
        data=data,
        widths=(features, *(draw.choice([16, 32, 64, 128]) for _ in range(depth)), outputs),
        activation=activation,
        norm=draw.random() < 0.2,
        init=draw.choice([INIT[activation], None]) if depth < 4 else INIT[activation],
        loss=nn.CrossEntropyLoss() if outputs > 1 else draw.choice([nn.MSELoss, nn.SmoothL1Loss])(),
        optimizer=optimizer,
        options=options,
        batch=batch,
        steps=min(draw.choice([100, 200, 400]), EPOCHS * len(data()[0]) // batch),
        seed=seed,
        clip=draw.choice([None, None, None, 5.0]),
    )
