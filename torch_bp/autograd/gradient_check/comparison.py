"""The verdict on one tensor: along random directions, or entry by entry; and which entry is the worst."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torch_bp.autograd.gradient_check.report import GradcheckRow
from torch_bp.autograd.gradient_check.slope import Probe, Signal, Slopes
from torch_bp.autograd.gradient_check.subject import real

_FEW = 64  # entries that are looked at one by one where directions do not tell
_DIRECTIONS = 8  # that are tried beside kinks


def compare(slopes: Slopes, name: str, signal: Signal, masked: Callable[[Tensor], Signal], full: bool) -> GradcheckRow:
    """Compare the gradient of one tensor with differences.

    Args:
        masked: makes a signal from a part of the outputs.
        full: entry by entry, else along one direction at random, or more beside kinks.
    """
    tensor = slopes.subject.tensors[name]
    shape = tuple(tensor.shape)
    if not tensor.numel():
        return GradcheckRow(name, shape)
    if full:
        return entry_by_entry(slopes, name, signal)
    direction = slopes.random(name)
    probe = slopes.probe(name, signal, direction)
    kinks = 0
    if probe.error > slopes.rtol and probe.kink and probe.between:
        probe, signal, kinks = _beside_kinks(slopes, name, signal, masked, direction, probe)
    if probe.error <= slopes.rtol:
        return _row(slopes, name, probe, kinks=kinks)
    if probe.kink and probe.between:
        return GradcheckRow(name, shape, failure=_unchecked(name, kinks), kinks=kinks)
    return _worst(slopes, name, signal, direction, probe, kinks)


def _beside_kinks(
    slopes: Slopes, name: str, signal: Signal, masked: Callable[[Tensor], Signal], direction: Tensor, probe: Probe
) -> tuple[Probe, Signal, int]:
    """Return a comparison that crosses no kink, if there is one, its signal, and how many were dropped."""
    smooth, kinks = probe.smooth, 1
    if smooth is not None and smooth.any():
        signal = masked(smooth)
        probe = slopes.probe(name, signal, direction)
        if not probe.kink:
            return probe, signal, kinks
    passed = probe
    for other in _others(slopes, name):
        found = slopes.probe(name, signal, other)
        if found.error > slopes.rtol and not (found.kink and found.between):
            return found, signal, kinks
        if found.error > slopes.rtol:
            kinks += 1
        elif passed is probe or other.count_nonzero() > 1:
            passed = found
    return passed, signal, kinks


def _others(slopes: Slopes, name: str) -> Iterator[Tensor]:
    n = real(slopes.subject.tensors[name]).numel()
    if n <= _FEW:
        yield from torch.eye(n, dtype=torch.float64, device="cpu")
    else:
        for k in range(_DIRECTIONS):
            yield slopes.random(name, kept=max(0.5 ** (k + 1), 2 / n))


def _worst(slopes: Slopes, name: str, signal: Signal, direction: Tensor, probe: Probe, kinks: int) -> GradcheckRow:
    """Return the row of a wrong gradient, with the entry that is worst."""
    if len(direction) <= _FEW:
        row = entry_by_entry(slopes, name, signal, kinks)
        if row.failure:
            return row
    part = direction.clone()
    while part.count_nonzero() > 1:
        moving = part.nonzero().view(-1)
        halves = []
        for chosen in moving.chunk(2):
            half = torch.zeros_like(part).index_copy_(0, chosen, part[chosen])
            found = slopes.compare(name, signal, slopes.difference(name, half, probe.difference.step))
            halves.append((abs(found.analytic - found.numeric), half))
        part = max(halves, key=lambda pair: pair[0])[1]
    index = int(part.abs().argmax())
    entry = slopes.probe(name, signal, torch.zeros_like(part).index_fill_(0, torch.tensor([index], device="cpu"), 1.0))
    if entry.error <= slopes.rtol:
        return _row(slopes, name, probe, kinks=kinks, ratio=_ratio(slopes, name, signal))
    return _row(slopes, name, entry, index, kinks, _ratio(slopes, name, signal))


def entry_by_entry(slopes: Slopes, name: str, signal: Signal, kinks: int = 0) -> GradcheckRow:
    """Compare every entry; those at a kink are counted and left out."""
    tensor = slopes.subject.tensors[name]
    n = real(tensor).numel()
    numeric, analytic, floor = (torch.zeros(n, dtype=torch.float64, device="cpu") for _ in range(3))
    unit = torch.zeros(n, dtype=torch.float64, device="cpu")
    for i in range(n):
        unit.zero_()[i] = 1
        difference = slopes.difference(name, unit, slopes.eps)
        probe = slopes.compare(name, signal, difference)
        analytic[i], numeric[i] = probe.analytic, probe.numeric
        floor[i] = slopes.floor(signal, difference, 0.0) if slopes.tells(probe, signal) else -1.0
    told = numeric.abs().nan_to_num(0, 0, 0) * (floor >= 0)
    largest = told.max().item() / 20 if slopes.atol is None else 0.0
    scale = torch.maximum(torch.maximum(analytic.abs(), numeric.abs()), floor.clamp(min=largest))
    error = ((analytic - numeric).abs() / scale).where(analytic != numeric, 0.0).nan_to_num(torch.inf, torch.inf)
    checked = n
    for i in ((error > slopes.rtol) | (floor < 0)).nonzero().view(-1).tolist():
        unit.zero_()[i] = 1
        probe = slopes.probe(name, signal, unit, largest if floor[i] >= 0 else 0.0)
        if probe.error > slopes.rtol and probe.kink and probe.between:
            kinks, checked, error[i] = kinks + 1, checked - 1, -1.0
        else:
            analytic[i], numeric[i], error[i] = probe.analytic, probe.numeric, probe.error
    if not checked:
        return GradcheckRow(name, tuple(tensor.shape), failure=_unchecked(name, kinks), kinks=kinks)
    i = int(error.argmax())
    worst = Probe(analytic[i].item(), numeric[i].item(), error[i].item(), difference)
    return _row(slopes, name, worst, i, kinks, ratio_of(analytic, numeric, slopes.rtol))


def _ratio(slopes: Slopes, name: str, signal: Signal) -> float | None:
    """Return by what the analytic gradient is off, if it is the same along some directions at random."""
    found = []
    for _ in range(3):
        d = slopes.difference(name, slopes.random(name), slopes.eps)
        probe = slopes.compare(name, signal, d)
        found.append((probe.analytic, probe.numeric))
    analytic, numeric = torch.tensor(found, dtype=torch.float64, device="cpu").T
    return ratio_of(analytic, numeric, slopes.rtol)


def ratio_of(analytic: Tensor, numeric: Tensor, rtol: float) -> float | None:
    """Return the factor between two vectors, if there is one and it is not 1; 0 if `analytic` is 0."""
    if not analytic.any():
        return 0.0
    ratio = ((analytic * numeric).sum() / numeric.square().sum()).item()
    if abs(ratio - 1) > 1e-3 and (analytic - ratio * numeric).abs().max() <= 10 * rtol * numeric.abs().max():
        return ratio
    return None


def _row(
    slopes: Slopes, name: str, probe: Probe, index: int | None = None, kinks: int = 0, ratio: float | None = None
) -> GradcheckRow:
    tensor = slopes.subject.tensors[name]
    where = None
    if index is not None:
        place = index // 2 if tensor.is_complex() else index
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(place, device="cpu"), tensor.shape))
    a, n, failure = probe.analytic, probe.numeric, ""
    if probe.error > slopes.rtol:
        at = "along a random direction" if where is None else f"at index {where}"
        part = " (imaginary part)" if tensor.is_complex() and index is not None and index % 2 else ""
        failure = (
            f"the gradient of {name} {at}{part} is {a:.6g} (analytic) but should be {n:.6g} (numeric), "
            f"relative error {probe.error:.1e}, tolerance {slopes.rtol:.0e}: {_cause(ratio, probe)}"
        )
    return GradcheckRow(name, tuple(tensor.shape), max(probe.error, 0.0), where, a, n, failure, kinks)


def _cause(ratio: float | None, probe: Probe) -> str:
    if ratio == 0:
        return "autograd gives None or zeros, yet the output depends on it; look for detach, .data or a returned None."
    if ratio is not None:
        return f"it is {ratio:.4g} times the numeric gradient in every entry."
    if probe.numeric != probe.numeric:
        return "correct the backward, or move the point if an end of the domain is within eps of it."
    return "correct the backward."


def _unchecked(name: str, kinks: int) -> str:
    return (
        f"the gradient of {name} could not be checked: the function has a kink at the point along each of {kinks} "
        "directions; move the point."
    )
