"""Which activation follows a layer: told by the order of modules, or seen while the model runs.

*By order*: a layer in a Sequential, nested ones included, is followed by the next module that is an activation, past
normalization, dropout and reshaping. In a model with a forward of its own the order of modules says nothing.
*By running*: what is done to a layer's output is watched, whether modules or functions do it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_bp.nn.batchnorm import BatchNormActivation
from torch_bp.nn.linear_activation import LinearActivation
from torch_bp.nn.residual import Residual

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Functions that rectify: near 0 for negative values, near the identity for positive ones.
RECTIFIERS = {
    *("relu", "relu6", "leaky_relu", "rrelu", "prelu", "elu", "celu", "gelu", "silu", "mish", "softplus", "hardswish"),
}
BOUNDED = {
    *("sigmoid", "tanh", "hardsigmoid", "hardtanh", "softsign", "tanhshrink", "logsigmoid", "log_sigmoid"),
    *("softmax", "log_softmax", "softmin"),
}
END, LINEAR = "end", "linear"  # followed by nothing, and by another layer: no activation either way
_MODULES = {  # classes before those they are derived from
    getattr(nn, name): function
    for name, function in {
        **{"ReLU": "relu", "ReLU6": "relu6", "LeakyReLU": "leaky_relu", "RReLU": "rrelu", "PReLU": "prelu"},
        **{"ELU": "elu", "CELU": "celu", "GELU": "gelu", "SiLU": "silu", "Mish": "mish", "Softplus": "softplus"},
        **{"Hardswish": "hardswish", "SELU": "selu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Hardtanh": "hardtanh"},
        **{"Hardsigmoid": "hardsigmoid", "Softsign": "softsign", "Tanhshrink": "tanhshrink"},
        **{"LogSigmoid": "logsigmoid", "Softmax": "softmax", "LogSoftmax": "log_softmax", "Softmin": "softmin"},
    }.items()
}
_PASSED_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.LayerNorm, nn.GroupNorm, nn.modules.dropout._DropoutNd),
    nn.modules.batchnorm._NormBase,
)
_PASSED = {
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand"),
    *(
        "contiguous",
        "clone",
        "copy",
        "detach",
        "to",
        "float",
        "double",
        "half",
        "bfloat16",
        "getitem",
        "get",
        "cat",
        "stack",
    ),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "add", "iadd", "radd"),
}
_LINEAR = {"linear", "conv1d", "conv2d", "conv3d", "matmul", "rmatmul", "mm", "addmm", "bmm"}


@dataclass(frozen=True)
class Follower:
    """What follows a layer: the name of a function, `END` or `LINEAR`; the slope of a leaky ReLU, else 0."""

    name: str
    slope: float = 0.0

    @property
    def known(self) -> bool:
        return self.name in RECTIFIERS | BOUNDED | {"selu", END, LINEAR}

    def __str__(self) -> str:
        return f"{self.name}({self.slope:g})" if self.slope else self.name


def agreed(followers: list[Follower]) -> Follower:
    """One follower where all are the same; else one of no known kind, which names them all."""
    distinct = list(dict.fromkeys(followers))
    return distinct[0] if len(distinct) == 1 else Follower(" and ".join(map(str, distinct)) or "unknown")


def in_order(model: nn.Module) -> dict[nn.Module, Follower]:
    """Return what follows each layer by the order of modules in Sequentials."""
    found: dict[nn.Module, list[Follower]] = {}

    def scan(root: nn.Module, last: Follower) -> None:
        parts = list(_parts(root))
        for place, part in enumerate(parts):
            if isinstance(part, LAYERS):
                found.setdefault(part, []).append(_first(parts[place + 1 :], last))
            else:
                for child in part.children():
                    scan(child, Follower("unknown"))

    scan(model, Follower(END))
    return {layer: agreed(followers) for layer, followers in found.items()}


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that run one after the other."""
    if isinstance(module, Residual):
        yield from _parts(module.module)
    elif isinstance(module, LinearActivation | BatchNormActivation):
        yield module
        yield module.activation
    elif type(module).forward is nn.Sequential.forward or getattr(module, "runs_in_order", False):
        for child in module._modules.values():  # `children` leaves out what comes a second time
            if child is not None:
                yield from _parts(child)
    else:
        yield module


