"""How far signals get at step 0: sec. 9.1 and 9.4 measured, before sec. 9.3 and 9.5 are needed.

For layer l, with z = W a + b (eq. 1) and a = s(z) (eq. 2):

    activation variance    of all entries of a, or of z where no activation follows
    error variance         of all entries of the error signal dL/dz, with L the output times unit-variance noise
    forward ratio          activation variance over that of the layer before
    backward ratio         squared length of the error signal over that of the layer after, which layers of different
                           widths have in common where their variances differ
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_bp.nn.follower import Call, Follower, agreed, seen

VANISHING, EXPLODING = 1e-3, 1e3  # from end to end
_ENDS = {"sigmoid": (0.0, 1.0), "hardsigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "softsign": (-1.0, 1.0)}
_NAN = float("nan")


@dataclass(frozen=True)
class SignalRow:
    """One run of one layer; NaN is what could not be measured.

    `idle` is, after a ReLU, the fraction of units that are 0 for all examples, and after a sigmoid, tanh or softsign
    the fraction of entries within a hundredth of the range of its ends.
    """

    name: str
    layer: str
    activation: str
    activation_variance: float
    error_variance: float
    forward_ratio: float
    backward_ratio: float
    idle: float


@dataclass(frozen=True)
class SignalReport:
    """What `report` measured: a row for each layer in the order they ran; print it."""

    rows: tuple[SignalRow, ...]

    @property
    def forward_change(self) -> float:
        """The activation variance of the last hidden layer over the first's; the output is the loss's business."""
        return _product(row.forward_ratio for row in self.rows[1:-1])

    @property
    def backward_change(self) -> float:
        """The squared length of the error signal at the first layer over that at the last one."""
        return _product(row.backward_ratio for row in self.rows[:-1])

    @property
    def verdict(self) -> str:
        """ "exploding" or "vanishing" if a signal changes by more than a thousand from end to end, else "healthy"."""
        changes = [self.forward_change, self.backward_change]
        if any(change > EXPLODING for change in changes):
            return "exploding"
        return "vanishing" if any(change < VANISHING for change in changes) else "healthy"

    def __str__(self) -> str:
        titles = f"{'activation':^21}  {'error signal':^21}"
        lines = [
            f"{'':43} {titles}",
            f"{'layer':24} {'kind':8} {'followed by':12}  {'variance':>10} {'ratio':>8}  {'variance':>10} {'ratio':>8}"
            "   idle",
        ]
        for row in self.rows:
            lines.append(
                f"{row.name or '(model)':24} {row.layer:8} {row.activation:12}"
                f"  {_text(row.activation_variance):>10} {_text(row.forward_ratio):>8}"
                f"  {_text(row.error_variance):>10} {_text(row.backward_ratio):>8}  {_text(row.idle, '.0%'):>5}"
            )
        lines.append(
            f"{self.verdict}: from the first hidden layer to the last the variance of the activations changes by "
            f"{self.forward_change:.2g}, back from the output the squared length of the error signal by "
            f"{self.backward_change:.2g}; "
            f"vanishing is below {VANISHING:g}, exploding above {EXPLODING:g}."
        )
        return "\n".join(lines)


def _text(value: float, form: str = ".3g") -> str:
    return "-" if math.isnan(value) else format(value, form)


def report(model: nn.Module, x: Any) -> SignalReport:
    """Measure activations and error signals of every Linear and Conv layer in one run: do they vanish or explode?

    The model is run as it is, in its training or evaluation mode. It stays as it is: parameters and their gradients,
    buffers (the statistics of batch normalization too) and the state of torch's random numbers. The error signal
    starts at the output as normal noise of variance 1, the same at every call.

    Args:
        model: a module whose outputs are, or hold, floating-point tensors.
        x: a batch of inputs, examples along the first dimension, or a tuple or list of several inputs.

    Raises:
        ValueError: the model has no Linear or Conv layer that ran, or no floating-point output.

    Example:
        >>> import torch
        >>> from torch_bp import nn
        >>> layers = [part for _ in range(10) for part in (nn.Linear(50, 50), nn.Sigmoid())]
        >>> model, x = nn.Sequential(*layers), torch.randn(20, 50)
        >>> _ = nn.init.auto_(model)
        >>> nn.init.report(model, x).verdict
        'vanishing'
    """
    measured: dict[int, tuple[float, float]] = {}

    def measure(call: Call, output: Tensor, follower: Follower | None) -> None:
        measured[id(call)] = _variance(output), _idle(output, follower)

    calls, outputs = seen(model, x, measure)
    if not calls or not outputs:
        what = "a floating-point output" if calls else "Linear or Conv layers that run"
        raise ValueError(f"report: model must have {what}, got none in {type(model).__name__}.")
    errors = _error_signals(calls, outputs)
    variances = [measured[id(call)][0] for call in calls]
    lengths = [_NAN if e is None else _square(e) for e in errors]
    rows = []
    for k, (call, error) in enumerate(zip(calls, errors)):
        rows.append(
            SignalRow(
                name=call.name,
                layer=type(call.layer).__name__,
                activation=str(agreed(call.followers)),
                activation_variance=variances[k],
                error_variance=_NAN if error is None else _variance(error),
                forward_ratio=_ratio(variances[k], variances[k - 1]) if k else _NAN,
                backward_ratio=_ratio(lengths[k], lengths[k + 1]) if k + 1 < len(calls) else _NAN,
                idle=measured[id(call)][1],
            )
        )
    return SignalReport(tuple(rows))


def _error_signals(calls: list[Call], outputs: list[Tensor]) -> list[Tensor | None]:
    """Return dL/dz of every run, None where no gradient arrives; Algorithm 1, backward pass."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    edges = [call.edge for call in calls if call.edge is not None]
    traced = [(t, v) for t, v in zip(outputs, noise) if t.requires_grad]
    if not edges or not traced:
        return [None] * len(calls)
    starts, covectors = zip(*traced)
    found = iter(torch.autograd.grad(starts, edges, covectors, allow_unused=True))
    return [None if call.edge is None else next(found) for call in calls]


def _variance(tensor: Tensor) -> float:
    return _measured(tensor.double().var(correction=0)) if tensor.numel() else _NAN


def _square(tensor: Tensor) -> float:
    return _measured(tensor.double().square().sum())


def _measured(value: Tensor) -> float:
    """Infinite where there is no finite value: NaN is what was not measured."""
    return value.nan_to_num(math.inf, math.inf).item()


def _ratio(a: float, b: float) -> float:
    """a / b; of zeros 0, since nothing arrives, and infinite from where a is."""
    if math.isnan(a) or math.isnan(b):
        return _NAN
    if math.isinf(a) or b == 0:
        return math.inf if a else 0.0
    return a / b


def _product(ratios: Iterable[float]) -> float:
    """Of those that were measured; infinite if one is."""
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return math.inf if math.inf in known else math.prod(known)


def _idle(output: Tensor, follower: Follower | None) -> float:
    name = follower.name if follower else ""
    if name in ("relu", "relu6"):
        return (output == 0).all(0).double().mean().item() if output.dim() > 1 else _NAN
    if name not in _ENDS:
        return _NAN
    low, high = _ENDS[name]
    margin = (high - low) / 100
    return ((output < low + margin) | (output > high - margin)).double().mean().item()
