"""A gradient check of a model as it trains: on its batch, in its precision, one difference for each layer.

With y the outputs of the model and v = dL/dy the gradient that the loss sends down, each layer with parameters W of its
own is moved along a direction d, and

    analytic = <dL/dW, d>        numeric = <v, y(W + h d) - y(W - h d)> / (2 h)

The loss itself is a row of its own, along a direction of y. d is the gradient itself, so that a wrong factor is seen,
plus a vector at random of the same weight in the sum, so that a missing part is seen, too. In low precision a step has
to be large: h d is about u^(1/3) of the size of W, with u the machine epsilon, and smaller steps are tried if that does
not agree, as far as rounding lets them tell anything.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

_RTOL = {torch.float64: 1e-6, torch.float32: 2e-2, torch.float16: 0.3, torch.bfloat16: 0.5}
_STEPS = (1.0, 1 / 8, 1 / 64)  # times the first; kinks lie closer together than a large step
_LOSS = "loss"


@dataclass(frozen=True)
class DirectionalRow:
    """One layer, by its path in the model, or the loss.

    `resolved` is False where rounding is too large beside the slope for the difference to tell anything.
    """

    name: str
    error: float
    analytic: float
    numeric: float
    resolved: bool = True


@dataclass(frozen=True)
class DirectionalReport:
    """What `directional_check` found; true if no layer is off by more than `rtol`."""

    rows: tuple[DirectionalRow, ...]
    rtol: float

    @property
    def errors(self) -> dict[str, float]:
        """The relative error of each layer that the difference can tell."""
        return {row.name: row.error for row in self.rows if row.resolved}

    @property
    def wrong(self) -> list[str]:
        """Names of what is off by more than `rtol`, the worst first."""
        return sorted((n for n, e in self.errors.items() if not e <= self.rtol), key=lambda n: -self.errors[n])

    def __bool__(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        verdict = f"off by more than {self.rtol:.0e}: {', '.join(self.wrong)}" if self.wrong else "all well"
        lines = [
            f"{row.name:24} {row.error:.1e}  analytic {row.analytic:12.5g}  numeric {row.numeric:12.5g}"
            f"{'' if row.resolved else '  lost in rounding'}"
            for row in self.rows
        ]
        return "\n".join([f"directional check: {verdict}", *lines])


def directional_check(
    model: torch.nn.Module,
    loss_fn: Callable[..., Tensor],
    x: Any,
    y: Any = None,
    *,
    rtol: float | None = None,
    seed: int = 0,
) -> DirectionalReport:
    """Compare the gradient of each layer with one difference, on this batch and as the model is.

    Meant to be called now and then in training. It costs one forward and backward, and two forwards for each layer with
    parameters of its own. Nothing changes by a bit: parameters, buffers, `.grad`, modes, torch's random state. Dropout
    drops the same in every pass. Call it inside the `autocast` that training uses.

    Args:
        model: called with `x`; a tuple is its arguments, a dict its keyword arguments.
        loss_fn: called with what the model returns and, unless it is None, with `y`; returns one number.
        x: the batch.
        y: what the loss takes beside the outputs.
        rtol: largest relative error that is all right, > 0. Default: 1e-6 in float64, 2e-2 in float32, 0.3 in float16
            and 0.5 in bfloat16, of the coarsest dtype at work.
        seed: of the directions. A monitor gives the step, so as to see others each time.

    Raises:
        ValueError: rtol is out of range, no parameter requires grad, or the loss is not one finite number.

    Example:
        >>> import torch
        >>> from torch_bp.autograd import directional_check
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> report = directional_check(model, torch.nn.functional.mse_loss, torch.ones(5, 3), torch.zeros(5, 2))
        >>> bool(report), list(report.errors)
        (True, ['loss', '0', '2'])
    """
    if rtol is not None and not 0 < rtol < math.inf:
        raise ValueError(
            f"directional_check: rtol must be positive and finite, got {rtol}; leave it out for the default."
        )
    live = _Live(model, loss_fn, x, y)
    with torch.random.fork_rng(live.devices), torch.enable_grad():
        live.start()
        rtol = _RTOL[live.dtype] if rtol is None else rtol
        generator = torch.Generator("cpu").manual_seed(seed)
        rows = [live.loss_row(rtol, generator)]
        rows += [live.layer_row(name, names, rtol, generator) for name, names in live.layers.items()]
    return DirectionalReport(tuple(rows), rtol)


class _Live:
    """A model with its batch: gradients once, then outputs with some parameters moved."""

    def __init__(self, model: torch.nn.Module, loss_fn: Callable[..., Tensor], x: Any, y: Any) -> None:
        self.model, self.loss_fn, self.y = model, loss_fn, y
        self.arguments = x if isinstance(x, tuple) else () if isinstance(x, dict) else (x,)
        self.keywords = x if isinstance(x, dict) else {}
        self.parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("directional_check: some parameter of the model must require grad, got none that does.")
        self.frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        self.devices = {p.device for p in model.parameters() if p.is_cuda}
        self.layers: dict[str, list[str]] = {}
        for name in self.parameters:
            self.layers.setdefault(name.rpartition(".")[0] or type(model).__name__, []).append(name)

    def start(self) -> None:
        """Run forward and backward."""
        self.random = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in self.devices}
        leaves = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
        outputs, self.structure = tree_flatten(self.run(leaves))
        self.places = [i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.requires_grad]
        ends = [outputs[i] for i in self.places]
        self.outputs = [t.detach() if isinstance(t, Tensor) else t for t in outputs]
        points = [t.detach().requires_grad_() for t in ends]
        loss = self.loss(points)
        if loss.numel() != 1 or not loss.isfinite().all():
            got = f"shape {tuple(loss.shape)}" if loss.numel() != 1 else str(loss.item())
            raise ValueError(f"directional_check: loss_fn must return one finite number, got {got}. Return the mean.")
        found = torch.autograd.grad(loss, points, allow_unused=True)
        self.signals = [torch.zeros_like(t) if s is None else s for s, t in zip(found, points)]
        slopes = torch.autograd.grad(ends, [*leaves.values()], self.signals, allow_unused=True)
        zeros = (torch.zeros_like(p) if g is None else g for g, p in zip(slopes, leaves.values()))
        self.gradients = {name: g.to_dense().double() for name, g in zip(leaves, zeros)}
        self.points, self.value = [t.detach() for t in ends], loss.detach()
        self.dtype = max((t.dtype for t in self._at_work()), key=lambda dtype: torch.finfo(dtype).eps)
        self.unit = torch.finfo(self.dtype).eps

    def _at_work(self) -> Iterator[Tensor]:
        yield from self.parameters.values()
        yield from self.points
        for device in {p.device.type for p in self.parameters.values()}:
            if torch.is_autocast_enabled(device):
                yield torch.empty(0, dtype=torch.get_autocast_dtype(device), device="cpu")

    def run(self, parameters: dict[str, Tensor]) -> Any:
        """Run forward with the same random numbers as ever, on copies of the buffers."""
        torch.set_rng_state(self.random[0])
        for device, state in self.random[1].items():
            torch.cuda.set_rng_state(state, device)
        buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        x, keywords = tree_map_only(Tensor, lambda t: t.detach(), (self.arguments, self.keywords))
        with _modes(self.model):
            return torch.func.functional_call(self.model, {**buffers, **self.frozen, **parameters}, x, keywords)

    def loss(self, points: list[Tensor]) -> Tensor:
        outputs = list(self.outputs)
        for i, point in zip(self.places, points):
            outputs[i] = point
        result = tree_unflatten(outputs, self.structure)
        return self.loss_fn(result) if self.y is None else self.loss_fn(result, self.y)

    def loss_row(self, rtol: float, generator: torch.Generator) -> DirectionalRow:
        """The loss along a direction of the outputs."""
        directions = [_direction(s.double(), generator) for s in self.signals]
        terms = [s.double() * d for s, d in zip(self.signals, directions)]

        def numeric(h: float) -> tuple[float, float]:
            ends = [self.loss([(t + k * h * d).to(t) for t, d in zip(self.points, directions)]) for k in (1, -1)]
            difference = ends[0].double() - ends[1].double()
            return difference.item() / (2 * h), self.unit * abs(self.value.double().item()) / h

        with torch.no_grad():
            return _row(_LOSS, terms, numeric, _step(self.points, directions, self.unit), rtol)

    def layer_row(self, layer: str, names: list[str], rtol: float, generator: torch.Generator) -> DirectionalRow:
        """One layer along a direction of all its parameters."""
        directions = {name: _direction(self.gradients[name], generator) for name in names}
        terms = [self.gradients[name] * d for name, d in directions.items()]
        size = _norm([s.double() * t.double() for s, t in zip(self.signals, self.points)])

        def numeric(h: float) -> tuple[float, float]:
            ends = []
            for k in (1, -1):
                moved = {n: (self.parameters[n] + k * h * d).to(self.parameters[n]) for n, d in directions.items()}
                outputs = tree_flatten(self.run(self.parameters | moved))[0]
                ends.append([outputs[i].double() for i in self.places])
            difference = sum(((a - b) * s).sum().item() for a, b, s in zip(*ends, self.signals))
            return difference / (2 * h), self.unit * size / h

        with torch.no_grad():
            step = _step([self.parameters[n] for n in names], [*directions.values()], self.unit)
            return _row(layer, terms, numeric, step, rtol)


def _direction(gradient: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient at unit length, and random numbers whose product with it is of the same size, and sign."""
    drawn = torch.empty(gradient.shape, dtype=torch.float64, device="cpu").uniform_(-1.7, 1.7, generator=generator)
    drawn, norm = drawn.to(gradient.device), gradient.norm()
    if norm == 0:
        return drawn
    return gradient / norm + (drawn if (gradient * drawn).sum() >= 0 else -drawn)


