"""The affine map, eq. 1: z = a W^T + b over rows, that is z_i = W a_i + b for each example i.

Shapes: a (*, I), W (O, I), b (O), z (*, O), with any leading dimensions, none included.
Backward, Algorithm 1, lines 8 and 9, with dz the error signal at z:

    da = dz W            dW = dz^T a            db = sum of dz over rows

`a` is the *post*-activation of the layer before. (Sec. 3.1 says pre-activation; Algorithm 1 has it right.)
Saved: a and W. The output is not.
"""

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_bp.autograd.function import Function, cast_apply, overridden, tangents_possible, under_autocast
from torch_bp.kernels.products import on_threads_that_pay
from torch_bp.ops.rows import to_rows

_Optional = torch.Tensor | None


def _conjugate(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.conj() if tensor.is_complex() else tensor


def _inputs(a: Any, weight: Any) -> int:
    """I; either may be None."""
    known = a if weight is None else weight
    return 0 if known is None else known.shape[-1]


def linear_forward(a: torch.Tensor, weight: torch.Tensor, bias: _Optional) -> torch.Tensor:
    """z = a W^T + b."""
    with on_threads_that_pay(a, weight.shape[0]):
        return torch.nn.functional.linear(a, weight, bias)


def linear_backward(
    dz: torch.Tensor, a: Any, weight: Any, wanted: tuple[bool, bool, bool]
) -> tuple[_Optional, _Optional, _Optional]:
    """Algorithm 1, lines 8 and 9: the gradients at a, W and b, where `wanted`; a and W may be None where not needed."""
    rows = to_rows(dz, -1)
    da = dw = db = None
    with on_threads_that_pay(dz, _inputs(a, weight)):
        if wanted[0]:
            da = dz @ _conjugate(weight)
        if wanted[1]:
            dw = rows.t() @ _conjugate(to_rows(a, -1))
    if wanted[2]:
        db = rows.sum(0)
    return da, dw, db


def linear_tangent(a: torch.Tensor, weight: torch.Tensor, da: _Optional, dw: _Optional, db: _Optional) -> Any:
    """The change of z with a, W and b."""
    terms = []
    if da is not None:
        terms.append(torch.nn.functional.linear(da, weight))
    if dw is not None:
        terms.append(torch.nn.functional.linear(a, dw))
    if db is not None:
        terms.append(db.expand(*a.shape[:-1], -1))
    return sum(terms[1:], terms[0])


class Linear(Function):
    """z = a W^T + b."""

    equations = ("z = a W^T + b, eq. 1", ("da = dz W", "dW = dz^T a", "db = sum of dz"))

    @staticmethod
    def forward(a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear_forward(a, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        a, weight, _ = inputs
        needs_da, needs_dw, _ = ctx.needs_input_grad
        if not tangents_possible():
            ctx.save_for_backward(a if needs_dw else None, weight if needs_da else None)
        else:  # vmap wants both to be alike
            ctx.save_for_backward(a, weight)
            ctx.save_for_forward(a, weight)

    @staticmethod
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, weight = ctx.saved_tensors
        return linear_backward(dz, a, weight, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, da: torch.Tensor | None, dw: torch.Tensor | None, db: torch.Tensor | None) -> Any:
        a, weight = ctx.saved_tensors
        return linear_tangent(a, weight, da, dw, db)


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `torch.nn.functional.linear`: `input` (*, I), `weight` (O, I), `bias` (O) or None give (*, O); eq. 1.

    Raises:
        RuntimeError: shapes or dtypes do not fit, in torch's words.

    Example:
        >>> linear(torch.ones(2, 3), torch.ones(1, 3), torch.ones(1))
        tensor([[4.],
                [4.]])
    """
    if has_torch_function_variadic(input, weight, bias) and overridden():
        return handle_torch_function(linear, (input, weight, bias), input, weight, bias)
    tensors = isinstance(input, torch.Tensor) and isinstance(weight, torch.Tensor)
    # torch's alone: weights (I) and biases other than (O), which eq. 1 has no place for, ragged rows, and the error
    # about what is no tensor
    if not tensors or weight.dim() != 2 or input.is_nested or (bias is not None and bias.dim() != 1):
        return torch.nn.functional.linear(input, weight, bias)
    if under_autocast(input):
        return cast_apply(Linear, None, input, weight, bias)
    return Linear.apply(input, weight, bias)
