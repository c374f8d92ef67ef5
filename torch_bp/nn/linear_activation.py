"""The affine layer and its activation as one module."""

from typing import Any

import torch

from torch_bp.nn.activation import activation_module, parts
from torch_bp.nn.linear import Linear


class LinearActivation(Linear):
    """`Linear` and the activation after it, as one node of the graph: eq. 1 and eq. 2 of a layer.

    Parameters and `state_dict` are those of `Linear`; values and gradients are those of the two modules. Tools that put
    another class in the place of a `Linear` lose the activation: give them the two modules.

    Args:
        in_features, out_features, bias, device, dtype: as of `Linear`.
        activation: a module of `torch_bp.nn` (Sigmoid, Tanh, ReLU, LeakyReLU, Hardtanh, ELU, Softplus, SiLU, GELU), or
            its name in lower case ("relu", the default, "leaky_relu", ...) for the module with torch's defaults. Hooks
            on it do not run.

    Raises:
        ValueError: an unknown name.
        TypeError: another module.

    Example:
        >>> layer = LinearActivation(3, 2, "tanh")
        >>> layer(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
        >>> list(layer.state_dict())
        ['weight', 'bias']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str | torch.nn.Module = "relu",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation_module(activation)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        function, values = parts(self.activation)
        return function.after_linear(input, self.weight, self.bias, *values)  # type: ignore[attr-defined]
