"""Softmax, eq. 16, and its logarithm, along one dimension.

    y = softmax(z):      dz = y (dy - sum of y dy)
    y = log_softmax(z):  dz = dy - softmax(z) (sum of dy),  softmax(z) = exp(y)

Sums run along the dimension. Shapes: z, y and dy alike. Saved: the output. Both Jacobians are seen here as matrices
per row; softmax's is symmetric, so forward mode is the same line with a tangent in the place of dy.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]
from torch.overrides import handle_torch_function, has_torch_function_unary

from torch_bp.autograd.function import Function, cast_apply, overridden, save, under_autocast
from torch_bp.kernels import exp, formula, row_sum
from torch_bp.ops.rows import from_rows, to_rows


@formula(per_row=())
def softmax_backward(dy, y):
    """eq. 16: the error signal at z from the one at softmax(z)."""
    return y * (dy - row_sum(dy * y))


@formula(per_row=())
def log_softmax_backward(dy, y):
    """The error signal at z from the one at log_softmax(z)."""
    return dy - exp(y) * row_sum(dy)


@formula(per_row=())
def log_softmax_tangent(dz, y):
    """The change of log_softmax(z) with z."""
    return dz - row_sum(exp(y) * dz)


def _by_rows(slope: Callable[..., torch.Tensor], d: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    return from_rows(slope(to_rows(d, dim), to_rows(y, dim)), y, dim)


class _AlongDimension(Function):
    """What both keep: the output and the dimension."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        save(ctx, output)
        ctx.dim = inputs[1]


class Softmax(_AlongDimension):
    """eq. 16."""

    equations = ("y = softmax(z), eq. 16", "dz = y (dy - sum of y dy), eq. 16")

    @staticmethod
    def forward(z: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.softmax(z, dim)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        (y,) = ctx.saved_tensors
        return _by_rows(softmax_backward, dy, y, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, dz: torch.Tensor, _: None) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return _by_rows(softmax_backward, dz, y, ctx.dim)


class LogSoftmax(_AlongDimension):
    """log(softmax(z)), computed without the intermediate that underflows."""

    equations = ("y = log(softmax(z))", "dz = dy - softmax(z) (sum of dy)")

    @staticmethod
    def forward(z: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.log_softmax(z, dim)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        (y,) = ctx.saved_tensors
        return _by_rows(log_softmax_backward, dy, y, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, dz: torch.Tensor, _: None) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return _by_rows(log_softmax_tangent, dz, y, ctx.dim)


def _along(
    function: type[Function], name: str, input: torch.Tensor, dim: int | None, stacklevel: int, dtype: Any
) -> torch.Tensor:
    if dim is None:
        dim = _get_softmax_dim(name, input.dim(), stacklevel + 1)
    if dtype is not None:
        input = input.to(dtype)
    elif input.is_cuda and under_autocast(input):  # on the CPU torch leaves the dtype as it is
        return cast_apply(function, torch.float32, input, dim)
    if input.is_nested:  # ragged rows are torch's alone
        return function.forward(input, dim)
    return function.apply(input, dim)


def softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """As `torch.nn.functional.softmax`; eq. 16.

    Example:
        >>> softmax(torch.zeros(2), dim=0)
        tensor([0.5000, 0.5000])
    """
    if has_torch_function_unary(input) and overridden():
        return handle_torch_function(softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)
    return _along(Softmax, "softmax", input, dim, _stacklevel, dtype)


def log_softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """As `torch.nn.functional.log_softmax`.

    Example:
        >>> log_softmax(torch.zeros(2), dim=0)
        tensor([-0.6931, -0.6931])
    """
    if has_torch_function_unary(input) and overridden():
        return handle_torch_function(log_softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)
    return _along(LogSoftmax, "log_softmax", input, dim, _stacklevel, dtype)
