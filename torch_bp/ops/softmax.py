"""Softmax, eq. 16, and its logarithm, along one dimension.

    y = softmax(z):      dz = y (dy - sum of y dy)
    y = log_softmax(z):  dz = dy - softmax(z) (sum of dy),  softmax(z) = exp(y)

Sums run along the dimension. Shapes: z, y and dy alike. Saved: the output. Both Jacobians are seen here as matrices
per row; softmax's is symmetric, so forward mode is the same line with a tangent in the place of dy.
"""

from typing import Any

import torch
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]
from torch.overrides import handle_torch_function, has_torch_function_unary

from torch_bp.autograd.function import Function, cast_apply, save, under_autocast

_HALF = (torch.float16, torch.bfloat16)


def _accurate(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Half precision is summed in float32, as torch does."""
    return tuple(t.float() if t.dtype in _HALF else t for t in tensors)


def softmax_backward(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    """eq. 16: the error signal at z from the one at softmax(z)."""
    wide_dy, wide_y = _accurate(dy, y)
    product = wide_dy * wide_y
    return torch.addcmul(product, wide_y, product.sum(dim, keepdim=True), value=-1).to(y.dtype)


def log_softmax_backward(dy: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    """The error signal at z from the one at log_softmax(z)."""
    wide_dy, wide_y = _accurate(dy, y)
    return torch.addcmul(wide_dy, wide_y.exp(), wide_dy.sum(dim, keepdim=True), value=-1).to(y.dtype)


class Softmax(Function):
    """eq. 16."""

    @staticmethod
    def forward(z: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.softmax(z, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        save(ctx, output)
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        (y,) = ctx.saved_tensors
        return softmax_backward(dy, y, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, dz: torch.Tensor, _: None) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return softmax_backward(dz, y, ctx.dim)


class LogSoftmax(Function):
    """log(softmax(z)), computed without the intermediate that underflows."""

    @staticmethod
    def forward(z: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.log_softmax(z, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        save(ctx, output)
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        (y,) = ctx.saved_tensors
        return log_softmax_backward(dy, y, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, dz: torch.Tensor, _: None) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        wide_dz, wide_y = _accurate(dz, y)
        return (wide_dz - (wide_y.exp() * wide_dz).sum(ctx.dim, keepdim=True)).to(y.dtype)


def _along(
    function: type[Function], name: str, input: torch.Tensor, dim: int | None, stacklevel: int, dtype: Any
) -> torch.Tensor:
    if dim is None:
        dim = _get_softmax_dim(name, input.dim(), stacklevel + 1)
    if dtype is not None:
        input = input.to(dtype)
    elif input.is_cuda and under_autocast(input):  # on the CPU torch leaves the dtype as it is
        return cast_apply(function, torch.float32, input, dim)
    return function.apply(input, dim)


def softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """As `torch.nn.functional.softmax`; eq. 16.

    Example:
        >>> softmax(torch.zeros(2), dim=0)
        tensor([0.5000, 0.5000])
    """
    if has_torch_function_unary(input):
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
    if has_torch_function_unary(input):
        return handle_torch_function(log_softmax, (input,), input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)
    return _along(LogSoftmax, "log_softmax", input, dim, _stacklevel, dtype)
