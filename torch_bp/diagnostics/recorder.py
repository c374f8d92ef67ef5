"""What the buffers hold at the end of a step that is recorded, of one process or of all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

from torch_bp.diagnostics.layer import Layer
from torch_bp.diagnostics.measurements import AFTER, BACKWARD, BEFORE, KINDS, Measurements
from torch_bp.diagnostics.quantities import first_of
from torch_bp.diagnostics.reading import PLACES


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
