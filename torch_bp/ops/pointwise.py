"""Pointwise activations: a = s(z), dz = s'(z) da, element by element.

Shapes: z, a and da are alike, of any shape. Saved: the output where the derivative can be told from it (no memory of
its own: the next layer keeps the same tensor), else the input. The same derivative, with a tangent in the place of
the error signal, serves forward mode.

Each activation is one formula and one line. `activation` makes a function of two texts: how the value is computed (a
torch operation, or a formula) and the derivative.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from torch_bp.autograd.function import Function, connected, overridden, save
from torch_bp.kernels import erf, exp, formula, where
from torch_bp.kernels import sigmoid as logistic
from torch_bp.kernels import tanh as tanh_of

Saves = Callable[..., torch.Tensor]


def saves_output(output: torch.Tensor, input: torch.Tensor, *parameters: float) -> torch.Tensor:
    """Keep the activation for backward."""
    return output


def saves_input(output: torch.Tensor, input: torch.Tensor, *parameters: float) -> torch.Tensor:
    """Keep the pre-activation for backward."""
    return input


@dataclass(frozen=True)
class Pointwise:
    """What an activation is made of, for operations that contain it; `activation` explains the fields."""

    name: str
    value: Callable[..., torch.Tensor]
    derivative: Callable[..., torch.Tensor]
    saves: Saves
    parameters: tuple[str, ...]
    function: Callable[..., torch.Tensor]

    def compute(self, z: torch.Tensor, *values: float) -> torch.Tensor:
        """The value, with no graph of its own."""
        if hasattr(self.value, "formula"):
            return self.value(z, **dict(zip(self.parameters, values)))
        return self.value(z, *values)


def activation(
    name: str,
    value: Callable[..., torch.Tensor],
    derivative: Callable[..., torch.Tensor],
    saves: Saves = saves_output,
    parameters: tuple[str, ...] = (),
) -> Callable[..., torch.Tensor]:
    """Make a differentiable pointwise function of its value and its derivative.

    Args:
        name: what the function and its node in the graph are called. A model that holds the function can be pickled if
            this is also the name of the variable, in a module, that holds it.
        value: a torch operation `value(z, *parameters)`, or a `@formula` of `(z, *, parameters...)`.
        derivative: a `@formula` of `(dy, saved, *, parameters...)`: the error signal before the activation from the
            one after it.
        saves: `saves_output` (default), `saves_input`, or a function `(output, input, *parameters)` of your own:
            what `derivative` gets as its second argument.
        parameters: names of numbers that the function takes after the tensor, all needed.

    Returns:
        A function `f(input, *parameters)`, differentiable any number of times in reverse and forward mode, usable
        under `vmap` and `torch.compile`.

    Example:
        >>> import torch
        >>> from torch_bp.kernels import formula
        >>> from torch_bp.ops.pointwise import activation
        >>> @formula
        ... def softsign_value(z):
        ...     return z / (1 + abs(z))
        >>> @formula
        ... def softsign_backward(dy, y):
        ...     return dy * (1 - abs(y)) ** 2
        >>> softsign = activation("softsign", softsign_value, softsign_backward)
        >>> z = torch.tensor([-1.0, 0.0], requires_grad=True)
        >>> softsign(z).sum().backward()
        >>> z.grad
        tensor([0.2500, 1.0000])
    """
    if by_name := hasattr(value, "formula"):
        kept, given = derivative.formula.tensors[1:2], value.formula.tensors[:1]  # type: ignore[attr-defined]
        if saves is saves_output and kept == given:
            raise TypeError(
                f"activation {name}: derivative is given the output, got a formula of the input "
                f"{', '.join(kept)!r}, by the name that value has for it; pass saves=saves_input, or call the output "
                "something else."
            )
    no_gradients = (None,) * len(parameters)

    slope, equation = f"dz = {name}'(z) dy", re.search(r"eq\. \d+", derivative.__doc__ or "")

    class Node(Function):
        equations = (f"y = {name}(z)", f"{slope}, {equation.group()}" if equation else slope)

        @staticmethod
        def forward(z: torch.Tensor, *values: float) -> torch.Tensor:
            return value(z, **dict(zip(parameters, values))) if by_name else value(z, *values)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            save(ctx, saves(output, *inputs))
            if parameters:
                ctx.values = inputs[1:]

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            (saved,) = ctx.saved_tensors
            if saved.is_complex():  # autograd wants the conjugate of the derivative there; forward mode does not
                saved = saved.conj()
            if not parameters:
                return connected(derivative(dy, saved), saved)
            dz = derivative(dy, saved, **dict(zip(parameters, ctx.values)))
            return connected(dz, saved), *no_gradients

        @staticmethod
        def jvp(ctx: Any, dz: torch.Tensor, *_: None) -> torch.Tensor:
            (saved,) = ctx.saved_tensors
            return derivative(dz, saved, **dict(zip(parameters, ctx.values if parameters else ())))

    Node.name_arguments("z", *parameters)
    Node.rename(name)
    apply = Node.apply

    def function(input: torch.Tensor, *values: float) -> torch.Tensor:
        if has_torch_function_unary(input) and overridden():
            return handle_torch_function(function, (input,), input, *values)
        if getattr(input, "is_nested", False) and input.layout is torch.strided:  # has no shape: torch's alone
            return Node.forward(input, *values)
        return apply(input, *values)

    function.pointwise = Pointwise(name, value, derivative, saves, parameters, function)  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = name
    function.__module__ = sys._getframe(1).f_globals.get("__name__", __name__)  # so that models with it can be pickled
    return function


@formula
def sigmoid_backward(dy, y):
    """eq. 12: s'(z) = s(z) (1 - s(z)), at most 1/4."""
    return dy * y * (1 - y)


