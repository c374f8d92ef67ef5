"""Adagrad, sec. 6.2: the rate of each parameter is divided by the root of the sum of all its squared gradients.

    s <- s + g^2            W <- W - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)

Source: Duchi, Hazan and Singer 2011.
"""

from collections.abc import Mapping
from typing import Any

import torch

from torch_bp.kernels import formula, sqrt
from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.step import step
from torch_bp.optim.terms import with_decay


@formula(updates=("param", "sum"), static=("maximize", "decay"))
def adagrad(param, grad, sum, *, lr, lr_decay, previous_steps, eps, weight_decay, maximize, decay):
    """sec. 6.2; `previous_steps` is t - 1."""
    param, grad = with_decay(param, grad, weight_decay, maximize=maximize, decay=decay)
    sum = sum + grad * grad
    rate = lr / (1 + previous_steps * lr_decay)
    return param - rate * (grad / (sqrt(sum) + eps)), sum


class Adagrad(torch.optim.Adagrad):
    """As `torch.optim.Adagrad`; sec. 6.2. Its state exists from the constructor on, as torch's.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = Adagrad([weight], lr=0.5)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000])
    """

    rule = staticmethod(adagrad)
    counts_steps = True

    def state_layout(self, group: Mapping[str, Any]) -> tuple[str | None, ...]:
        return ("sum",)

    def scalars(self, group: Mapping[str, Any], step: Any, fresh: bool) -> dict[str, Any]:
        names = ("lr", "lr_decay", "eps", "weight_decay", "maximize")
        return {name: group[name] for name in names} | {
            "previous_steps": step - 1,
            "decay": bool(group["weight_decay"] != 0),
        }

    def sparse(self, group: Mapping[str, Any]) -> str:
        if group["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
        return "rows"

    def initial(self, name: str, group: Mapping[str, Any]) -> Any:
        return group["initial_accumulator_value"]

    step = step
    load_state_dict = load_state_dict
