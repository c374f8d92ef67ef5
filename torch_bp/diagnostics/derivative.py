"""The derivative f' of activations, sec. 8, and the units for which it vanishes.

f' is told from what the activation's own backward keeps, by the same formula: from the output a, or from z.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_bp import ops
from torch_bp.kernels import abs, column_sum, formula, where, zeros_like
from torch_bp.ops.pointwise import hardtanh_from_output, leaky_relu_from_output, saves_output
from torch_bp.ops.rows import to_rows

SATURATED = 0.01  # derivatives below this let next to nothing through

# What differentiates a torch activation module, and the attributes that it takes.
_ACTIVATIONS: dict[type, tuple[Any, tuple[str, ...]]] = {
    torch.nn.Sigmoid: (ops.sigmoid, ()),
    torch.nn.Tanh: (ops.tanh, ()),
    torch.nn.ReLU: (ops.relu, ()),
    torch.nn.LeakyReLU: (ops.leaky_relu, ("negative_slope",)),
    torch.nn.Hardtanh: (ops.hardtanh, ("min_val", "max_val")),
    torch.nn.ELU: (ops.elu, ("alpha",)),
    torch.nn.Softplus: (ops.softplus, ("beta", "threshold")),
    torch.nn.SiLU: (ops.silu, ()),
    torch.nn.GELU: (ops.gelu, ()),
}
_FROM_OUTPUT = {ops.leaky_relu: leaky_relu_from_output, ops.hardtanh: hardtanh_from_output}
_formulas: dict[Any, Callable[..., Tensor]] = {}


def _function(module: torch.nn.Module) -> tuple[Any, tuple[str, ...]] | None:
    """The function of torch_bp.ops whose derivative is the module's; None where it cannot be told after the forward."""
    found = next((found for kind, found in _ACTIVATIONS.items() if isinstance(module, kind)), None)
    if found is None:
        return None
    function, names = found
    if getattr(module, "approximate", "none") == "tanh":
        function = ops.gelu_tanh
    if getattr(module, "inplace", False):  # z is gone
        if getattr(module, "negative_slope", 0) < 0:
            return None
        function = _FROM_OUTPUT.get(function, function)
        if function.pointwise.saves is not saves_output:
            return None
    return function, names


def differentiable(module: torch.nn.Module) -> bool:
    """True if `active_counts` knows the module's derivative."""
    return _function(module) is not None


def from_output(module: torch.nn.Module) -> bool:
    """True if the derivative is told from a, else from z."""
    return _function(module)[0].pointwise.saves is saves_output  # type: ignore[index]


def active_counts(module: torch.nn.Module, saved: Tensor, threshold: float = SATURATED) -> Tensor:
    """For how many of the examples the derivative of each unit is at least `threshold` (O).

    Args:
        module: the activation; `differentiable`.
        saved: a (N, *, O) if `from_output`, else z.
        threshold: in absolute value. NaN counts as active: it is reported elsewhere.
    """
    function, names = _function(module)  # type: ignore[misc]
    values = {name: getattr(module, name) for name in names}
    return _counts(function.pointwise)(to_rows(saved.detach(), -1), bound=threshold, **values)


def _counts(pointwise: Any) -> Callable[..., Tensor]:
    """The formula over rows that counts, made from the formula of the derivative; one for each activation."""
    if pointwise not in _formulas:
        derivative = pointwise.derivative.formula.function

        def active(saved: Any, **keywords: Any) -> Any:
            bound = keywords.pop("bound")
            nothing = zeros_like(saved)
            slope = derivative(1 + nothing, saved, **keywords)
            return column_sum(where(abs(slope) < bound, nothing, 1))

        kinds = [inspect.Parameter("saved", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        kinds += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("bound", *pointwise.parameters)]
        active.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
        active.__name__ = active.__qualname__ = f"active_{pointwise.name}"
        _formulas[pointwise] = formula(per_row=())(active)
    return _formulas[pointwise]
