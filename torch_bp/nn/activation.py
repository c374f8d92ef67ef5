"""Activations, eq. 12 to 16 and the smooth and bounded ones that came after, as modules."""

from collections.abc import Callable

import torch

from torch_bp import ops
from torch_bp.nn import functional as F


class Sigmoid(torch.nn.Sigmoid):
    """As `torch.nn.Sigmoid`; eq. 12."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """As `torch.nn.Tanh`; eq. 13."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.tanh(input)


class ReLU(torch.nn.ReLU):
    """As `torch.nn.ReLU`; eq. 14, with relu'(0) = 0."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """As `torch.nn.LeakyReLU`; eq. 15, with the slope as the derivative at 0."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class Hardtanh(torch.nn.Hardtanh):
    """As `torch.nn.Hardtanh`, with 0 as the derivative at both bounds."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ELU(torch.nn.ELU):
    """As `torch.nn.ELU`, with `alpha` as the derivative at 0."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.elu(input, self.alpha, self.inplace)


class Softplus(torch.nn.Softplus):
    """As `torch.nn.Softplus`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softplus(input, self.beta, self.threshold)


class SiLU(torch.nn.SiLU):
    """As `torch.nn.SiLU`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.silu(input, self.inplace)


class GELU(torch.nn.GELU):
    """As `torch.nn.GELU`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.gelu(input, approximate=self.approximate)


class Softmax(torch.nn.Softmax):
    """As `torch.nn.Softmax`; eq. 16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """As `torch.nn.LogSoftmax`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)


# What a module computes, and which of its attributes are the parameters of that, for modules that contain it.
_PARTS: dict[type, tuple[Callable[..., torch.Tensor], tuple[str, ...]]] = {
    Sigmoid: (ops.sigmoid, ()),
    Tanh: (ops.tanh, ()),
    ReLU: (ops.relu, ()),
    LeakyReLU: (ops.leaky_relu, ("negative_slope",)),
    Hardtanh: (ops.hardtanh, ("min_val", "max_val")),
    ELU: (ops.elu, ("alpha",)),
    Softplus: (ops.softplus, ("beta", "threshold")),
    SiLU: (ops.silu, ()),
    GELU: (ops.gelu, ()),
}
_NAMES = {
    **{kind.__name__.lower(): kind for kind in (Sigmoid, Tanh, ReLU, Hardtanh, ELU, Softplus, SiLU, GELU)},
    "leaky_relu": LeakyReLU,
}


def parts(module: torch.nn.Module) -> tuple[Callable[..., torch.Tensor], tuple[float, ...]]:
    """Return the function of `torch_bp.ops` that an activation module computes, and its parameters.

    Raises:
        TypeError: it is no pointwise activation of torch_bp.
    """
    found = _PARTS.get(type(module))
    if found is None:
        raise TypeError(
            f"activation must be one of {', '.join(kind.__name__ for kind in _PARTS)} of torch_bp.nn, got "
            f"{type(module).__module__}.{type(module).__name__}; torch_bp.convert gives torch's modules our classes, "
            "another activation goes into a Sequential of its own."
        )
    function, names = found
    if isinstance(module, GELU) and module.approximate == "tanh":
        function = ops.gelu_tanh
    return function, tuple(getattr(module, name) for name in names)


def joinable(module: torch.nn.Module) -> bool:
    """True if `parts` knows the module."""
    return type(module) in _PARTS


def activation_module(activation: str | torch.nn.Module) -> torch.nn.Module:
    """Return the module of a name, or the module itself if it is one that `parts` knows."""
    if not isinstance(activation, str):
        parts(activation)
        return activation
    if activation not in _NAMES:
        raise ValueError(
            f"activation must be one of {', '.join(_NAMES)}, or a module of these classes, got {activation!r}."
        )
    return _NAMES[activation]()
