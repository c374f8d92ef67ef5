"""Try the cure of a finding on a copy of the run.

It stands above the rooms: finding what is wrong needs no layers, curing it does (`torch_bp.nn.init.auto_`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_bp._json import plain
from torch_bp.diagnostics import Finding, Reading, watch
from torch_bp.diagnostics.history import SATURATING
from torch_bp.diagnostics.replica import replica, same_random_numbers

Batches = Sequence[tuple[Tensor, Any]]
_SATURATING: tuple[type[nn.Module], ...] = tuple(getattr(nn, name) for name in SATURATING)


@dataclass(frozen=True)
class Course:
    """A few steps: their losses, what was found in them, and the readings."""

    losses: tuple[float, ...]
    findings: tuple[Finding, ...]
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Trial:
    """What `try_cure` saw: print it.

    Attributes:
        finding: whose cure was tried.
        tried: what was done; "" if nothing could be.
        reason: why nothing could be tried.
        before, after: without and with the cure, from the same weights on the same batches.
    """

    finding: Finding
    tried: str = ""
    reason: str = ""
    before: Course | None = None
    after: Course | None = None

    @property
    def values(self) -> tuple[float | None, float | None]:
        """The number of the finding where it was still found, without and with the cure."""
        return self._value(self.before), self._value(self.after)

    @property
    def cured(self) -> bool:
        """True if the finding is gone, there is no error, and the loss ends finite, and no higher than without the cure
        or, where it is another loss by now, than it began.
        """
        if self.before is None or self.after is None or self.values[1] is not None:
            return False
        if any(found.severity == "error" for found in self.after.findings):
            return False
        last, other = self.after.losses[-1], self.before.losses[-1]
        # losses of other outputs or another scale of the input differ in the first step already
        return math.isfinite(last) and (not math.isfinite(other) or last <= max(other, self.after.losses[0]))

    def _value(self, course: Course | None) -> float | None:
        found = [each.value for each in course.findings if each.kind == self.finding.kind] if course else []
        return found[0] if found else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; numbers that JSON does not know as the text that `float` reads."""
        courses = {"before": self.before, "after": self.after}
        values = dict(zip(courses, self.values))
        content = {
            "kind": self.finding.kind,
            "layer": self.finding.layer,
            "action": self.finding.action,
            "tried": self.tried,
            "reason": self.reason,
            "cured": self.cured,
            "losses": {name: course.losses for name, course in courses.items() if course},
            "values": {name: value for name, value in values.items() if value is not None},
        }
        return plain(content)

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"{self.finding.kind}: nothing was tried, {self.reason}"
        was, now = ("not found" if value is None else f"{value:.3g}" for value in self.values)
        courses = [f"{c.losses[0]:.4g} to {c.losses[-1]:.4g}" for c in (self.before, self.after)]
        lines = [f"{self.finding.kind}: {self.tried}, {len(self.after.losses)} steps on a copy"]
        lines += [f"  {'':8}{'loss':28}{self.finding.kind}", f"  {'before':8}{courses[0]:28}{was}"]
        lines += [f"  {'after':8}{courses[1]:28}{now}", f"  {'it helps' if self.cured else 'it does not help'}"]
        return "\n".join(lines)


@dataclass
class _Run:
    """A copy of a run, and how it goes on; cures change it."""

    model: nn.Module
    loss_fn: Any
    optimizer: torch.optim.Optimizer
    batches: Batches
    max_norm: float | None = None
    zero_grad: bool = True
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def course(self, steps: int) -> Course:
        losses: list[float] = []
        loss_fn = self.loss_fn if isinstance(self.loss_fn, nn.Module) else None
        options: dict[str, Any] = {"loss_fn": loss_fn, "level": "layers", "keep": steps, "silent": True}
        with watch(self.model, self.optimizer, every=1, budget=None, **options) as monitor:
            for step in range(steps):
                inputs, target = self.batches[step % len(self.batches)]
                if self.zero_grad:
                    self.optimizer.zero_grad()
                loss = self.loss_fn(self.model(inputs), target)
                if loss_fn is None:
                    monitor.loss(loss)
                loss.backward()
                if self.max_norm is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
                self.optimizer.step()
                losses.append(float(loss.detach()))
        return Course(tuple(losses), tuple(monitor.findings), tuple(monitor.readings))


