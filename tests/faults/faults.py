"""Faults: each one change of a healthy recipe, what it must be called, and from which step on it can be told.

A fault that the very first forward and backward pass shows is to be named at step 0. Later ones say why.
"""

from dataclasses import dataclass

import torch
from torch import nn

from tests.faults.recipe import Recipe, diabetes

Adam, SGD = torch.optim.Adam, torch.optim.SGD


@dataclass
class Fault:
    """A recipe with one fault, and what it must be called.

    Attributes:
        kinds: names that are right.
        step: the first at which it can be told.
        layer, words: to be named, too.
    """

    recipe: Recipe
    kinds: tuple[str, ...]
    step: int = 0
    layer: str | None = None
    words: str = ""


def linear(model):
    return [module for module in model if isinstance(module, nn.Linear)]


def normal(std):
    return lambda weight: nn.init.normal_(weight, std=std)


@torch.no_grad()
def kill(model):
    model[2].bias.fill_(-100.0)


@torch.no_grad()
def large_weights(model):
    model[2].weight.mul_(30.0)


@torch.no_grad()
def large_output(model):
    linear(model)[-1].weight.mul_(9.0)


@torch.no_grad()
def sure_of_one_class(model):
    linear(model)[-1].bias[3] = 30.0


@torch.no_grad()
def weight_of_nan(model):
    model[2].weight[3, 4] = float("nan")


def unused(model):
    model[2].forgotten = nn.Linear(3, 3)


def one_bad_example(x, y):
    x = x.clone()
    x[100, 7] = float("nan")
    return x, y


def bad_target(x, y):
    y = y.clone()
    y[100] = float("nan")
    return x, y


def by_label(x, y):
    order = y.argsort()
    return x[order], y[order]


def shuffled_labels(x, y):
    return x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(5))]


def labels_of_the_next(x, y):
    return x, y.roll(1)


def noisy_labels(x, y):
    """Three of four labels are drawn at random."""
    generator = torch.Generator().manual_seed(6)
    wrong = torch.rand(len(y), generator=generator) < 0.75
    return x, torch.where(wrong, torch.randint(10, (len(y),), generator=generator), y)


def binary(x, y):
    return x, (y % 2)[:, None].float()


class Root(nn.Module):
    """A derivative that is infinite at 0."""

    def forward(self, x):
        return (x * (x > 0)).sqrt()


def negative_log(input, target):
    """Negative log-likelihood of probabilities, without a log that is safe."""
    return -input.softmax(1).gather(1, target[:, None]).log().mean()


@torch.no_grad()
def sure_outputs(model):
    linear(model)[-1].weight.mul_(1e3)


