"""When a step is recorded, and what of it: one copy to the host a record, read when the next step is over."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

from torch_bp.diagnostics.layer import Layer
from torch_bp.diagnostics.measurements import AFTER, BACKWARD, BEFORE, KINDS, Measurements
from torch_bp.diagnostics.quantities import first_of

PLACES = 8  # of examples that are not finite
_log = logging.getLogger(__name__)
_WINDOW = 20  # steps of each sort that are compared
_ENOUGH = 6
_START = 3  # steps that are not compared: they compile and allocate


class Cadence:
    """Which steps are recorded: every n-th, and rarer if that costs more than the budget.

    The share of the monitor is what steps that are recorded take longer than the others, and what writing takes, over
    the steps from one record to the next. To have others, every second step at most is recorded as long as the share is
    not known.

    Args:
        every: distance of records in steps.
        budget: largest share of the time of training, 0.02 for 2 %; None records every n-th step whatever it costs.
    """

    def __init__(self, every: int, budget: float | None) -> None:
        self.every, self.budget = every, budget
        self.share: float | None = None
        self._asked = every
        self._recorded: deque[float] = deque(maxlen=_WINDOW)
        self._plain: deque[float] = deque(maxlen=_WINDOW)
        self._writing: deque[float] = deque(maxlen=_WINDOW)
        self._said = False

    def records(self, step: int) -> bool:
        """Whether this step is recorded: a function of the step alone, as long as the distance stays."""
        every = self.every
        if self.budget is not None and self.share is None:
            every = max(every, 2)
        return step % every == 0

    @property
    def seconds(self) -> float | None:
        """How long a step takes that is not recorded."""
        return statistics.median(self._plain) if self._plain else None

    def tell(self, step: int, recorded: bool, seconds: float, writing: float) -> None:
        """How long a step has taken without writing, and writing besides."""
        if step < _START:
            return
        (self._recorded if recorded else self._plain).append(seconds)
        if recorded:
            self._writing.append(writing)
        if len(self._recorded) < _ENOUGH or len(self._plain) < _ENOUGH:
            return
        plain = statistics.median(self._plain)
        extra = statistics.median(self._recorded) - plain + statistics.fmean(self._writing)
        share = max(extra, 0.0) / plain if plain else 0.0  # of one record
        if self.budget is None:
            self.share = share / self.every
            return
        wanted = max(self._asked, -int(-share // self.budget)) if self.budget else self.every
        if self.share is None or wanted > 1.5 * self.every:
            self._adapt(wanted, share)
        self.share = share / self.every

    def _adapt(self, wanted: int, share: float) -> None:
        if wanted > self.every and not self._said:
            self._said = True
            _log.warning(
                "watch: recording a step takes %.1f %% of it, so every %d-th is recorded and not every %d-th, to stay "
                "within %.1f %%; budget=None records as told, a lower level costs less.",
                100 * share,
                wanted,
                self.every,
                100 * self.budget,  # type: ignore[operator]
            )
        self.every = max(self.every, wanted)


def signals(measurements: Measurements, reduce: bool) -> dict[str, Tensor]:
    """What the buffers hold at the end of a step, of all processes if `reduce`."""
    found: dict[str, Tensor] = {"signals": measurements.values.clone()}
    for index, counts in measurements.units.items():
        if index in measurements.rows:
            found[f"units {index}"] = counts.clone()
            found[f"rows {index}"] = torch.tensor(float(measurements.rows[index]), dtype=torch.float64)
    if measurements.examples:
        found["examples"] = _examples(measurements.examples)
    if reduce:
        _reduce(found, len(measurements.layers))
    for index, causes in measurements.causes.items():
        found[f"causes {index}"] = causes
        bias = bias_of(measurements.layers[index])
        if bias is not None:
            found[f"bias {index}"] = bias
    if measurements.not_finite:
        found["bad examples"] = _places(list(measurements.not_finite.values()))
    for (index, kind), histogram in measurements.histograms.items():
        found[f"histogram {index} {kind}"] = histogram
    return found


def _places(by_slot: Sequence[Sequence[Tensor]]) -> Tensor:
    """Where the first examples lie that are not finite, (slots, `PLACES`); infinite where there are no more."""
    counts = [torch.cat(list(of_one)) if len(of_one) > 1 else of_one[0] for of_one in by_slot]
    found = torch.full((len(counts), PLACES), math.inf, dtype=torch.float64, device=counts[0].device)
    if len({(len(c), c.device) for c in counts}) == 1:
        first = first_of(torch.stack(counts), PLACES)
        found[:, : first.shape[1]] = first
        return found
    for row, count in zip(found, counts):
        first = first_of(count[None], PLACES)[0]
        row[: len(first)] = first
    return found


def bias_of(layer: Layer) -> Tensor | None:
    """The bias of what feeds the activation: the layer, or its norm."""
    return getattr(layer.module if layer.norm is None else layer.norm, "bias", None)


def _examples(by_layer: Mapping[int, Sequence[Tensor]]) -> Tensor:
    """Count, sum, sum of squares, least and largest of the norms of each layer, and of all layers together."""
    squares = [torch.cat([t.reshape(-1) for t in of_one]).double() for of_one in by_layer.values()]
    if all(len(s) == len(squares[0]) for s in squares):
        squares.append(torch.stack([s.to(squares[0].device) for s in squares]).sum(0))
    else:  # layers that have not seen each example once
        squares.append(squares[0].new_zeros(0))
    full = [s for s in squares if len(s)]
    device = squares[0].device
    if len(full) == len(squares) and len({s.device for s in squares}) == 1:
        return _spreads(torch.stack(squares))
    rows = [
        _spreads(s[None])[0].to(device) if len(s) else torch.zeros(5, dtype=torch.float64, device=device)
        for s in squares
    ]
    return torch.stack(rows)


def _spreads(squares: Tensor) -> Tensor:
    norms = squares.sqrt()
    count = torch.full_like(norms[:, 0], norms.shape[1])
    low, high = norms.aminmax(dim=1)
    return torch.stack([count, norms.sum(1), squares.sum(1), low, high], dim=1)


def _reduce(found: dict[str, Tensor], layers: int) -> None:
    """Sum over processes. The loss is the mean of theirs, so gradients of it are smaller by their number."""
    world = distributed.get_world_size()
    values = found["signals"]
    kinds = torch.arange(values.shape[0], device=values.device) % KINDS
    gradient = (kinds == BACKWARD) | (kinds == AFTER) | (kinds == BEFORE)
    gradient[KINDS * layers] = False
    values[:, 1] /= torch.where(gradient, world, 1)
    values[:, 2] /= torch.where(gradient, world**2, 1)
    summed = [name for name in found if name.split()[0] in ("signals", "units", "rows")]
    flat = torch.cat([found[name].reshape(-1).to(values.device) for name in summed])
    distributed.all_reduce(flat)
    for name, part in zip(summed, flat.split([found[name].numel() for name in summed])):
        found[name] = part.view(found[name].shape)
    if "examples" in found:
        sums_, low, high = (part.contiguous() for part in found["examples"].split([3, 1, 1], dim=1))
        distributed.all_reduce(sums_)
        distributed.all_reduce(low, distributed.ReduceOp.MIN)
        distributed.all_reduce(high, distributed.ReduceOp.MAX)
        found["examples"] = torch.cat([sums_, low, high], dim=1)