def try_cure(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    finding: Finding,
    steps: int = 20,
) -> Trial:
    """Try the cure of a finding for a few steps on a copy, and show the same steps with and without it.

    Model, optimizer, batches and random numbers stay as they are, bit for bit. What can be tried: another rate,
    clipping, new initial weights, a standardized input, another activation, no softmax before the loss, zeroed
    gradients, shuffled data. What cannot, as a call that is missing in a forward, the trial says.

    Args:
        model, loss_fn, optimizer: of the run; `loss_fn` is called with output and target.
        batches: pairs of input and target, taken in turn.
        finding: of `diagnose`, whose `action` is tried.
        steps: how many, at least 1.

    Raises:
        TypeError, ValueError: an argument is not what it must be.

    Example:
        >>> from torch_bp.diagnostics import Finding
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 4)
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
        >>> finding = Finding("rate too high", "", 0, 2.0, 1.0, "steps are too long", "lr=0.3", action="lr*0.1")
        >>> trial = try_cure(model, nn.MSELoss(), optimizer, [(x, x.sum(1, keepdim=True))], finding)
        >>> trial.cured, trial.after.losses[-1] < 0.01 < trial.before.losses[-1]
        (True, True)
    """
    _check(model, optimizer, batches, finding, steps)
    if not finding.action:
        return Trial(finding, reason=f"its cure is a change of the code: {finding.cure}")
    zeroed = finding.kind != "gradient not zeroed"
    with same_random_numbers(model, seed=0):
        before = _copied(model, loss_fn, optimizer, batches, zeroed).course(steps)
    with same_random_numbers(model, seed=0):
        run = _copied(model, loss_fn, optimizer, batches, zeroed)
        tried, reason = CURES[finding.action](run)
        if reason:
            return Trial(finding, reason=reason)
        return Trial(finding, tried, before=before, after=run.course(steps))


def _copied(model: nn.Module, loss_fn: Any, optimizer: torch.optim.Optimizer, batches: Batches, zeroed: bool) -> _Run:
    twin, loss, its_optimizer = replica(model, loss_fn, optimizer)
    return _Run(twin, loss, its_optimizer, batches, zero_grad=zeroed)


