"""Batch normalisation, the activation after it and, if there is one, the affine map after that, as one node.

    y = w x^ + b        a = s(y)        z = a V^T + c

The three operations by themselves keep x, y or a for the activation, and a for the affine map: two tensors of the
batch's size. This node keeps x alone, beside the statistics of each channel, and computes y and a again in backward by
the operations of the forward, so that they are the same to the last bit. A network of such blocks keeps half of what
the plain one keeps; next to the matrix products the time is small.

Shapes: x, y and a (N, C), also (N, C, L) without an affine map; V (O, C), c (O), z (N, O); the rest as in `batch_norm`
and `linear`. For batch statistics in plain eager mode; everything else runs as the separate operations.
"""

from collections.abc import Callable
from typing import Any

import torch

from torch_bp.autograd.function import Function, in_parts, recomputing, under_autocast
from torch_bp.kernels.plain import eager
from torch_bp.kernels.program import HALF
from torch_bp.ops.batch_norm import BatchNorm, batch_norm, batch_norm_backward, normalizable
from torch_bp.ops.linear import linear, linear_backward
from torch_bp.ops.pointwise import saves_output

_Optional = torch.Tensor | None
_PARAMETERS = 5  # x, w, b, V, c: what gradients are for


class BatchNormActivation(Function):
    """z, or a without V, from x, and the statistics of x; `spec` is what the activation is made of."""

    equations = (
        "z = s(y) V^T + c, or s(y), y = w x^ + b",
        (
            "dx = w r (d - x^ dw / n), d = dy - db / n, dy = s'(y) (dz V)",
            "dw = sum of d x^",
            "db = sum of dy",
            "dV = dz^T a",
            "dc = sum of dz",
        ),
    )

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: _Optional,
        bias: _Optional,
        following: _Optional,
        following_bias: _Optional,
        running: tuple[_Optional, _Optional, float],
        eps: float,
        spec: Any,
        values: tuple[float, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, mean, inverse = BatchNorm.forward(x, weight, bias, *running, eps)
        a = spec.compute(y, *values)
        return a if following is None else linear(a, following, following_bias), mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_PARAMETERS], *output[1:])
        ctx.options = inputs[6:]

    @staticmethod
    def backward(ctx: Any, dz: _Optional, *_: None) -> tuple[_Optional, ...]:
        nothing = (None,) * 4
        if dz is None:
            return *(None,) * _PARAMETERS, *nothing
        *inputs, mean, inverse = ctx.saved_tensors
        eps, spec, values = ctx.options
        wanted = ctx.needs_input_grad[:_PARAMETERS]
        if torch.is_grad_enabled():  # to be differentiated again: the separate operations can be
            # Views: what x itself was made from is not this node's to differentiate.
            inputs = [None if t is None else t.view_as(t) for t in inputs]
            z = _apart(spec.function, values, inputs, (None, None, 0.0), eps)
            asked = [t for t, want in zip(inputs, wanted) if want]
            found = iter(torch.autograd.grad(z, asked, dz, create_graph=True))
            return *(next(found) if want else None for want in wanted), *nothing
        x, weight, bias, following, _ = inputs
        y = BatchNorm.forward(x, weight, bias, None, None, 0.0, eps)[0]
        a = spec.compute(y, *values)
        da, dv, dc = dz, None, None
        if following is not None:
            da, dv, dc = linear_backward(dz, a, following, (True, *wanted[3:]))  # type: ignore[assignment]
        kept = a if spec.saves is saves_output else y
        dy = spec.derivative(da, kept, **dict(zip(spec.parameters, values)))
        bias_dtype = None if bias is None else bias.dtype
        slopes = batch_norm_backward(dy, x, mean, inverse, weight, bias_dtype, wanted[:3])
        return *slopes, dv, dc, *nothing


def _apart(
    activation: Callable[..., torch.Tensor],
    values: tuple[float, ...],
    inputs: Any,
    running: tuple[_Optional, _Optional, float],
    eps: float,
    training: bool = True,
) -> torch.Tensor:
    """The separate operations."""
    x, weight, bias, following, following_bias = inputs
    mean, variance, momentum = running
    a = activation(batch_norm(x, mean, variance, weight, bias, training, momentum, eps), *values)
    return a if following is None else linear(a, following, following_bias)


def batch_norm_activation(
    activation: Callable[..., torch.Tensor],
    values: tuple[float, ...],
    input: torch.Tensor,
    running_mean: _Optional,
    running_var: _Optional,
    weight: _Optional = None,
    bias: _Optional = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    following: tuple[torch.Tensor, _Optional] | None = None,
) -> torch.Tensor:
    """As `batch_norm`, then `activation(., *values)`, then `linear(., *following)`; the input alone is kept.

    Args:
        activation: a function made by `torch_bp.ops.activation`.
        values: its parameters.
        input: x, (N, C), or (N, C, L) if nothing is following.
        running_mean, running_var, weight, bias, training, momentum, eps: as of `batch_norm`.
        following: weight and bias of the affine map after the activation.

    Raises:
        TypeError: `activation` was not made by `torch_bp.ops.activation`.

    Example:
        >>> import torch
        >>> from torch_bp import ops
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> ops.batch_norm_activation(ops.relu, (), x, None, None, training=True, eps=1e-12)
        tensor([[0.],
                [1.]])
    """
    spec = getattr(activation, "pointwise", None)
    if spec is None:
        raise TypeError(
            f"batch_norm_activation: activation must be a function made by torch_bp.ops.activation, got {activation!r}."
        )
    inputs = (input, weight, bias, *(following or (None, None)))
    fused = (
        training
        and eager()
        and not in_parts()
        and all(t is None or type(t) in (torch.Tensor, torch.nn.Parameter) for t in inputs)
        and input.dtype not in HALF
        and not under_autocast(input)
        and normalizable(input, (running_mean, running_var, weight, bias), training, eps)
        and (following is None or (input.dim() == 2 and following[0].dim() == 2))
    )
    if fused and recomputing():
        running_mean = running_var = None
    running = (running_mean, running_var, momentum)
    if not fused:
        return _apart(activation, values, inputs, running, eps, training)
    return BatchNormActivation.apply(*inputs, running, eps, spec, values)[0]
