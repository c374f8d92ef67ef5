"""The learning-rate range test: which rate to begin with (Smith, arXiv:1506.01186, sec. 3.3).

A model is trained for a few steps in which the rate grows from `min_lr` to `max_lr` by a constant factor; the loss
falls while the rate is useful and explodes when it is too large. All is judged over log(lr): in it the rates tried are
evenly spaced, so slopes over it do not favour the small rates.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from torch_bp.optim import curves
from torch_bp.optim.lr_scheduler.state import write_rates
from torch_bp.optim.untouched import untouched

RULES = {  # what each picks; the first is the one to begin with
    "steepest": "where the loss falls fastest",
    "minimum": "a tenth of the rate of the lowest loss",
    "valley": "two thirds along the longest fall of the loss",
}
_COARSE = 3.0  # rates further apart than by this factor may leap over all that are useful


@dataclass
class RangeTest:
    """What a range test has seen: the rates tried, the losses there, and what they suggest.

    Args:
        min_lr: the first rate, > 0. Default 1e-7.
        max_lr: the last rate, > min_lr. Default 10.
        steps: how many rates, >= 2. Default 100.
        smoothing: beta in [0, 1) of the average s_t = (1 - beta) sum_i beta^(t - i) loss_i / (1 - beta^(t + 1)) of the
            losses up to step t. Default 0.9.
        diverge: the test ends early when s is more than `diverge - 1` times max(|best|, first - best) above the best s,
            > 1. Default 4: for a loss that has not fallen yet, four times the best.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> test = RangeTest(min_lr=0.001, max_lr=1.0, steps=4, smoothing=0.0)
        >>> [test.record(loss) for loss in (1.0, 0.9, 0.2, 5.0)]
        [True, True, True, False]
        >>> round(test.suggestion("minimum"), 6)
        0.01
        >>> print(test)
        4 of 4 rates tried, 0.001 to 1; the loss diverged there.
        Take more steps: the rates are apart by a factor of 10.
        Begin with lr = 0.1, "steepest"; the rules in turn:
          steepest  0.1       where the loss falls fastest
           minimum  0.01      a tenth of the rate of the lowest loss
            valley  0.01      two thirds along the longest fall of the loss
    """

    min_lr: float = 1e-7
    max_lr: float = 10.0
    steps: int = 100
    smoothing: float = 0.9
    diverge: float = 4.0
    lr: list[float] = field(default_factory=list, init=False, repr=False)
    losses: list[float] = field(default_factory=list, init=False, repr=False)
    smoothed: list[float] = field(default_factory=list, init=False, repr=False)
    diverged: bool = field(default=False, init=False)
    _average: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        conditions = {
            "min_lr": (0 < self.min_lr < math.inf, "positive"),
            "max_lr": (self.min_lr < self.max_lr < math.inf, f"larger than min_lr, {self.min_lr}, and finite"),
            "steps": (isinstance(self.steps, int) and self.steps >= 2, "an integer >= 2"),
            "smoothing": (0 <= self.smoothing < 1, "in [0, 1)"),
            "diverge": (self.diverge > 1, "larger than 1"),
        }
        for name, (holds, condition) in conditions.items():
            if not holds:
                raise ValueError(f"lr_find: {name} must be {condition}, got {getattr(self, name)}.")

    @property
    def next_lr(self) -> float:
        """The rate of the next step."""
        return curves.log_spaced(len(self.lr), self.min_lr, self.max_lr, self.steps)

    def record(self, loss: float) -> bool:
        """Take the loss at `next_lr`, and return whether the test goes on.

        Raises:
            RuntimeError: the very first loss is not finite.
        """
        if not math.isfinite(loss):
            if not self.lr:
                raise RuntimeError(
                    f"lr_find: the loss must be finite at the first step, before any update, got {loss}. "
                    "Check the model, the loss function and the batch."
                )
            self.diverged = True
            return False
        self.lr.append(self.next_lr)
        self.losses.append(loss)
        self._average = curves.between(loss, self._average, self.smoothing)  # type: ignore[assignment]
        self.smoothed.append(self._average / (1 - self.smoothing ** len(self.losses)))
        best = min(self.smoothed)
        scale = max(abs(best), self.smoothed[0] - best)
        self.diverged = len(self.lr) > 1 and self.smoothed[-1] > best + (self.diverge - 1) * scale
        return not self.diverged and len(self.lr) < self.steps

    @property
    def cut_short(self) -> bool:
        """Whether the batches have ended before the rates have, and before the loss diverged."""
        return not self.diverged and len(self.lr) < self.steps

    @property
    def _factor(self) -> float:
        """From one rate to the next."""
        return (self.max_lr / self.min_lr) ** (1 / (self.steps - 1))

    def __str__(self) -> str:
        """How far the test has come, and what each rule suggests."""
        lines = [self._extent()]
        try:
            suggestions = {rule: f"{self.suggestion(rule):.3g}" for rule in RULES}
        except RuntimeError as error:
            return "\n".join([*lines, str(error)])
        if self.cut_short or self._factor > _COARSE:
            lines.append(self._remedy())
        first = next(iter(RULES))
        lines.append(f'Begin with lr = {suggestions[first]}, "{first}"; the rules in turn:')
        return "\n".join(lines + [f"{rule:>10}  {suggestions[rule]:<8}  {RULES[rule]}" for rule in RULES])

    def _extent(self) -> str:
        tried = f"{len(self.lr)} of {self.steps} rates tried"
        if self.lr:
            tried += f", {self.lr[0]:.3g} to {self.lr[-1]:.3g}"
        if self.cut_short:
            return f"{tried}: the batches ended before max_lr, {self.max_lr:g}."
        return f"{tried}; the loss {'diverged there' if self.diverged else 'did not diverge'}."

    def _remedy(self) -> str:
        """What may make the loss fall, or fall further."""
        if self.cut_short:
            return "Give more batches or epochs, or take fewer steps."
        if self._factor > _COARSE:
            return f"Take more steps: the rates are apart by a factor of {self._factor:.3g}."
        if self.diverged:
            return "Take a smaller min_lr."
        return "Take a larger max_lr, or check that the model learns at all."

    def suggestion(self, rule: str = "steepest") -> float:
        """The rate that a rule picks.

        Args:
            rule: "steepest", where the smoothed loss falls fastest over log(lr), but for the first losses, of which the
                average is noisy; "minimum", a tenth of the rate at its minimum; "valley", two thirds along the longest
                fall of the smoothed loss. Default "steepest".

        Raises:
            ValueError: no such rule.
            RuntimeError: there are fewer than three losses, or the loss has never fallen.
        """
        if rule not in RULES:
            raise ValueError(f"lr_find: rule must be one of {', '.join(RULES)}, got {rule!r}.")
        lowest = min(range(len(self.smoothed)), key=self.smoothed.__getitem__, default=0)
        if len(self.lr) < 3 or lowest == 0:
            ended = f", as the batches ended after {len(self.lr)} of {self.steps} rates" if self.cut_short else ""
            got = f"{len(self.lr)} losses, the lowest at number {lowest + 1}" if self.lr else "no losses"
            raise RuntimeError(
                f"lr_find: the loss must fall somewhere to suggest a rate, got {got}{ended}. {self._remedy()}"
            )
        if rule == "minimum":
            return self.lr[lowest] / 10
        if rule == "valley":
            first, last = _longest_fall(self.smoothed)
            return self.lr[first + round((last - first) * 2 / 3)]
        return self.lr[_steepest(self.smoothed[: lowest + 1], 1 / (1 - self.smoothing))]

    def plot(self) -> Any:
        """A `matplotlib.figure.Figure` of losses over rates, with each rule's suggestion.

        Raises:
            ImportError: matplotlib is missing, which `pip install "torch_bp[recipes]"` brings.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('plot needs matplotlib. Remedy: pip install "torch_bp[recipes]"') from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.plot(self.lr, self.losses, ".", color="0.7", label="loss")
        axes.plot(self.lr, self.smoothed, label="smoothed")
        for number, rule in enumerate(RULES):
            try:
                lr = self.suggestion(rule)
            except RuntimeError:
                continue
            axes.axvline(lr, color=f"C{number + 1}", linestyle="--", label=f"{rule}: {lr:.2g}")
        axes.legend()
        return figure