def _first(modules: list[nn.Module], last: Follower) -> Follower:
    for module in modules:
        if isinstance(module, LAYERS):
            return Follower(LINEAR)
        for kind, name in _MODULES.items():
            if isinstance(module, kind):
                return Follower(name, getattr(module, "negative_slope", 0.0))
        if not isinstance(module, _PASSED_MODULES):
            return Follower(type(module).__name__)
    return last


@dataclass
class Call:
    """One run of a layer: what followed, and its output, or, where known, the activation after it."""

    name: str
    layer: nn.Module
    output: Tensor
    edge: GradientEdge | None
    followers: list[Follower] = field(default_factory=list)


def seen(
    model: nn.Module, x: Any, measure: Callable[[Call, Tensor, Follower | None], None]
) -> tuple[list[Call], list[Tensor]]:
    """Run `model` on x and return the runs of its layers, in order, and the floating-point outputs.

    Nothing of the model changes: parameters are stood in for by leaves on the same memory, buffers and inputs by
    copies, and the state of the random numbers is put back.

    Args:
        model: to run as it is, in training or evaluation mode.
        x: the input, or a tuple or list of several.
        measure: called with each layer's output as it comes, and None; and with the activation and what made it.
    """
    inputs = tuple(x) if isinstance(x, tuple | list) else (x,)
    state = {name: p.detach().requires_grad_(p.is_floating_point()) for name, p in model.named_parameters()}
    state |= {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    watch, handles = _Watch(measure), []
    devices = {t.device for t in (*state.values(), *tree_leaves(inputs)) if isinstance(t, Tensor) and t.is_cuda}
    try:
        for name, module in model.named_modules():
            # a hook on every module: what is watched runs apart from its neighbours
            note = watch.hook(name) if isinstance(module, LAYERS) else _let_pass
            handles.append(module.register_forward_hook(note))
        with torch.random.fork_rng(devices), torch.enable_grad(), watch:
            copies = tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)
            outputs = torch.func.functional_call(model, state, copies)
    finally:
        for handle in handles:
            handle.remove()
    found = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    watch.end(found)
    return watch.calls, found


def _let_pass(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing."""


class _Watch(TorchFunctionMode):
    """Follows what is made of the outputs of layers, up to the first function that is more than a view or a sum."""

    def __init__(self, measure: Callable[[Call, Tensor, Follower | None], None]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._measure = measure
        self._made: dict[int, tuple[Tensor, list[Call]]] = {}  # the tensor is kept, so that its id stays its own

    def hook(self, name: str) -> Callable[..., None]:
        """Return the forward hook of the layer `name`."""

        def note(layer: nn.Module, args: Any, output: Tensor) -> None:
            with torch._C.DisableTorchFunction():  # what is measured here is not the model's doing
                call = Call(name, layer, output, get_gradient_edge(output) if output.requires_grad else None)
                self.calls.append(call)
                self._made[id(output)] = output, [call]
                self._measure(call, output.detach(), None)

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_")
        calls = self._calls((args[1:] if name == "copy" else args, kwargs))  # what is written over does not count
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._made.pop(id(result), None)  # it may have been written in place
            if calls and name in _PASSED:
                self._made[id(result)] = result, calls
            elif calls:
                self._followed(calls, name, args, kwargs, result)
        return result

    def _calls(self, values: Any) -> list[Call]:
        found: dict[int, Call] = {}
        for t in tree_leaves(values):
            for call in self._made.get(id(t), (t, []))[1]:
                found[id(call)] = call
        return list(found.values())

    def _followed(self, calls: list[Call], name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        slope = 0.0
        if name == "leaky_relu":
            slope = kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01)
        elif name == "hardtanh" and kwargs.get("min_val", args[1] if len(args) > 1 else -1.0) == 0:
            name = "relu6"
        follower = Follower(LINEAR if name in _LINEAR else name, slope)
        for call in calls:
            call.followers.append(follower)
            if name in RECTIFIERS | BOUNDED | {"selu"}:
                with torch._C.DisableTorchFunction():
                    self._measure(call, result.detach(), follower)

    def end(self, outputs: list[Tensor]) -> None:
        """Note the layers whose output is the model's."""
        for call in self._calls(outputs):
            call.followers.append(Follower(END))