def _check(model: Any, optimizer: Any, batches: Any, finding: Any, steps: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"try_cure: model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"try_cure: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    if not isinstance(finding, Finding):
        raise TypeError(f"try_cure: finding must be a Finding, as of diagnose, got {type(finding).__name__}.")
    if finding.action and finding.action not in CURES:
        raise ValueError(f"try_cure: action must be one of {', '.join(CURES)}, got {finding.action!r}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"try_cure: steps must be a whole number of 1 or more, got {steps!r}.")
    pairs = isinstance(batches, list | tuple) and all(isinstance(b, list | tuple) and len(b) == 2 for b in batches)
    if not pairs or not batches:
        got = "an empty one" if isinstance(batches, list | tuple) and not batches else f"{type(batches).__name__}"
        got += " of others" if batches and isinstance(batches, list | tuple) else ""
        raise ValueError(
            f"try_cure: batches must be a list of pairs (input, target), got {got}. Keep a few of a loader."
        )
    for inputs, _ in batches:
        if not isinstance(inputs, Tensor):
            got = type(inputs).__name__
            raise TypeError(f"try_cure: inputs of batches must be tensors, got {got}. Wrap a model that takes more.")


def _rate(factor: float) -> Callable[[_Run], tuple[str, str]]:
    def cure(run: _Run) -> tuple[str, str]:
        for group in run.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        return f"the learning rate times {factor:g}", ""

    return cure


def _clip(run: _Run) -> tuple[str, str]:
    run.max_norm = 1.0
    return "gradients clipped to a norm of 1", ""


def _initialize(run: _Run) -> tuple[str, str]:
    from torch_bp.nn.init import auto_

    chosen = auto_(run.model, x=run.batches[0][0])
    if len(chosen.left) == len(chosen.rows):
        return "", "no layer of it is one that torch_bp.nn.init.auto_ knows"
    run.optimizer.state.clear()  # averages of gradients of other weights
    return "weights drawn anew by torch_bp.nn.init.auto_", ""


def _standardize(run: _Run) -> tuple[str, str]:
    inputs = torch.cat([x for x, _ in run.batches])
    if not inputs.is_floating_point():
        return "", "the inputs are no floating-point numbers"
    mean, std = inputs.mean(0), inputs.std(0, correction=0)
    # what is the same in all examples says nothing, and has no scale
    run.batches = [((x - mean) / torch.where(std > 0, std, 1), target) for x, target in run.batches]
    return "inputs standardized, each by mean and deviation over the batches", ""


def _swap_activations(run: _Run) -> tuple[str, str]:
    """Saturating ones for ReLU, and else rectifiers for leaky ones; that of the output is the loss's business."""
    swapped: set[str] = set()
    modules = list(run.model.named_modules())
    saturating = any(isinstance(module, _SATURATING) for _, module in modules[:-1])
    for name, module in modules[:-1]:
        if isinstance(module, _SATURATING if saturating else nn.ReLU) and name:
            parent, _, child = name.rpartition(".")
            setattr(run.model.get_submodule(parent), child, nn.ReLU() if saturating else nn.LeakyReLU(0.01))
            swapped.add(type(module).__name__)
    if not swapped:
        return "", "no activation of it is a module that could be exchanged"
    text = f"{', '.join(sorted(swapped))} replaced by {'ReLU' if saturating else 'LeakyReLU(0.01)'}"
    if saturating:  # weights that were drawn for another activation
        initialized, _ = _initialize(run)
        text += f", {initialized}" if initialized else ""
    return text, ""


def _replace_output(
    of: tuple[type[nn.Module], ...], make: Callable[[Any], nn.Module]
) -> Callable[[_Run], tuple[str, str]]:
    def cure(run: _Run) -> tuple[str, str]:
        found = [(name, module) for name, module in run.model.named_modules() if isinstance(module, of) and name]
        if not found:
            return "", "the softmax or sigmoid is no module of the model: leave it out of its forward"
        name, module = found[-1]
        parent, _, child = name.rpartition(".")
        new = make(module)
        setattr(run.model.get_submodule(parent), child, new)
        return f"{type(module).__name__} at {name} replaced by {type(new).__name__}", ""

    return cure


def _zero(run: _Run) -> tuple[str, str]:
    run.zero_grad = True
    return "optimizer.zero_grad() before each backward pass", ""


def _shuffle(run: _Run) -> tuple[str, str]:
    if not all(isinstance(target, Tensor) for _, target in run.batches):
        return "", "the targets are no tensors"
    inputs, targets = (torch.cat(list(part)) for part in zip(*run.batches))
    order = torch.randperm(len(inputs), generator=run.generator).to(inputs.device)
    size = len(run.batches[0][0])
    run.batches = [(inputs[chosen], targets[chosen.to(targets.device)]) for chosen in order.split(size)]
    return "examples of all batches shuffled", ""


CURES: dict[str, Callable[[_Run], tuple[str, str]]] = {
    "lr*0.1": _rate(0.1),
    "lr*10": _rate(10.0),
    "clip": _clip,
    "init": _initialize,
    "standardize": _standardize,
    "activation": _swap_activations,
    "no softmax": _replace_output((nn.Softmax, nn.Sigmoid), lambda module: nn.Identity()),
    "log softmax": _replace_output((nn.Softmax,), lambda module: nn.LogSoftmax(module.dim)),
    "zero_grad": _zero,
    "shuffle": _shuffle,
}
