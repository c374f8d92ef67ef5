"""Slopes along directions, eq. 17, and kinks.

With a co-vector v for the outputs of f, a direction d of one of its tensors and the gradient g = J^T v by autograd,

    analytic = <g, d>          numeric = <v, f(x + h d) - f(x - h d)> / (2 h)
    error    = |analytic - numeric| / max(|analytic|, |numeric|, |g d|, |v f| / 20)

with norms of elementwise products for |.|: what the sums would be if no terms cancelled, and what rounding is left of
the outputs. (That last one grows as h shrinks.) A direction at random misses a wrong gradient with probability 0.

f may have kinks. A difference across one is no derivative, but it becomes one when h shrinks, unless x is at the kink:
there both one-sided slopes of an output differ at every h. Such a direction says nothing, but for this: the analytic
slope must lie between what one side and the other give, output by output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torch_bp.autograd.gradient_check.subject import Subject, flat, largest, real

# eps, rtol: rounding costs about u |f| / h and truncation h^2 |f'''| / 6, least together near the cube root of u
PRECISION = {
    torch.float64: (6e-6, 1e-7),
    torch.float32: (1e-3, 1e-2),
    torch.float16: (3e-2, 1e-1),
    torch.bfloat16: (1e-1, 3e-1),
}
STEPS = (1.0, 1 / 16, 1 / 256, 1 / 4096, 16.0)  # times eps, tried in this order
_Option = float | None
_SMALL = 1 << 12  # entries up to which each has a random number of its own


@dataclass(frozen=True)
class Signal:
    """Gradients from above, flat, and the gradients that backward makes of them, flat, by name."""

    covector: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """f at both ends of a step: `above` and `below`, flat; `moved` is the direction as rounding left it."""

    above: Tensor
    below: Tensor
    moved: Tensor
    step: float


@dataclass(frozen=True)
class Probe:
    """One comparison; `smooth` tells of each output whether both one-sided slopes agree, None if nobody asked."""

    analytic: float
    numeric: float
    error: float
    difference: Difference = field(repr=False)
    smooth: Tensor | None = field(default=None, repr=False)
    between: bool = True

    @property
    def kink(self) -> bool:
        return self.smooth is not None and not bool(self.smooth.all())


class Slopes:
    """The slopes of one subject at one point, and how they are compared."""

    def __init__(
        self, subject: Subject, outputs: Tensor, dtype: torch.dtype, eps: _Option, rtol: _Option, atol: _Option
    ) -> None:
        self.subject, self.outputs, self.atol = subject, outputs, atol
        self._usual, usual_rtol = PRECISION[dtype]
        self.given, self.eps = eps is not None, eps or self._usual
        self.rtol = usual_rtol if rtol is None else max(rtol, 1e-30)
        self.unit = torch.finfo(dtype).eps
        self.seed = torch.Generator("cpu").manual_seed(0)

    def random(self, name: str, kept: float = 1.0) -> Tensor:
        """Return a direction, flat: numbers of 0.5 to 2 and either sign; a share `kept` of the entries moves."""
        centre = real(self.subject.tensors[name])
        n = centre.numel()
        if n == 1:
            return torch.ones(1, dtype=torch.float64, device="cpu")
        if n <= _SMALL or kept < 1:
            direction = _draw(n, self.seed)
            return direction if kept == 1 else direction * (torch.rand(n, generator=self.seed, device="cpu") < kept)
        # a product of two vectors: no sum of a wrong gradient with it is 0, but for a set of measure 0
        rows = centre.shape[0] if 1 < centre.shape[0] < n else 2 ** int(math.log2(n) / 2)
        columns = -(-n // rows)
        return torch.outer(_draw(rows, self.seed), _draw(columns, self.seed)).view(-1)[:n]

    def difference(self, name: str, direction: Tensor, step: float) -> Difference:
        """Evaluate f at both ends of a step from the point.

        Raises:
            ValueError: the step is lost in rounding.
        """
        tensor = self.subject.tensors[name].detach()
        centre = real(tensor)
        move = direction.view(centre.shape).to(centre)
        if not self.given and 64 * self.unit * largest(centre) > step:  # some digits also where the entry is large
            move = move * (centre.abs() * (64 * self.unit / step)).clamp(min=1)
        upper, lower = torch.add(centre, move, alpha=step), torch.sub(centre, move, alpha=step)
        moved = (upper.double() - lower.double()).div_(2 * step).reshape(-1).cpu()
        if self.given and ((moved == 0) & (direction != 0)).any():
            raise ValueError(f"gradcheck: eps must exceed the rounding of {name}, got {step:.0e}; scale {name} down.")

        def value(end: Tensor) -> Tensor:
            point = self.subject.moved(name, torch.view_as_complex(end) if tensor.is_complex() else end)
            return flat(self.subject.outputs(self.subject.tensors | {name: point.requires_grad_()}))

        return Difference(value(upper), value(lower), moved, step)

    def compare(self, name: str, signal: Signal, d: Difference, least: float = 0.0) -> Probe:
        """Compare both slopes over one difference; `least` bounds the denominator from below."""
        terms = signal.gradients[name] * d.moved
        numeric = torch.dot(signal.covector, d.above - d.below).item() / (2 * d.step)
        analytic = terms.sum().item()
        scale = max(abs(analytic), abs(numeric), self.floor(signal, d, max(least, norm(terms))))
        error = abs(analytic - numeric) / scale if scale > 0 else 0.0
        same = analytic == numeric
        if numeric == 0 and torch.equal(d.above, d.below):  # nothing moves: what is left of a gradient is rounding
            same = abs(analytic) <= 1e4 * self.unit * d.moved.norm().item()
        return Probe(analytic, numeric, 0.0 if same else error if math.isfinite(error) else math.inf, d)

    def floor(self, signal: Signal, d: Difference, least: float) -> float:
        """Return what an error is relative to, at the least."""
        if self.atol is not None:
            return self.atol / self.rtol
        return max(least, self.rounding(signal, d))

    def rounding(self, signal: Signal, d: Difference) -> float:
        size = max(norm(signal.covector * d.above), norm(signal.covector * d.below))
        usual = self._usual / d.step
        # a step of another size than usual follows that of the input
        return size / 20 * (max(1.0, usual) if usual > 1e-3 else usual) if math.isfinite(size) else 0.0

    def tells(self, probe: Probe, signal: Signal) -> bool:
        """True unless both slopes are nearly lost in the rounding of the outputs, whatever they are."""
        strength = max(abs(probe.analytic), abs(probe.numeric))
        if self.given or self.atol is not None or strength == 0:
            return True
        return strength > 100 * self.rtol * self.rounding(signal, probe.difference)

    def probe(self, name: str, signal: Signal, direction: Tensor, least: float = 0.0) -> Probe:
        """Compare along one direction, with a step of the size of the input where the usual one does not tell."""
        found = self._probe(name, signal, direction, least, self.eps)
        if found.error > self.rtol or self.tells(found, signal):
            return found
        tensor = real(self.subject.tensors[name])
        step = self.eps * largest(tensor)
        if not 0 < step < math.inf or norm(signal.covector * self.outputs) < 1e-280:
            return found
        other = self.compare(name, signal, self.difference(name, direction, step), least)
        strength = max(abs(other.analytic), abs(other.numeric))
        if self.rtol * self.rounding(signal, other.difference) > 1e-2 * strength:
            return found
        return self._probe(name, signal, direction, least, step)

    def _probe(self, name: str, signal: Signal, direction: Tensor, least: float, step: float) -> Probe:
        """Compare along one direction, with smaller steps if need be; tell a kink from an error."""
        first = sharpest = self.compare(name, signal, self.difference(name, direction, step), least)
        if first.error <= self.rtol:
            return first
        for factor in STEPS[1:]:
            try:
                probe = self.compare(name, signal, self.difference(name, direction, step * factor), least)
            except ValueError:  # lost in rounding
                continue
            strength = max(abs(probe.analytic), abs(probe.numeric))
            if self.rtol * self.rounding(signal, probe.difference) > max(1e-4, 10 * self.rtol) * strength:
                continue  # only rounding is left
            if factor == STEPS[1] and self._only_rounding(first, probe, signal):
                return replace(first, error=0.0)
            if factor == STEPS[1] and self._no_kink_explains(first, probe, signal):
                return first
            if probe.error <= self.rtol:
                return probe
            if probe.difference.step < sharpest.difference.step:
                sharpest = probe
        return self._at_a_kink(first, sharpest, signal)

    def _only_rounding(self, first: Probe, second: Probe, signal: Signal) -> bool:
        """True if outputs move by a few roundings of numbers near 1, however small the step, and so says the slope.

        They are 0 but for rounding, as the gradient of what is constant is: theirs says nothing.
        """
        sizes = [(signal.covector * (p.difference.above - p.difference.below)).norm().item() for p in (first, second)]
        tiny = max(sizes) <= 1e3 * self.unit * signal.covector.norm().item()
        return tiny and sizes[1] >= sizes[0] / 4 and abs(first.analytic) * first.difference.step <= max(sizes)

    def _no_kink_explains(self, first: Probe, second: Probe, signal: Signal) -> bool:
        """True if the slope does not change with the step, and one-sided slopes draw together as it shrinks.

        They differ by h f'' where f is smooth. A kink within h adds what does not shrink with h, and changes the slope
        by half as much at the most.
        """
        off = abs(second.analytic - second.numeric)
        shrunk = second.difference.step / first.difference.step
        left = self._gap(second.difference, signal) - shrunk * self._gap(first.difference, signal)
        return abs(first.numeric - second.numeric) <= off / 4 and left <= off / 2

    def _gap(self, d: Difference, signal: Signal) -> float:
        return (signal.covector * (d.above - 2 * self.outputs + d.below)).abs().sum().item() / d.step

    def _at_a_kink(self, first: Probe, sharpest: Probe, signal: Signal) -> Probe:
        """Return the first comparison with what one-sided slopes say about it."""
        d, v = sharpest.difference, signal.covector
        right, left = v * (d.above - self.outputs) / d.step, v * (self.outputs - d.below) / d.step
        noise = 40 * self.unit * torch.maximum((v * d.above).abs(), (v * d.below).abs()) / d.step
        strength = max(abs(sharpest.analytic), abs(sharpest.numeric)) / math.sqrt(max(1, len(v)))
        smooth = (right - left).abs() <= torch.maximum(1e-2 * torch.maximum(right.abs(), left.abs()), noise)
        smooth |= (right - left).abs() <= 0.1 * self.rtol * strength
        low, high = torch.minimum(right, left).sum().item(), torch.maximum(right, left).sum().item()
        slack = noise.norm().item() + 10 * self.rtol * max(abs(low), abs(high))
        between = low - slack <= sharpest.analytic <= high + slack
        return Probe(first.analytic, first.numeric, first.error, first.difference, smooth, between)


def norm(tensor: Tensor) -> float:
    """Return the norm, also where squares are out of range."""
    found = tensor.norm().item()
    if (found == 0 or math.isinf(found)) and tensor.numel():
        top = largest(tensor)
        return top * (tensor / top).norm().item() if 0 < top < math.inf else top
    return found


def _draw(n: int, generator: torch.Generator) -> Tensor:
    """Numbers of 0.5 to 2 in size, of either sign."""
    numbers = torch.rand(n, dtype=torch.float64, generator=generator, device="cpu").mul_(3).sub_(1.5)
    return numbers + 0.5 * torch.where(numbers < 0, -1.0, 1.0).to(numbers)


def covector_like(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of `dtype` in 0.5 to 2, of alternating sign: every output counts, no sign or scale is special."""
    fixed = torch.Generator("cpu").manual_seed(seed)
    covector = torch.empty(size, dtype=torch.float64, device="cpu").uniform_(0.5, 2, generator=fixed)
    covector[::2].neg_()
    return covector.to(dtype).double()
