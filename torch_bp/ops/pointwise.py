"""Pointwise activations: a = s(z), dz = s'(z) da, element by element.

Shapes: z, a and da are alike, of any shape. Saved: the output where the derivative can be told from it (no memory of
its own: the next layer keeps the same tensor), else the input. The same derivative, with a tangent in the place of
the error signal, serves forward mode.

Each activation is one formula and one line. `activation` makes a function of two texts: how the value is computed (a
torch operation, or a formula) and the derivative.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from torch_bp.autograd.function import Function, connected, save
from torch_bp.kernels import formula, where

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
    no_gradients = (None,) * len(parameters)
    by_name = hasattr(value, "formula")

    class Node(Function):
        @staticmethod
        def forward(z: torch.Tensor, *values: float) -> torch.Tensor:
            return value(z, **dict(zip(parameters, values))) if by_name else value(z, *values)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            save(ctx, saves(output, *inputs))
            if parameters:
                ctx.keywords = dict(zip(parameters, inputs[1:]))

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            (saved,) = ctx.saved_tensors
            if saved.is_complex():  # autograd wants the conjugate of the derivative there; forward mode does not
                saved = saved.conj()
            if parameters:
                return connected(derivative(dy, saved, **ctx.keywords), saved), *no_gradients
            return connected(derivative(dy, saved), saved)

        @staticmethod
        def jvp(ctx: Any, dz: torch.Tensor, *_: None) -> torch.Tensor:
            keywords = ctx.keywords if parameters else {}
            return derivative(dz, *ctx.saved_tensors, **keywords)

    Node.rename(name)
    apply = Node.apply

    def function(input: torch.Tensor, *values: float) -> torch.Tensor:
        if has_torch_function_unary(input):
            return handle_torch_function(function, (input,), input, *values)
        return apply(input, *values)

    function.pointwise = Pointwise(name, value, derivative, saves, parameters)  # type: ignore[attr-defined]
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


sigmoid = activation("sigmoid", torch.sigmoid, sigmoid_backward)
tanh = activation("tanh", torch.tanh, tanh_backward)
relu = activation("relu", torch.relu, relu_backward)
leaky_relu = activation(
    "leaky_relu", torch.nn.functional.leaky_relu, leaky_relu_backward, saves_input, ("negative_slope",)
)
# For a slope of 0 or more the output has the sign of the input: what writes over its input saves the output.
leaky_relu_from_output = activation(
    "leaky_relu", torch.nn.functional.leaky_relu, leaky_relu_backward, saves_output, ("negative_slope",)
)
