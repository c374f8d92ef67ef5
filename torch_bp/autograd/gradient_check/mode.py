"""Other ways to the same derivatives: forward mode, and gradients of many signals at once by `vmap`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError

from torch_bp.autograd.gradient_check.passes import Passes, close, signals_like
from torch_bp.autograd.gradient_check.slope import Signal, Slopes, covector_like
from torch_bp.autograd.gradient_check.subject import flat, real


def check_forward(passes: Passes, slopes: Slopes, signal: Signal | None) -> None:
    """Raise unless forward mode gives the slopes of backward, or else those of differences, along a direction each.

    Args:
        signal: of a backward that is right, or None. It is exact, also at kinks.
    """
    for name in passes.subject.checked:
        if not passes.subject.tensors[name].numel():
            continue
        direction = slopes.random(name)
        moved = direction if signal else slopes.difference(name, direction, slopes.eps).moved
        terms = passes.covector * _tangents(passes, name, moved)
        found, size = terms.sum().item(), terms.norm().item()
        if signal is not None:
            products = signal.gradients[name] * moved
            off, size = abs(found - products.sum().item()), max(size, products.norm().item())
            if off <= passes.slack * max(size, 1e-3 * passes.values.norm().item()):
                continue
        # the gradient along `moved` that has this slope, for the comparison that knows about kinks
        along = Signal(passes.covector, {name: moved * (found / torch.dot(moved, moved).item())})
        probe = slopes.probe(name, along, direction, size)
        if probe.error <= slopes.rtol or (probe.kink and probe.between):
            continue
        raise GradcheckError(
            f"forward mode along a direction of {name} gives {found:.6g} but should give {probe.numeric:.6g} "
            "(numeric); correct jvp, or move the point if it is at a kink."
        )


def _tangents(passes: Passes, name: str, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return flat([*_pushed(passes, name, _like(direction, passes.subject.tensors[name]))])


def _like(direction: Tensor, tensor: Tensor) -> Tensor:
    d = direction.view(real(tensor).shape).to(tensor.device, tensor.dtype.to_real())
    return torch.view_as_complex(d.clone()) if tensor.is_complex() else d.clone()


def _pushed(passes: Passes, name: str, tangent: Tensor) -> tuple[Tensor, ...]:
    """Return the tangents of the outputs inside a dual level; zeros where forward mode gives none."""
    subject = passes.subject
    dual = forward_ad.make_dual(subject.tensors[name], tangent)  # may have to be differentiated backward, too
    unpacked = [forward_ad.unpack_dual(t) for t in subject.outputs(subject.tensors | {name: dual})]
    return tuple(torch.zeros_like(u.primal) if u.tangent is None else u.tangent for u in unpacked)


def check_batched_forward(passes: Passes, slopes: Slopes) -> None:
    """Raise unless `vmap` over tangents gives what one tangent after the other gives."""
    for name in passes.subject.checked:
        tensor = passes.subject.tensors[name]
        if not tensor.numel():
            continue
        tangents = torch.stack([_like(slopes.random(name) * k, tensor) for k in (1, -2)])
        with forward_ad.dual_level():
            single = [[t.clone() for t in _pushed(passes, name, tangent)] for tangent in tangents]
            batched = _batched(f"forward mode of {name}", lambda t, name=name: _pushed(passes, name, t), tangents)
        _same(single, batched, f"forward mode of {name}", passes.slack)


def check_batched(passes: Passes) -> None:
    """Raise unless the gradients of several signals at once are those of one after the other."""
    subject, outputs = passes.subject, passes.outputs
    tensors = [subject.tensors[name] for name in subject.checked]
    signals = [signals_like(outputs, covector_like(len(passes.values), passes.dtype, seed)) for seed in (0, 1)]

    def pull(*dy: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(outputs, tensors, dy, allow_unused=True, retain_graph=True)
        return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors))

    single = [list(pull(*dy)) for dy in signals]
    stacked = [torch.stack(pair) for pair in zip(*signals)]
    _same(single, _batched("backward", pull, *stacked), "backward", passes.slack)


def _batched(what: str, function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        try:
            return torch._vmap_internals._vmap(function, allow_none_pass_through=True)(*tensors)
        except RuntimeError as error:
            raise GradcheckError(f"{what} under vmap raised: {error}") from error


def _same(single: list[list[Tensor]], batched: tuple[Tensor, ...], what: str, slack: float) -> None:
    for i, expected in enumerate(zip(*single)):
        # sums in another order: rounding, and no more than this in double precision however much cancels
        if not close(flat([batched[i]]), flat([torch.stack(expected)]), max(slack, 1e-6), least=1e-9):
            raise GradcheckError(f"{what} under vmap differs from one call after the other in result {i}.")
