"""A step that clips, clears and measures gradients in the pass that it makes over memory anyway."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels.extras import Extras
from torch_bp.kernels.norm import ratio, total_of_squares


@dataclass(frozen=True)
class FusedStep:
    """What `fused_step` returns.

    Attributes:
        params: the parameters that were updated, in the order of the groups (n).
        total_norm: norm of all gradients before they were clipped, a tensor () in float64; None without `max_norm`.
        grad_norms, weight_norms, update_norms: of each of `params`, (n) in float64: norm of the gradient as it is in
            memory, of the weight before the step, and of what the step changed; None without `norms`.
    """

    params: list[Tensor]
    total_norm: Tensor | None = None
    grad_norms: Tensor | None = None
    weight_norms: Tensor | None = None
    update_norms: Tensor | None = None


def _with_gradient(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


def fused_step(
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: float | None = None,
    scale: float | Tensor | None = None,
    zero_grad: bool = False,
    norms: bool = False,
) -> FusedStep:
    """`optimizer.step()` that also clips, clears and measures gradients, in the same pass over memory.

    With `max_norm` it does what `torch.nn.utils.clip_grad_norm_`, `step` and `zero_grad(set_to_none=False)` do one
    after the other. The total norm has to be known first, which reads the gradients once more; then the update
    multiplies each gradient g as it reads it,

        g <- g min(1, max_norm / (total_norm + 1e-6)),

    and the gradients in memory stay as they were, unless `zero_grad` clears them. It does not go through a
    `torch.amp.GradScaler`, whose `step` skips gradients that have overflowed: use that there. Sparse, complex and
    distributed gradients, and whatever else a list kernel may not serve, are scaled, cleared and measured by operations
    of their own, with the same result. An update is measured as it is in memory, rounded to the parameter's dtype: in
    half precision a small one may be nothing.

    Args:
        optimizer: of `torch_bp.optim`, or a `RuleOptimizer`. Its hooks run as in `step`.
        max_norm: the gradients of all groups together are scaled down to this norm; at least 0. Default: not clipped.
            A total norm that is not finite spreads as in torch.
        scale: multiplies every gradient, a number or a one-element tensor: for a coefficient that is known from
            elsewhere, as from the gradients of all ranks. Goes without `max_norm`. Default: none.
        zero_grad: set the gradients to zero in memory. Default: False.
        norms: measure gradient, weight and update of each parameter. Default: False.

    Returns:
        A `FusedStep` with the norms that were asked for. Nothing is copied to the host.

    Raises:
        TypeError: the optimizer is not one of torch_bp, or is a wrapper around one; `scale` is no number.
        RuntimeError: the optimizer is applied in the backward.
        ValueError: `max_norm` is negative or NaN, `scale` has several elements, or both are given.

    Example:
        >>> import torch
        >>> from torch_bp import optim
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = optim.SGD([weight], lr=1.0)
        >>> (weight @ torch.tensor([3.0, 4.0])).backward()
        >>> done = optim.fused_step(optimizer, max_norm=1.0, zero_grad=True, norms=True)
        >>> weight.data, weight.grad
        (tensor([-0.6000, -0.8000]), tensor([0., 0.]))
        >>> done.total_norm, done.update_norms
        (tensor(5., dtype=torch.float64), tensor([1.0000], dtype=torch.float64))
    """
    _check(optimizer, max_norm, scale, norms)
    total_norm = None
    with torch.no_grad():
        if max_norm is not None:
            tables = optimizer.__dict__.setdefault("_norm_tables", {})
            gradients = [p.grad for p in _with_gradient(optimizer)]
            total_norm = total_of_squares(gradients, tables).sqrt()  # type: ignore[arg-type]
            scale = ratio(max_norm, total_norm).clamp(max=1.0)
    extras = Extras(scale.reshape(()) if isinstance(scale, Tensor) else scale, zero_grad, norms)
    optimizer._extras = extras  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer._extras  # type: ignore[attr-defined]
    if zero_grad:
        for group in optimizer.param_groups:
            for p in group["params"]:
                gradient = p.grad
                if gradient is None:
                    continue
                if gradient.requires_grad:
                    p.grad = gradient = gradient.detach()
                if id(p) not in extras.clean:
                    gradient.zero_()
    done = {id(p) for p in extras.params}
    # in the order of the groups; a hook may have cleared gradients
    params = [p for group in optimizer.param_groups for p in group["params"] if id(p) in done]
    return FusedStep(params, total_norm, *(extras.norms(params) if norms else ()))


def _check(optimizer: Any, max_norm: float | None, scale: Any, norms: bool) -> None:
    if "param_groups" not in getattr(optimizer, "__dict__", {}):
        raise TypeError(
            f"fused_step: optimizer must be the optimizer itself, got {type(optimizer).__name__}; a wrapper has it as "
            "`.optimizer`."
        )
    if not hasattr(getattr(optimizer, "rule", None), "formula"):
        raise TypeError(
            f"fused_step: optimizer must be one of torch_bp.optim with a rule, got {type(optimizer).__module__}."
            f"{type(optimizer).__qualname__}; with another, call clip_grad_norm_, step and zero_grad."
        )
    if (max_norm is not None or scale is not None or norms) and "_applied_in_backward" in vars(optimizer):
        raise RuntimeError(
            "fused_step: gradients must be there to be clipped, scaled or measured, got an optimizer that is applied "
            "in the backward, which has used and freed them; clip by the handle's backward(loss, max_norm)."
        )
    if max_norm is not None and scale is not None:
        raise ValueError(
            f"fused_step: scale must be None where max_norm is given, got {scale} and {max_norm}; choose one."
        )
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"fused_step: max_norm must be >= 0, got {max_norm}; None does not clip.")
    if not (scale is None or isinstance(scale, int | float | Tensor)):
        raise TypeError(f"fused_step: scale must be a number or a tensor of one, got {scale!r}.")
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"fused_step: scale must have one element, got shape {tuple(scale.shape)}; pass a number.")