def _steepest(losses: list[float], memory: float) -> int:
    """Where the losses, evenly spaced, fall fastest, seen over about as many as their average remembers."""
    last, reach = len(losses) - 1, max(1, round(memory / 2))
    settled = range(min(round(memory), last - 1), last + 1)  # the first averages are of few losses

    def slope(i: int) -> float:
        begin, end = max(i - reach, 0), min(i + reach, last)
        return (losses[end] - losses[begin]) / (end - begin)

    return min(settled, key=slope)


def _longest_fall(losses: list[float]) -> tuple[int, int]:
    """First and last index of the longest strictly falling subsequence."""
    length, begin = [1] * len(losses), list(range(len(losses)))
    for i in range(len(losses)):
        for j in range(i):
            if losses[j] > losses[i] and length[j] + 1 >= length[i]:  # a level beginning is no fall
                length[i], begin[i] = length[j] + 1, begin[j]
    end = max(range(len(losses)), key=length.__getitem__)
    return begin[end], end


def scaled(lr: float, rates: list[float]) -> list[float]:
    """The rates of all groups when the first is `lr`; their ratios stay as in `rates`.

    >>> scaled(0.5, [0.1, 0.2])
    [0.5, 1.0]
    """
    return [lr * (rate / rates[0] if rates[0] else 1.0) for rate in rates]


