"""Initial weights by what follows the layer: sec. 9.3, item 2, scales that keep activations and error signals in range.

With n_in inputs and n_out outputs to a unit, the variance of a weight is, in eq. 1,

    Glorot  2 / (n_in + n_out)           after which the derivative is at most 1: tanh, sigmoid, softmax, nothing
    He      2 / ((1 + a^2) n_in)         rectifiers, eq. 14 and 15, which halve the variance; a is the negative slope
    LeCun   1 / n_in                     SELU, which keeps the variance itself

The distributions are torch's: `xavier_uniform_`, `kaiming_normal_`, and `orthogonal_`. Biases are zero.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init

from torch_bp.nn.follower import LAYERS, RECTIFIERS, Follower, agreed, in_order, seen

METHODS = ("auto", "kaiming", "xavier", "lecun", "orthogonal")


@dataclass(frozen=True)
class LayerInit:
    """What was done to one layer: `method` is "" and `reason` says why, if it was left as it was."""

    name: str
    layer: str
    follower: str
    method: str
    std: float
    reason: str = ""


@dataclass(frozen=True)
class Initialization:
    """What `auto_` chose, layer by layer; print it."""

    rows: tuple[LayerInit, ...]

    @property
    def left(self) -> tuple[str, ...]:
        """Names of the layers that were left as they were."""
        return tuple(row.name for row in self.rows if not row.method)

    def __str__(self) -> str:
        lines = [f"{'layer':24} {'kind':8} {'followed by':16} {'weights':12} std"]
        for row in self.rows:
            done = f"{row.method:12} {row.std:.3g}" if row.method else f"left as it was: {row.reason}"
            lines.append(f"{row.name or '(model)':24} {row.layer:8} {row.follower:16} {done}")
        return "\n".join(lines)


def auto_(
    model: nn.Module, method: str = "auto", x: Any = None, generator: torch.Generator | None = None
) -> Initialization:
    """Initialize all Linear and Conv layers of a model in place, each by the activation that follows it.

    Weights are He's (kaiming, normal) before rectifiers (ReLU, LeakyReLU with its slope, GELU, SiLU, ELU and the like),
    LeCun's before SELU, Glorot's (xavier, uniform) before all other activations, another layer and the end. Biases
    become 0. What follows is known from the order of modules in Sequentials, past normalization, dropout and
    reshaping; where that does not tell, from a run on `x`. Other layers are left as they are, and so are weights that
    a parametrization or pruning computes: `left` of the result names them.

    Args:
        model: any module; nothing but weights and biases of Linear and Conv1d to Conv3d is altered.
        method: "auto" (default), or one of "kaiming", "xavier", "lecun" and "orthogonal" (scaled by the gain of what
            follows) for all layers.
        x: an input to run the model on, or a tuple or list of several; needed for models with a forward of their own.
        generator: of the random numbers. Default: torch's.

    Returns:
        What was chosen for each layer, and why.

    Raises:
        ValueError: `method` is none of these, or a lazy layer has no weights yet.

    Example:
        >>> import torch
        >>> from torch_bp import nn
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> chosen = nn.init.auto_(model, generator=torch.Generator().manual_seed(0))
        >>> [(row.name, row.follower, row.method) for row in chosen.rows]
        [('0', 'relu', 'kaiming'), ('2', 'end', 'xavier')]
        >>> chosen.left, model[0].bias.any().item()
        ((), False)
    """
    if method not in METHODS:
        raise ValueError(f"auto_: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    layers: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, LAYERS)
    }
    for layer, name in layers.items():
        if isinstance(layer._parameters.get("weight"), nn.parameter.UninitializedParameter):
            raise ValueError(f"auto_: layer {name!r} must have weights, got a lazy one; run the model once before.")
    followers = _followers(model, layers, x)
    done: dict[int, str] = {}
    rows = [_initialize(name, layer, followers[layer], method, generator, done) for layer, name in layers.items()]
    return Initialization(tuple(rows))


def _followers(model: nn.Module, layers: dict[nn.Module, str], x: Any) -> dict[nn.Module, Follower]:
    by_order = in_order(model)
    found = {layer: by_order.get(layer, Follower("unknown")) for layer in layers}
    if x is not None and not all(follower.known for follower in found.values()):
        calls, _ = seen(model, x, lambda *_: None)
        for layer, follower in found.items():
            followers = [f for call in calls if call.layer is layer for f in call.followers]
            if followers and not follower.known:
                found[layer] = agreed(followers)
    return found


def _chosen(method: str, follower: Follower) -> str:
    """The method for one layer, "" if what follows is not known."""
    if method != "auto" or not follower.known:
        return "" if method == "auto" else method
    if follower.name in RECTIFIERS:
        return "kaiming"
    return "lecun" if follower.name == "selu" else "xavier"


def _initialize(
    name: str,
    layer: Any,
    follower: Follower,
    method: str,
    generator: torch.Generator | None,
    done: dict[int, str],
) -> LayerInit:
    kind, weight, chosen = type(layer).__name__, layer._parameters.get("weight"), _chosen(method, follower)
    reason = ""
    if not chosen:
        reason = "what follows is not known; give an example input x, or choose a method for all."
    elif weight is None:
        reason = "its weight is computed from other parameters."
    elif id(weight) in done:
        reason = f"its weight is that of {done[id(weight)]!r}."
    if reason:
        return LayerInit(name, kind, str(follower), "", float("nan"), reason)
    done[id(weight)] = name
    _draw(weight, chosen, follower, generator)
    if layer._parameters.get("bias") is not None:
        init.zeros_(layer.bias)
    std = weight.detach().float().std(correction=0)
    return LayerInit(name, kind, str(follower), chosen, float("nan") if std.is_meta else std.item())


def _draw(weight: Tensor, method: str, follower: Follower, generator: torch.Generator | None) -> None:
    if method == "kaiming":
        init.kaiming_normal_(weight, a=follower.slope, nonlinearity="leaky_relu", generator=generator)
    elif method == "lecun":
        init.kaiming_normal_(weight, nonlinearity="linear", generator=generator)
    elif method == "xavier":
        init.xavier_uniform_(weight, generator=generator)
    else:
        rectifies = follower.name in RECTIFIERS
        init.orthogonal_(
            weight, init.calculate_gain("leaky_relu", follower.slope) if rectifies else 1.0, generator=generator
        )
