"""Gradient clipping, sec. 9.5, item 2: gradients g of all parameters, scaled or clamped in place.

    by norm      g <- min(1, max_norm / (N + 1e-6)) g,     N = the norm of all entries of all gradients
    by value     g <- min(max(g, -clip_value), clip_value)

The 2-norm is one pass over the whole list and the change another: formulas, which a kernel runs over all gradients at
once where one may serve. Nothing is read on the host: the factor stays a tensor, so that CUDA is never waited for
unless `error_if_nonfinite` asks. Torch's own functions serve gradients that are not plain floating-point memory on the
CPU or CUDA (sparse, complex, DTensor and other subclasses, other devices), other norms, few small tensors, around
which the steps of a call cost more than the arithmetic, and `torch.compile`, which fuses torch's operations itself.
"""

import types
import warnings
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
import torch.nn.utils.clip_grad

from torch_bp._mirror import mirror
from torch_bp.kernels import Table, formula, maximum, minimum
from torch_bp.kernels.norm import ratio, sum_of_squares
from torch_bp.kernels.plain import PLAIN_TYPES

_theirs = torch.nn.utils
MANY, LARGE = 32, 1 << 20  # tensors, or elements of fewer, from which a kernel is faster than torch: measured
_device_of, _dtype_of, _layout_of = (getattr(torch.Tensor, n).__get__ for n in ("device", "dtype", "layout"))
_Tensors: TypeAlias = torch.Tensor | Iterable[torch.Tensor]


@formula(updates=("grad",))
def scale(grad, *, factor):
    """By norm: every gradient times one number."""
    return factor * grad


@formula(updates=("grad",))
def clamp(grad, *, limit):
    """By value: every entry into [-limit, limit]; NaN stays."""
    return minimum(maximum(grad, -limit), limit)


def partial_norms(tensors: Sequence[torch.Tensor], norm_type: float, foreach: bool | None) -> list[torch.Tensor]:
    """Return the norms of parts of a list of one device and dtype; the norm of these is the norm of all entries.

    The one place where entries are reduced. What the parts are is free, but for `norm_type=0`, which counts, as in
    torch, the tensors that are not zero.
    """
    if norm_type == 2 and not torch.compiler.is_compiling() and _worthwhile(tensors):
        squares = sum_of_squares.formula.launch([tensors], Table(lasting=False), {})
        if squares is not None:
            return [squares[0].sum().sqrt().to(tensors[0].dtype)]
    if foreach is False:
        return [torch.linalg.vector_norm(t, norm_type) for t in tensors]
    return list(torch._foreach_norm(list(tensors), norm_type))