def lr_find(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    optimizer: Optimizer,
    batches: Iterable[tuple[Any, Any]],
    *,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    diverge: float = 4.0,
) -> RangeTest:
    """Try growing rates on a model, and leave model, optimizer, gradients and random numbers as they were.

    In each step the loss is `loss_fn(model(input), target)` of the next batch, the model being in training mode.
    The rate is that of the first parameter group; the others keep their ratio to it. Restoring happens after an
    exception too; it needs the memory of a second model and optimizer state.

    Args:
        model: on the device of the batches.
        loss_fn: gives a scalar.
        optimizer: over parameters of the model, in any state.
        batches: pairs `(input, target)`, such as a DataLoader; gone through again when it ends. A generator, which
            cannot, ends the test early. Random numbers of `torch.Generator`s in a loader, its samplers and its data
            set are also as they were afterwards.
        min_lr, max_lr, steps, smoothing, diverge: see `RangeTest`.

    Returns:
        What has been found: `print` it for the rates that it suggests; `suggestion(rule)` gives one.

    Raises:
        ValueError: an argument is outside its range, there are no batches, or the loss is not one number.
        TypeError: an argument is of another kind, such as in another order, or a batch is not a pair.
        RuntimeError: the first loss is not finite.

    Example:
        >>> from torch_bp import nn, optim
        >>> model = nn.Linear(4, 1)
        >>> optimizer = optim.SGD(model.parameters(), lr=0.1)
        >>> x = torch.randn(64, 4)
        >>> test = optim.lr_find(model, nn.MSELoss(), optimizer, [(x, x.sum(1, keepdim=True))])
        >>> 0.01 < test.suggestion("steepest") < 1
        True
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """
    test = RangeTest(min_lr, max_lr, steps, smoothing, diverge)
    _check_kinds(model, loss_fn, optimizer, batches)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    with untouched(model, optimizer, _generators(batches)):
        model.train()
        for input, target in _endless(batches):
            write_rates(optimizer, scaled(test.next_lr, rates))
            loss = loss_fn(model(input), target)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(
                    f"lr_find: loss_fn must give a tensor of one number, got {got}. Take the mean over the batch."
                )
            if not test.record(loss.item()):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return test


def _check_kinds(model: Any, loss_fn: Any, optimizer: Any, batches: Any) -> None:
    """Refuse arguments of another kind, which are likely in another order."""
    wanted = {
        "model": (model, isinstance(model, nn.Module), "a torch.nn.Module"),
        "loss_fn": (loss_fn, callable(loss_fn) and not isinstance(loss_fn, type), "a function of (output, target)"),
        "optimizer": (optimizer, hasattr(optimizer, "param_groups"), "an optimizer"),
        "batches": (batches, isinstance(batches, Iterable) or hasattr(batches, "__getitem__"), "batches to go through"),
    }
    for name, (value, holds, what) in wanted.items():
        if not holds:
            raise TypeError(
                f"lr_find: {name} must be {what}, got {type(value).__name__}. "
                "The order is lr_find(model, loss_fn, optimizer, batches)."
            )


def _generators(batches: Any) -> list[torch.Generator]:
    """Those of a loader, and of the loaders, samplers and data sets in it, by whatever name they have them."""
    found, sources = [], [batches]
    for source in sources:  # which grows
        for name, value in getattr(source, "__dict__", {}).items():
            if isinstance(value, torch.Generator):
                found.append(value)
            elif name in ("sampler", "batch_sampler") or isinstance(value, DataLoader | Dataset | Sampler):
                sources += [value] * all(value is not other for other in sources)
    return found


def _endless(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    found = False
    while True:
        batch = None
        for batch in batches:
            if not (isinstance(batch, tuple | list) and len(batch) == 2):
                raise TypeError(
                    f"lr_find: a batch must be a pair (input, target), got {type(batch).__name__}. "
                    "Map the batches to pairs."
                )
            found = True
            yield batch[0], batch[1]
        if not found:
            raise ValueError("lr_find: batches must hold at least one batch, got none.")
        if batch is None:
            return
