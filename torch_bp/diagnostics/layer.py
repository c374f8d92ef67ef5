"""Which parts of a model are watched as layers, and what is known of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Linear = nn.Linear
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
PASSING = (*_NORMS, nn.modules.dropout._DropoutNd, nn.Identity)  # what may lie between a layer and its activation
ACTIVATIONS = tuple(kind for kind in vars(nn.modules.activation).values() if isinstance(kind, type))
ACTIVATIONS = tuple(k for k in ACTIVATIONS if issubclass(k, nn.Module) and k not in (nn.Module, nn.MultiheadAttention))
Which = str | Callable[[str, nn.Module], bool] | None


@dataclass(eq=False)
class Layer:
    """A module with parameters of its own.

    Attributes:
        name: its path in the model; `kind` the name of its class.
        index: its place among the layers of a model in the order of `named_modules()`.
        linear: whether its gradient is an outer product of input and error signal: `nn.Linear`.
        chained: whether it is a link of the chain of linear maps through which signals go: linear or a convolution.
        activation, norm: modules that were applied to its output, once they have been seen.
    """

    name: str
    module: nn.Module
    index: int
    activation: nn.Module | None = None
    norm: nn.Module | None = None
    params: list[Tensor] = field(default_factory=list)
    param_names: list[str] = field(default_factory=list)  # in the model

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def linear(self) -> bool:
        return isinstance(self.module, Linear)

    @property
    def chained(self) -> bool:
        return self.linear or isinstance(self.module, _CONVOLUTIONS)

    @property
    def unit_dim(self) -> int:
        """The dimension of the output along which its units lie; of a convolution, without a batch too."""
        if isinstance(self.module, _CONVOLUTIONS):
            return -1 - len(self.module.kernel_size)
        return 1 if isinstance(self.module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) else -1

    @property
    def unknown(self) -> str:
        """Why no more than its parameters and its output can be watched; empty if more can."""
        if self.chained or isinstance(self.module, (*_NORMS, nn.Embedding)):
            return ""
        return f"{self.kind} is no layer that torch_bp knows: its output, error signal there and parameters are watched"


def layers_of(model: nn.Module, which: Which = None) -> list[Layer]:
    """The layers of a model in the order of `named_modules()`; `which` chooses by a regular expression or a function.

    Raises:
        ValueError: there is none, or none that is chosen.
    """
    chosen = _chooser(which)
    layers: list[Layer] = []
    whole = getattr(model, "_orig_mod", model)
    wrapped = unwrapped(whole) is not whole
    for name, module in model.named_modules():
        name = name.replace("_orig_mod.", "")
        name = name.removeprefix("module.") if wrapped else name
        params = dict(module.named_parameters(recurse=False))
        if params and chosen(name, module):
            full = [f"{name}.{own}" if name else own for own in params]
            layers.append(Layer(name, module, len(layers), params=list(params.values()), param_names=full))
    if not layers:
        names = ", ".join(
            repr(name) for name, module in model.named_modules() if list(module.parameters(recurse=False))
        )
        raise ValueError(
            f"watch: layers must name at least one module with parameters, got {which!r}. "
            + (f"There are {names}." if names else f"{type(model).__name__} has no parameters.")
        )
    return layers


def _chooser(which: Which) -> Callable[[str, nn.Module], bool]:
    if which is None:
        return lambda name, module: True
    if isinstance(which, str):
        try:
            pattern = re.compile(which)
        except re.error as error:
            raise ValueError(
                f"watch: layers must be a regular expression, got {which!r}: {error}. Escape dots and brackets."
            ) from error
        return lambda name, module: pattern.search(name) is not None
    if callable(which):
        return which
    raise TypeError(
        f"watch: layers must be a regular expression or a function of name and module, got {type(which).__name__}."
    )


def tensor_in(output: object) -> Tensor | None:
    """The first floating-point tensor of what a module returned."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() or output.is_complex() else None
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return next((found for found in map(tensor_in, output) if found is not None), None)
    return None


def linked(model: nn.Module, layers: list[Layer]) -> None:
    """Note the activation and norm of layers in a `Sequential`, which are known before anything has run."""
    by_module = {id(layer.module): layer for layer in layers}
    for container in model.modules():
        if not isinstance(container, nn.Sequential):
            continue
        current: Layer | None = None
        for module in container:
            layer = by_module.get(id(module))
            if layer is not None and layer.chained:
                current = layer
            elif current is not None and isinstance(module, ACTIVATIONS):
                current.activation, current = module, None
            elif current is not None and isinstance(module, _NORMS):
                current.norm = module
            elif not isinstance(module, PASSING):
                current = None


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of `DistributedDataParallel` or `DataParallel`, whose `module` it is."""
    return model.module if isinstance(model, DistributedDataParallel | nn.DataParallel) else model


def compiled(model: nn.Module) -> bool:
    """True if the model, or a part of it, has been given to `torch.compile`."""
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
