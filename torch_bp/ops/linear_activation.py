"""The affine map and the activation after it as one node: a' = s(a W^T + b).

Shapes as in `linear`. Backward, with da' the error signal after the activation: dz = s'(z) da', then Algorithm 1's
lines for the affine map. Saved: a and W, and the output where the derivative can be told from it; else z, which then is
a result of the node that nobody sees. One node in the place of two spares the engine's work between them, and z is
overwritten where it is not needed. On CUDA the product adds the bias as it writes z, and ReLU too; the derivative and
the sum of dz over rows are one kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_bp.autograd.function import Function, connected, in_parts, overridden, tangents_possible, under_autocast
from torch_bp.kernels import engine
from torch_bp.kernels.extension import with_column_sum
from torch_bp.kernels.plain import eager, reusable
from torch_bp.ops import pointwise
from torch_bp.ops.linear import linear, linear_backward, linear_forward, linear_tangent
from torch_bp.ops.pointwise import saves_output

_Optional = torch.Tensor | None


def _in_one_pass(dy: torch.Tensor, ctx: Any) -> bool:
    """True where a kernel that multiplies by a derivative may add up the columns as well: on the CPU torch's own sum,
    which reads what is in the cache, is as fast."""
    plain = eager() and not torch.is_grad_enabled() and dy.dim() == 2
    return plain and ctx.needs_input_grad[2] and engine.serving(dy) == "triton"


def relu_in_epilogue(a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """relu(a W^T + b) of rows: on CUDA the product adds the bias and cuts off below 0 as it writes its result."""
    return torch._addmm_activation(bias, a, weight.t())


def _has_epilogue(a: torch.Tensor, bias: _Optional) -> bool:
    return a.is_cuda and a.dim() == 2 and bias is not None and eager() and hasattr(torch, "_addmm_activation")


_IN_PLACE = {torch.sigmoid: torch.sigmoid_, torch.tanh: torch.tanh_, torch.relu: torch.relu_}


def linear_activation(activation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make the function of one node for the affine map and an activation.

    Args:
        activation: one of `torch_bp.ops`, or one made by `torch_bp.ops.activation`.

    Returns:
        A function `f(input, weight, bias, *parameters)`, equal to `activation(linear(input, weight, bias),
        *parameters)`.

    Raises:
        TypeError: `activation` was not made by `torch_bp.ops.activation`.

    Example:
        >>> import torch
        >>> from torch_bp import ops
        >>> linear_relu = ops.linear_activation(ops.relu)
        >>> linear_relu(torch.ones(1, 2), torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), torch.zeros(2))
        tensor([[2., 0.]])
    """
    spec: Any = getattr(activation, "pointwise", None)
    if spec is None:
        raise TypeError(
            f"linear_activation: activation must be a function made by torch_bp.ops.activation, got {activation!r}; "
            "apply another one to the result of linear."
        )
    if hasattr(activation, "after_linear"):
        return activation.after_linear
    # Functions, names and truth values: what Dynamo takes from a closure.
    name = spec.name
    compute, derivative, parameters = spec.value, spec.derivative, spec.parameters
    by_name, from_output = hasattr(compute, "formula"), spec.saves is saves_output
    both = with_column_sum(derivative)  # type: ignore[arg-type]
    in_place, overwrites = _IN_PLACE.get(compute, compute), from_output and compute in _IN_PLACE

    def value(z: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
        if overwrites and reusable():
            return in_place(z)
        return compute(z, **dict(zip(parameters, values))) if by_name else compute(z, *values)

    def at_once(ctx: Any, dy: torch.Tensor, a: Any, weight: Any, kept: torch.Tensor) -> tuple[_Optional, ...]:
        dz, db = both(dy, kept, **dict(zip(parameters, ctx.values)))
        return *linear_backward(dz, a, weight, (*ctx.needs_input_grad[:2], False))[:2], db

    class LinearActivation(Function):
        equations = (
            f"y = {name}(a W^T + b), eq. 1 and 2",
            ("da = dz W", "dW = dz^T a", "db = sum of dz"),
        )
        needed_first = f"dz = {name}'(z) dy"

        @staticmethod
        def forward(a: torch.Tensor, weight: torch.Tensor, bias: _Optional, *values: float) -> Any:
            if compute is torch.relu and bias is not None and _has_epilogue(a, bias):
                return relu_in_epilogue(a, weight, bias)
            z = linear_forward(a, weight, bias)
            return value(z, values) if from_output else (value(z, values), z)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            a, weight, bias, *values = inputs
            output, kept = (output, output) if from_output else output
            if not from_output:
                ctx.mark_non_differentiable(kept)
                ctx.set_materialize_grads(False)
            needs_da, needs_dw, _ = ctx.needs_input_grad[:3]
            # For forward mode, and where z may have to be computed again, all; vmap wants both tuples to be alike.
            if from_output and not tangents_possible():
                ctx.save_for_backward(a if needs_dw else None, weight if needs_da else None, None, kept)
            else:
                ctx.save_for_backward(a, weight, bias, kept)
            if tangents_possible():
                ctx.save_for_forward(a, weight, bias, kept)
            ctx.values = values

        @staticmethod
        def backward(ctx: Any, dy: _Optional, _: None = None) -> Any:
            nothing = (None,) * len(ctx.values)
            if dy is None:
                return None, None, None, *nothing
            a, weight, bias, kept = ctx.saved_tensors
            # To be differentiated again, in either mode: z depends on a, W and b
            if not from_output and (torch.is_grad_enabled() or tangents_possible()):
                kept = linear(a, weight, bias)
            if _in_one_pass(dy, ctx):
                return *at_once(ctx, dy, a, weight, kept), *nothing
            dz = derivative(dy, kept, **dict(zip(parameters, ctx.values)))
            return *linear_backward(connected(dz, kept), a, weight, ctx.needs_input_grad[:3]), *nothing

        @staticmethod
        def jvp(ctx: Any, da: _Optional, dw: _Optional, db: _Optional, *_: None) -> Any:
            a, weight, bias, kept = ctx.saved_tensors
            if not from_output:
                kept = linear(a, weight, bias)
            dz = linear_tangent(a, weight, da, dw, db)
            dy = derivative(dz, kept, **dict(zip(parameters, ctx.values)))
            return dy if from_output else (dy, None)

    LinearActivation.name_arguments("a", "weight", "bias", *parameters)
    LinearActivation.rename(f"linear_{spec.name}")

    def function(
        input: torch.Tensor, weight: torch.Tensor, bias: _Optional = None, *values: float, **named: float
    ) -> torch.Tensor:
        if len(values) + len(named) != len(parameters) or not named.keys() <= {*parameters[len(values) :]}:
            raise TypeError(
                f"linear_{name}: after input, weight and bias it takes ({', '.join(parameters)}), got {values} {named}."
            )
        values += tuple(named[n] for n in parameters[len(values) :])
        if has_torch_function_variadic(input, weight, bias) and overridden():
            return handle_torch_function(function, (input, weight, bias), input, weight, bias, *values)
        if (
            not (isinstance(input, torch.Tensor) and isinstance(weight, torch.Tensor))
            or weight.dim() != 2
            or weight.is_complex()
            or (bias is not None and bias.dim() != 1)
            or input.is_nested
            or in_parts()
            or under_autocast(input)  # which may want the activation in another dtype
        ):
            return activation(linear(input, weight, bias), *values)
        result = LinearActivation.apply(input, weight, bias, *values)
        return result if from_output else result[0]

    function.__name__ = function.__qualname__ = f"linear_{spec.name}"
    activation.after_linear = function  # type: ignore[attr-defined]
    return function


linear_sigmoid = linear_activation(pointwise.sigmoid)
linear_tanh = linear_activation(pointwise.tanh)
linear_relu = linear_activation(pointwise.relu)
linear_leaky_relu = linear_activation(pointwise.leaky_relu)
linear_hardtanh = linear_activation(pointwise.hardtanh)
linear_elu = linear_activation(pointwise.elu)
linear_softplus = linear_activation(pointwise.softplus)
linear_silu = linear_activation(pointwise.silu)
linear_gelu = linear_activation(pointwise.gelu)
linear_gelu_tanh = linear_activation(pointwise.gelu_tanh)
