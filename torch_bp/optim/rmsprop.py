"""RMSprop, sec. 6.1: the rate of each parameter is divided by the root of a moving average of squared gradients.

    s <- alpha s + (1 - alpha) g^2               W <- W - lr g / (sqrt(s) + eps)
    centered:  a <- alpha a + (1 - alpha) g,  with s - a^2 in the place of s
    momentum:  b <- momentum b + g / (sqrt(s) + eps),  W <- W - lr b
    eps_inside_sqrt:  sqrt(s + eps)  in the place of  sqrt(s) + eps

The report calls s an accumulated sum in one sentence: it is a moving average, Adagrad has the sum.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torch_bp.kernels import formula, sqrt
from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.optimizer import RuleOptimizer
from torch_bp.optim.step import step
from torch_bp.optim.terms import with_decay


@formula(
    updates=("param", "square_avg", "momentum_buffer", "grad_avg"), static=("maximize", "decay", "eps_inside_sqrt")
)
def rmsprop(
    param,
    grad,
    square_avg,
    momentum_buffer,
    grad_avg,
    *,
    lr,
    alpha,
    eps,
    momentum,
    weight_decay,
    maximize,
    decay,
    eps_inside_sqrt=False,
):
    """sec. 6.1."""
    param, grad = with_decay(param, grad, weight_decay, maximize=maximize, decay=decay)
    square_avg = alpha * square_avg + (1 - alpha) * grad * grad
    variance = square_avg
    if grad_avg is not None:
        grad_avg = grad_avg + (1 - alpha) * (grad - grad_avg)
        variance = square_avg - grad_avg * grad_avg
    root = sqrt(variance + eps) if eps_inside_sqrt else sqrt(variance) + eps
    direction = grad / root
    if momentum_buffer is not None:
        direction = momentum_buffer = momentum * momentum_buffer + direction
    return param - lr * direction, square_avg, momentum_buffer, grad_avg


class RMSprop(torch.optim.RMSprop):
    """As `torch.optim.RMSprop`; sec. 6.1. torch fuses this one on no device; here it is one kernel.

    Args:
        eps_inside_sqrt: divide by sqrt(s + eps), as the TensorFlow 1 optimizer does, and not by sqrt(s) + eps. `eps`
            then bounds the step at lr / sqrt(eps) g. Default: False, torch's form.

    Only if it is True, `eps_inside_sqrt` is a key of `param_groups`, and may be one of a single group. torch's class
    keeps the key of such a checkpoint and does not heed it; a checkpoint without the key leaves it as constructed.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = RMSprop([weight], lr=0.05)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        eps_inside_sqrt: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
        if eps_inside_sqrt:
            self.defaults["eps_inside_sqrt"] = True
            for group in self.param_groups:
                group.setdefault("eps_inside_sqrt", True)

    rule = staticmethod(rmsprop)
    counts_steps = True

    def state_layout(self, group: Mapping[str, Any]) -> tuple[str | None, ...]:
        return (
            "square_avg",
            "momentum_buffer" if group["momentum"] > 0 else None,
            "grad_avg" if group["centered"] else None,
        )

    def scalars(self, group: Mapping[str, Any], step: Any, fresh: bool) -> dict[str, Any]:
        names = ("lr", "alpha", "eps", "momentum", "weight_decay", "maximize")
        inside = group.get("eps_inside_sqrt", self.defaults.get("eps_inside_sqrt", False))
        return {name: group[name] for name in names} | {
            "decay": bool(group["weight_decay"] != 0),
            "eps_inside_sqrt": bool(inside),
        }

    def sparse(self, group: Mapping[str, Any]) -> str:
        raise RuntimeError("RMSprop does not support sparse gradients")

    initial = RuleOptimizer.initial
    step = step
    load_state_dict = load_state_dict
