"""Adadelta: the gradient in units of its own size, times the size of the steps made so far.

    s <- rho s + (1 - rho) g^2                   d = g sqrt(a + eps) / sqrt(s + eps)
    a <- rho a + (1 - rho) d^2                   W <- W - lr d

The step d has the units of W, so that lr = 1 is a rate for every scale; eps gives the first steps their size.
Source: Zeiler 2012, "ADADELTA", algorithm 1.
"""

from collections.abc import Mapping
from typing import Any

import torch

from torch_bp.kernels import formula, sqrt
from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.optimizer import RuleOptimizer
from torch_bp.optim.step import step
from torch_bp.optim.terms import with_decay


@formula(updates=("param", "square_avg", "acc_delta"), static=("maximize", "decay"))
def adadelta(param, grad, square_avg, acc_delta, *, lr, rho, eps, weight_decay, maximize, decay):
    """The two averages are of squared gradients and of squared steps."""
    param, grad = with_decay(param, grad, weight_decay, maximize=maximize, decay=decay)
    square_avg = rho * square_avg + (1 - rho) * grad * grad
    delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * grad
    acc_delta = rho * acc_delta + (1 - rho) * delta * delta
    return param - lr * delta, square_avg, acc_delta


class Adadelta(torch.optim.Adadelta):
    """As `torch.optim.Adadelta`, which torch fuses on no device; here it is one kernel.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = Adadelta([weight], rho=0.75, eps=1.0)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.4142])
    """

    rule = staticmethod(adadelta)
    counts_steps = True

    def state_layout(self, group: Mapping[str, Any]) -> tuple[str | None, ...]:
        return ("square_avg", "acc_delta")

    def scalars(self, group: Mapping[str, Any], step: Any, fresh: bool) -> dict[str, Any]:
        names = ("lr", "rho", "eps", "weight_decay", "maximize")
        return {name: group[name] for name in names} | {"decay": bool(group["weight_decay"] != 0)}

    def sparse(self, group: Mapping[str, Any]) -> str:
        raise RuntimeError("Adadelta does not support sparse gradients")

    initial = RuleOptimizer.initial
    step = step
    load_state_dict = load_state_dict
