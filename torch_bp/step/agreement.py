"""Whether the gradients of an explicit pass are right: the same as autograd's, and as central differences, eq. 17.

*Autograd*: the model and the loss run once more, on the same numbers, with a graph. The error of a parameter is
|dW - dW'| / max(|dW|, |dW'|), of norms. The bias before a normalization has a gradient that is zero but for rounding:
no norm, and no slope below, counts as less than a thousandth of the largest in the same module.

*Central differences*: the pass runs in float64 on a copy of the parameters, and `gradcheck` compares it along one
direction for each parameter: half of it the gradient itself, so that the slope is not lost in rounding, half random, so
that no error is perpendicular to it. Two forward passes for a parameter of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._pytree import tree_map_only

from torch_bp.autograd import gradcheck
from torch_bp.step.isolated import isolated
from torch_bp.step.line import Passes

# Largest relative error that passes.
AUTOGRAD = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF = 3e-2
DIFFERENCES = 1e-4
_ROUNDING = 2e-15 / 6e-6 / DIFFERENCES  # of the loss, some units in its last place: a smaller slope is lost in them


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error against autograd that passes."""
    return AUTOGRAD.get(dtype, HALF)


def against_autograd(
    passes: Passes,
    modules: Sequence[torch.nn.Module],
    inputs: Any,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return by the name of a parameter the relative error."""
    inputs = tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)
    with torch.enable_grad(), isolated(modules, apart=True) as stand_ins:
        leaves = [stand_ins[p] for p in parameters.values()]
        with passes.autocast(leaves):
            loss = passes.loss_fn(passes.model(*inputs[0]), *inputs[1])
        found = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
    norms = {}
    for name, theirs in zip(parameters, found):
        mine = gradients.get(name)
        both = [_norm(g) for g in (mine, theirs) if g is not None]
        apart = _norm(mine - theirs) if mine is not None and theirs is not None else max(both, default=0.0)
        norms[name] = apart, max(both, default=0.0)
    return _errors(norms, 0.0)


def against_differences(
    passes: Passes, modules: Sequence[torch.nn.Module], inputs: Any, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, float], str]:
    """Return by the name of a parameter the relative error, and why it could not be told of others, or of any."""
    passes = Passes(passes.model, passes.loss_fn, passes.fallback)  # in the precision of what is given
    autocasting = {t.device.type for t in parameters.values()}
    inputs = tree_map_only(Tensor, lambda t: t.detach().double() if t.is_floating_point() else t.detach(), inputs)
    try:
        with torch.no_grad(), _Disabled(autocasting), isolated(modules, dtype=torch.float64) as stand_ins:
            leaves = [stand_ins[p] for p in parameters.values()]
            found = _differences(passes, modules, inputs, dict(zip(parameters, leaves)))
            doubtful = [name for name in parameters if not found.get(name, math.inf) <= DIFFERENCES]
            if doubtful:
                _move_aside(leaves)
                beside = _differences(passes, modules, inputs, dict(zip(parameters, leaves)))
                found |= {name: beside[name] for name in doubtful if name in beside}
    except GradcheckError as error:
        return {}, f"no central differences: {error}"
    except Exception as error:  # of the user's model, which need not run in float64
        return {}, f"no central differences: in float64, {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    at_kinks = [name for name in parameters if name not in found]
    remark = f"no central differences for {', '.join(at_kinks)}: the loss has a kink there" if at_kinks else ""
    return found, remark


def _differences(
    passes: Passes, modules: Sequence[torch.nn.Module], inputs: Any, leaves: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return relative errors by name, but for where the loss has a kink."""
    steps = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in leaves]
    along = _along(passes, modules, inputs, list(leaves.values()))
    report = gradcheck(along, tuple(steps), atol=1e-30, raise_exception=False)
    if not report.rows:
        raise GradcheckError(report.failure)
    slopes = {
        name: (abs(row.analytic - row.numeric), max(abs(row.analytic), abs(row.numeric)))
        for name, row in zip(leaves, report.rows)
    }
    errors = _errors(slopes, abs(float(_loss(passes, modules, inputs))) * _ROUNDING)
    return {name: errors[name] for name, row in zip(leaves, report.rows) if not row.kinks}