@formula
def tanh_backward(dy, y):
    """eq. 13: tanh'(z) = 1 - tanh(z)^2, at most 1."""
    return dy * (1 - y * y)


@formula
def relu_backward(dy, y):
    """eq. 14: relu'(z) = 1 for z > 0 and 0 for z < 0. At the kink relu'(0) = 0, as in torch; NaN lets dy through."""
    return where(y <= 0, 0, dy)


@formula
def leaky_relu_backward(dy, z, *, negative_slope):
    """eq. 15: 1 for z > 0, else the slope, also at 0. From the input, as torch, so that the output may be altered."""
    return where(z > 0, dy, negative_slope * dy)


@formula
def hardtanh_backward(dy, y, *, min_val, max_val):
    """1 strictly between the bounds, else 0, at both kinks too, as in torch. Holds for the input and the output."""
    return where((y <= min_val) | (y >= max_val), 0, dy)


@formula
def elu_backward(dy, z, *, alpha):
    """alpha e^z for z <= 0, else 1, also for NaN. The output alpha (e^z - 1) has lost e^z where that is small."""
    return where(z <= 0, dy * alpha * exp(where(z < 0, z, 0)), dy)


@formula
def softplus_backward(dy, z, *, beta, threshold):
    """s(beta z), and 1 where beta z passes the threshold: the value there is z."""
    return where(beta * z > threshold, dy, dy * logistic(beta * z))


@formula
def silu_backward(dy, z):
    """(z s(z))' = s(z) (1 + z (1 - s(z)))."""
    gate = logistic(z)
    return dy * gate * (1 + z * (1 - gate))


# Numbers are written out below: Dynamo, told to expect any shapes, trips over names of numbers in a backward.


@formula
def gelu_backward(dy, z):
    """(z P(z))' = P(z) + z p(z): P = (1 + erf(z / sqrt 2)) / 2, its density p = e^(-z^2 / 2) / sqrt(2 pi)."""
    return dy * (0.5 * (1 + erf(z * 0.7071067811865476)) + z * exp(-0.5 * z * z) * 0.3989422804014327)


@formula
def gelu_tanh_backward(dy, z):
    """(z (1 + t) / 2)' = (1 + t) / 2 + z (1 - t^2) u' / 2, with t = tanh u and u = sqrt(2 / pi) (z + 0.044715 z^3)."""
    t = tanh_of(0.7978845608028654 * (z + 0.044715 * z * z * z))
    slope = 0.7978845608028654 * (1 + 0.134145 * z * z)
    return dy * 0.5 * (1 + t + z * (1 - t * t) * slope)


sigmoid = activation("sigmoid", torch.sigmoid, sigmoid_backward)
tanh = activation("tanh", torch.tanh, tanh_backward)
relu = activation("relu", torch.relu, relu_backward)
leaky_relu = activation("leaky_relu", F.leaky_relu, leaky_relu_backward, saves_input, ("negative_slope",))
# For a slope of 0 or more the output has the sign of the input: what writes over its input saves the output. So it does
# with bounds in order, outside of which the output is at one.
leaky_relu_from_output = activation("leaky_relu", F.leaky_relu, leaky_relu_backward, saves_output, ("negative_slope",))
hardtanh = activation("hardtanh", F.hardtanh, hardtanh_backward, saves_input, ("min_val", "max_val"))
hardtanh_from_output = activation("hardtanh", F.hardtanh, hardtanh_backward, saves_output, ("min_val", "max_val"))
elu = activation("elu", F.elu, elu_backward, saves_input, ("alpha",))
softplus = activation("softplus", F.softplus, softplus_backward, saves_input, ("beta", "threshold"))
silu = activation("silu", F.silu, silu_backward, saves_input)
gelu = activation("gelu", F.gelu, gelu_backward, saves_input)
gelu_tanh = activation("gelu_tanh", lambda z: F.gelu(z, approximate="tanh"), gelu_tanh_backward, saves_input)