FAULTS = {
    "vanishing: sigmoids": Fault(
        Recipe(widths=(64, *[32] * 8, 10), activation=nn.Sigmoid, init=None),
        ("vanishing gradient",),
        layer="0",
        words="Sigmoid",
    ),
    "vanishing: small weights": Fault(
        Recipe(widths=(64, *[32] * 12, 10), init=None), ("vanishing gradient",), layer="0", words="weights"
    ),
    "exploding: large weights": Fault(
        Recipe(widths=(64, *[64] * 8, 10), init=normal(0.6)), ("exploding gradient",), layer="0"
    ),
    "dead units: biases": Fault(Recipe(prepare=kill), ("dead units",), layer="2"),
    "saturation: large weights": Fault(
        Recipe(activation=nn.Tanh, init=nn.init.xavier_uniform_, prepare=large_weights), ("saturation",), layer="2"
    ),
    "initialization: zeros": Fault(Recipe(init=nn.init.zeros_), ("bad initialization",)),
    "initialization: tiny": Fault(Recipe(init=normal(1e-3)), ("bad initialization",)),
    "initialization: one large layer": Fault(Recipe(prepare=large_weights), ("bad initialization",), layer="2"),
    "initialization: outputs": Fault(Recipe(prepare=large_output), ("bad initialization",), layer="4"),
    "initialization: output bias": Fault(
        Recipe(prepare=sure_of_one_class), ("bad initialization",), layer="4", words="first loss"
    ),
    "initialization: constant": Fault(Recipe(init=lambda w: nn.init.constant_(w, 0.05)), ("bad initialization",)),
    # One step changes the weights more than fivefold.
    "rate too high: Adam": Fault(Recipe(options={"lr": 1.0}), ("rate too high",), 0),
    "rate too high: SGD": Fault(Recipe(optimizer=SGD, options={"lr": 20.0}), ("rate too high", "divergence"), 2),
    # Three steps tell a rate that stays from a warm-up.
    "rate too low: Adam": Fault(Recipe(options={"lr": 1e-7}), ("rate too low",), 2),
    "rate too low: zero": Fault(Recipe(options={"lr": 0.0}), ("rate too low",), 2, words="is 0"),
    # The loss has to have risen for five steps.
    "divergence: SGD": Fault(
        Recipe(diabetes, (10, 64, 1), loss=nn.MSELoss(), optimizer=SGD, options={"lr": 1.0}),
        ("divergence", "NaN or Inf"),
        4,
    ),
    "divergence: the wrong sign": Fault(
        Recipe(optimizer=SGD, options={"lr": 0.05, "maximize": True}), ("divergence",), 12
    ),
    # The step at which the example comes.
    "NaN: an input": Fault(Recipe(data_of=one_bad_example, shuffle=False), ("NaN or Inf",), 3, words="input"),
    "NaN: a weight": Fault(Recipe(prepare=weight_of_nan), ("NaN or Inf",), 0, "2", "weights"),
    "NaN: a target": Fault(
        Recipe(diabetes, (10, 32, 1), loss=nn.MSELoss(), data_of=bad_target, shuffle=False),
        ("NaN or Inf",),
        3,
        "",
        "targets",
    ),
    "Inf: log of 0": Fault(Recipe(loss=negative_log, prepare=sure_outputs), ("NaN or Inf",), 0, "", "logarithm"),
    "NaN: a derivative": Fault(Recipe(activation=Root), ("NaN or Inf",), 0, "2", "backward"),
    # 300 steps, by which the loss has fallen and stayed for 200, and 10 in a row.
    "plateau: noisy labels": Fault(
        Recipe(data_of=noisy_labels, widths=(64, 4, 10), steps=480, options={"lr": 3e-3}), ("plateau",), 450
    ),
    # The third validation in a row that is beyond the threshold.
    "overfitting": Fault(
        Recipe(diabetes, (10, 256, 256, 1), loss=nn.MSELoss(), options={"lr": 2e-3}, steps=240), ("overfitting",), 219
    ),
    "softmax before cross-entropy": Fault(Recipe(last=lambda: nn.Softmax(1)), ("softmax before its loss",)),
    "softmax before NLL": Fault(
        Recipe(last=lambda: nn.Softmax(1), loss=nn.NLLLoss()), ("softmax before its loss",), words="log-prob"
    ),
    "sigmoid before BCE on logits": Fault(
        Recipe(widths=(64, 32, 1), last=nn.Sigmoid, loss=nn.BCEWithLogitsLoss(), batch_of=binary, steps=10),
        ("sigmoid before its loss",),
    ),
    "no shuffle": Fault(Recipe(data_of=by_label, shuffle=False), ("data not shuffled",)),
    # A hundred steps: slow runs, too, have left the loss of chance by then.
    "labels shuffled": Fault(Recipe(data_of=shuffled_labels, steps=120), ("labels unrelated to inputs",), 100),
    "labels shifted": Fault(Recipe(data_of=labels_of_the_next, steps=120), ("labels unrelated to inputs",), 100),
    "unscaled input: bytes": Fault(Recipe(batch_of=lambda x, y: (128 + 64 * x, y)), ("unscaled input",), layer="0"),
    "unscaled input: tiny": Fault(Recipe(batch_of=lambda x, y: (x / 1000, y)), ("unscaled input",), layer="0"),
    "unused parameters": Fault(Recipe(prepare=unused), ("unused parameters",), layer="2.forgotten"),
    # By the second reading it is known that nothing else, such as a second optimizer, updates them.
    "not in the optimizer": Fault(
        Recipe(parameters=lambda model: model[4].parameters()), ("not in the optimizer",), 1, layer="0"
    ),
    # The second backward pass adds to the first one's gradients.
    "gradient not zeroed": Fault(Recipe(zero_grad=False), ("gradient not zeroed",), 1),
    # A hundred steps: clipping at the start is usual.
    "always clipped": Fault(Recipe(clip=1e-3, steps=110), ("always clipped",), 100),
}