def _move_aside(leaves: Sequence[Tensor]) -> None:
    """Move parameters by a thousandth of their size, to where the loss has no kinks.

    At the start it often has: biases are 0, and where a layer gives zeros the next one asks ReLU for its slope at 0. A
    difference that goes through several kinks at once tells nothing, and a wrong backward is as wrong nearby.
    """
    generator = torch.Generator().manual_seed(1)
    for p in leaves:
        size = max(float(p.square().mean().sqrt()), 0.1) if p.numel() else 0.0
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device), alpha=1e-3 * size)


def _along(
    passes: Passes, modules: Sequence[torch.nn.Module], inputs: Any, leaves: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """Return the loss as a function of one step for each parameter, with the explicit pass as its backward."""
    centres = [p.detach().clone() for p in leaves]
    slopes = _slopes(passes, modules, inputs, leaves)
    generator = torch.Generator().manual_seed(0)
    directions = [
        (_unit(torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)) + _unit(slope)).view_as(p)
        for p, slope in zip(leaves, slopes)
    ]
    at = [0.0] * len(leaves)

    def move(steps: Sequence[Tensor]) -> None:
        for k, step in enumerate(map(float, steps)):
            if step != at[k]:
                leaves[k].copy_(centres[k] + step * directions[k])
                at[k] = step

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *steps: Tensor) -> Tensor:
            ctx.save_for_backward(*steps)
            move(steps)
            return _loss(passes, modules, inputs)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            with torch.no_grad():
                move(ctx.saved_tensors)
                slopes = _slopes(passes, modules, inputs, leaves)
                return tuple(dy * (slope * d).sum().to(dy) for slope, d in zip(slopes, directions))

    return Loss.apply


def _loss(passes: Passes, modules: Sequence[torch.nn.Module], inputs: Any) -> Tensor:
    inputs = tree_map_only(Tensor, torch.clone, inputs)
    with isolated(modules):
        loss = passes.loss_fn(passes.model(*inputs[0]), *inputs[1])
    if loss.dtype is not torch.float64:
        raise TypeError(f"the loss of float64 parameters and inputs is of {loss.dtype}: the model rounds")
    return loss.reshape(()).cpu()


def _slopes(passes: Passes, modules: Sequence[torch.nn.Module], inputs: Any, leaves: Sequence[Tensor]) -> list[Tensor]:
    inputs = tree_map_only(Tensor, torch.clone, inputs)
    with isolated(modules):
        _, gradients = passes.run(inputs, leaves, 1.0)
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(leaves, gradients)]


class _Disabled:
    """No autocast on some kinds of devices."""

    def __init__(self, kinds: set[str]) -> None:
        self._contexts = [torch.autocast(kind, enabled=False) for kind in sorted(kinds)]

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *details: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*details)


def _unit(t: Tensor) -> Tensor:
    norm = _norm(t)
    return t / norm if norm > 0 and math.isfinite(norm) else t


def _norm(t: Tensor) -> float:
    t = t.detach().to_dense()
    return float(torch.linalg.vector_norm(t if t.is_complex() else t.double()))


def _errors(found: Mapping[str, tuple[float, float]], floor: float) -> dict[str, float]:
    """Return relative errors, of differences and sizes by the name of a parameter."""
    owners = {name: name.rpartition(".")[0] for name in found}
    largest: dict[str, float] = {}
    for name, (_, size) in found.items():
        largest[owners[name]] = max(size, largest.get(owners[name], 0.0))
    return {
        name: apart / max(size, largest[owners[name]] / 1000, floor) if apart else 0.0
        for name, (apart, size) in found.items()
    }