@torch.no_grad()
def get_total_norm(
    tensors: _Tensors, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> torch.Tensor:
    """As `torch.nn.utils.get_total_norm`: the norm of all entries of all tensors, on the device of the first.

    Args:
        tensors: of any shapes, dtypes and devices; none of them gives 0.
        norm_type: p of the p-norm, `inf` included. Default: 2.
        error_if_nonfinite: raise if the norm is NaN or infinite, which waits for the device. Default: False.
        foreach: True or None (default) for one call over each list, False for one tensor at a time.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.

    Example:
        >>> get_total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    tensors = _listed(tensors)
    if not _ordinary(tensors):
        return _theirs.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    norm_type = float(norm_type)
    if not tensors:
        return torch.tensor(0.0)
    parts = [norm for group in _groups(tensors) for norm in partial_norms(group, norm_type, foreach)]
    if len(parts) > 1 or norm_type == 0:
        parts = [torch.linalg.vector_norm(torch.stack([norm.to(tensors[0].device) for norm in parts]), norm_type)]
    total_norm = parts[0]
    if error_if_nonfinite and not total_norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    return total_norm


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: _Tensors, max_norm: float, total_norm: torch.Tensor, foreach: bool | None = None
) -> None:
    """As `torch.nn.utils.clip_grads_with_norm_`: scale the gradients so that a norm of `total_norm` becomes `max_norm`.

    Gradients are only ever made smaller.

    Args:
        parameters: whose gradients are scaled in place; those without one are passed over.
        max_norm: the largest norm that is left as it is.
        total_norm: the norm of all gradients, a tensor of one element.
        foreach: as torch's; one kernel runs over the list with or without it.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grads_with_norm_(weight, 1.0, torch.tensor(5.0))
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    parameters = _listed(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if not _for_a_kernel(grads):
        _theirs.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
        return
    factor = torch.clamp(ratio(float(max_norm), total_norm), max=1.0)
    for group in _groups(grads):
        scale.foreach_(group, factor=factor.to(group[0].device))


@torch.no_grad()
def clip_grad_norm_(
    parameters: _Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """As `torch.nn.utils.clip_grad_norm_`: scale the gradients down to a norm of at most `max_norm`; sec. 9.5, item 2.

    Args:
        parameters: whose gradients are scaled in place; those without one are passed over.
        max_norm: the largest norm that is left as it is.
        norm_type: p of the p-norm, `inf` included. Default: 2.
        error_if_nonfinite: raise if the norm is NaN or infinite, which waits for the device. Default: False, which
            makes every gradient NaN, or 0 where it was finite under an infinite norm.
        foreach: as torch's; see `get_total_norm`.

    Returns:
        The norm of all gradients before they were scaled.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    is_generator = isinstance(parameters, types.GeneratorType)
    parameters = _listed(parameters)
    if is_generator and not parameters:
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    grads = [p.grad for p in parameters if p.grad is not None]
    total_norm = get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    return total_norm


@torch.no_grad()
def clip_grad_value_(parameters: _Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """As `torch.nn.utils.clip_grad_value_`: clamp every entry of the gradients into [-clip_value, clip_value].

    Args:
        parameters: whose gradients are clamped in place; those without one are passed over. No gradient at all, which
            torch answers with an internal error, is nothing to do.
        clip_value: the largest magnitude that is left as it is.
        foreach: as torch's; one kernel runs over the list with or without it.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, -0.25])
        >>> clip_grad_value_([weight], 1.0)
        >>> weight.grad
        tensor([ 1.0000, -0.2500])
    """
    parameters = _listed(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    if not _for_a_kernel(grads):
        _theirs.clip_grad_value_(parameters, clip_value, foreach)
        return
    for group in _groups(grads):
        clamp.foreach_(group, limit=float(clip_value))


def _listed(tensors: _Tensors) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _ordinary(tensors: Sequence[torch.Tensor]) -> bool:
    """True if all are floating-point strided memory on the CPU or CUDA."""
    return (
        PLAIN_TYPES.issuperset(map(type, tensors))
        and {torch.strided}.issuperset(map(_layout_of, tensors))
        and {"cpu", "cuda"}.issuperset(device.type for device in {*map(_device_of, tensors)})
        and all(dtype.is_floating_point for dtype in {*map(_dtype_of, tensors)})
    )


def _for_a_kernel(grads: Sequence[torch.Tensor]) -> bool:
    """True if a kernel over the list may serve and is worth its while."""
    return not torch.compiler.is_compiling() and _worthwhile(grads) and _ordinary(grads)


def _worthwhile(tensors: Sequence[torch.Tensor]) -> bool:
    return len(tensors) >= MANY or sum(map(torch.Tensor.numel, tensors)) >= LARGE


def _groups(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Split into lists of one device and dtype each, in the order of their first tensors."""
    if len({*map(_device_of, tensors)}) == len({*map(_dtype_of, tensors)}) == 1:
        return [list(tensors)]
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for t in tensors:
        groups.setdefault((t.device, t.dtype), []).append(t)
    return list(groups.values())


__getattr__, __dir__, __all__ = mirror(globals(), torch.nn.utils.clip_grad)