def _step(tensors: list[Tensor], directions: list[Tensor], unit: float) -> float:
    """The step that moves tensors by a cube root of rounding of their size, and by that of 0.1 if they are smaller."""
    count = math.sqrt(max(1, sum(t.numel() for t in tensors)))
    size, move = _norm(tensors) / count, _norm(directions) / count
    return unit ** (1 / 3) * max(size, 0.1) / max(move, 1e-30)


def _norm(tensors: Sequence[Tensor]) -> float:
    """The norm of all their entries together."""
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def _row(
    name: str, terms: list[Tensor], numeric: Callable[[float], tuple[float, float]], step: float, rtol: float
) -> DirectionalRow:
    """Compare at some steps; an error is relative to the terms of the slope where these cancel.

    Steps that disagree with each other, by kinks or rounding, do not tell that the analytic slope is wrong.
    """
    analytic, norm = sum(t.sum().item() for t in terms), _norm(terms)
    values: list[float] = []
    best = DirectionalRow(name, math.inf, analytic, 0.0, resolved=False)
    for factor in _STEPS:
        value, rounding = numeric(step * factor)
        scale = max(abs(analytic), abs(value), norm)
        error = abs(analytic - value) / scale if scale > 0 else 0.0
        error = error if math.isfinite(error) else math.inf
        resolved = 4 * rounding <= rtol * scale or scale == 0
        if not values or (resolved and error < best.error) or error <= rtol:
            best = DirectionalRow(name, error, analytic, value, resolved)
        values.append(value)
        if error <= rtol or (len(values) > 1 and not resolved):
            break
    off = abs(analytic - best.numeric)
    if best.error > rtol and not (len(values) > 1 and max(values) - min(values) <= off / 2) and math.isfinite(off):
        return replace(best, resolved=False)
    return best


@contextlib.contextmanager
def _modes(model: torch.nn.Module) -> Iterator[None]:
    """Put back the modes of modules, which a forward may set."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
