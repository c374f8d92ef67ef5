"""The report's network: a multilayer perceptron, eq. 1 and 2."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from torch_bp import ops
from torch_bp.autograd.function import in_parts
from torch_bp.nn.activation import activation_module, joinable, parts
from torch_bp.nn.auto_init import auto_
from torch_bp.nn.batchnorm import BatchNorm1d
from torch_bp.nn.dropout import Dropout
from torch_bp.nn.linear import Linear
from torch_bp.nn.normalization import LayerNorm
from torch_bp.nn.residual import Residual

_NORMS: dict[str, Callable[..., torch.nn.Module]] = {"batch": BatchNorm1d, "layer": LayerNorm}


class MLP(torch.nn.Sequential):
    """Linear layers with an activation between them: sizes[0] inputs, sizes[-1] outputs, the rest hidden.

    A `torch.nn.Sequential` of `Linear`, normalisation, activation and `Dropout` for each hidden layer, and a `Linear`
    at the end, whose outputs are logits or predictions; losses apply what belongs after them. Parameters and
    `state_dict` are those of the `Sequential`. With `fused`, neighbours run as one node of the graph where that
    computes the same: `LinearActivation`, and `BatchNorm1d` with the activation and the next `Linear`, which keeps one
    tensor a layer for backward and not two.

    Args:
        sizes: widths, at least inputs and outputs.
        activation: name or module, as of `torch_bp.nn.LinearActivation`. A module is shared by all layers.
        norm: None (default), "batch", "layer", or a function of the width that returns a module, sec. 9.3.
        dropout: probability with which hidden activations are dropped, in [0, 1].
        residual: hidden layers that keep their width are wrapped in `Residual`, sec. 9.3.
        init: "auto" (default) or another method of `torch_bp.nn.init.auto_`; None for torch's own initialisation.
        fused: run neighbours as one node.
        bias: give the linear layers biases.
        device, dtype: of the parameters.

    Raises:
        ValueError: fewer than two sizes, a size below 1, an unknown norm or activation, a probability outside [0, 1].

    Example:
        >>> model = MLP([64, 32, 10], activation="tanh", norm="batch")
        >>> model(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
        >>> [type(layer).__name__ for layer in model]
        ['Linear', 'BatchNorm1d', 'Tanh', 'Linear']
    """

    runs_in_order = True  # for what looks at the order of layers

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | torch.nn.Module = "relu",
        norm: str | Callable[[int], torch.nn.Module] | None = None,
        dropout: float = 0.0,
        residual: bool = False,
        init: str | None = "auto",
        fused: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"MLP: sizes must be at least two numbers of 1 or more, got {list(sizes)}.")
        if isinstance(norm, str) and norm not in _NORMS:
            raise ValueError(f"MLP: norm must be None, 'batch', 'layer' or a function of the width, got {norm!r}.")
        activation_module(activation)  # these two refuse what is wrong also where there is no hidden layer
        Dropout(dropout)
        options = {"device": device, "dtype": dtype}
        layers: list[torch.nn.Module] = []
        for width_in, width in itertools.pairwise(sizes[:-1]):
            block: list[torch.nn.Module] = [Linear(width_in, width, bias, **options)]
            if norm is not None:
                block.append(_NORMS[norm](width, **options) if isinstance(norm, str) else norm(width))
            block.append(activation_module(activation))
            if dropout:
                block.append(Dropout(dropout))
            container = _Joined if fused else torch.nn.Sequential
            layers += [Residual(container(*block))] if residual and width == width_in else block
        super().__init__(*layers, Linear(sizes[-2], sizes[-1], bias, **options))
        self.fused = fused
        if init is not None and self[-1].weight.device.type != "meta":
            auto_(self, init)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _run(self, input) if self.fused else super().forward(input)

    def __getitem__(self, index: Any) -> Any:
        layers = list(self._modules.values())
        return torch.nn.Sequential(*layers[index]) if isinstance(index, slice) else super().__getitem__(index)

    def extra_repr(self) -> str:
        return "" if self.fused else "fused=False"


class _Joined(torch.nn.Sequential):
    """What a residual block of a fused network holds."""

    runs_in_order = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _run(self, input)


def _run(layers: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Run the modules of a `Sequential` one after the other, neighbours as one node where nobody could tell."""
    modules = list(layers)
    at = 0
    while at < len(modules):
        count, x = _next(modules[at : at + 3], x)
        at += count
    return x


def _next(modules: list[torch.nn.Module], x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Run the first of these modules, or the first two or three; return how many, and the result."""
    first = modules[0]
    if len(modules) > 1 and not in_parts() and joinable(modules[1]) and bare(first) and bare(modules[1]):
        function, values = parts(modules[1])
        if type(first) is Linear:
            return 2, function.after_linear(x, first.weight, first.bias, *values)  # type: ignore[attr-defined]
        if type(first) is BatchNorm1d:
            last = modules[2] if len(modules) > 2 and type(modules[2]) is Linear and bare(modules[2]) else None
            following = None if last is None else (last.weight, last.bias)
            y = ops.batch_norm_activation(function, values, x, *first.arguments(x), following)  # type: ignore[call-arg]
            return 2 + (last is not None), y
    return 1, first(x)


def bare(module: torch.nn.Module) -> bool:
    """True if nothing watches a call of the module: no hooks, and the forward of its class."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or _has_any_global_hook()
    )
