"""Adamax: Adam with the largest gradient so far, which fades, in the place of the root of the mean square.

    m <- beta1 m + (1 - beta1) g                 u <- max(beta2 u, |g| + eps)
    W <- W - lr m / ((1 - beta1^t) u)

Only m needs a correction for its start at 0: a maximum has none to correct. Source: Kingma and Ba 2014, sec. 7.1.
"""

from collections.abc import Mapping
from typing import Any

import torch

from torch_bp.kernels import formula, maximum
from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.optimizer import RuleOptimizer
from torch_bp.optim.step import power, step
from torch_bp.optim.terms import with_decay


@formula(updates=("param", "exp_avg", "exp_inf"), static=("maximize", "decay"))
def adamax(param, grad, exp_avg, exp_inf, *, lr, beta1, beta2, eps, bias_correction, weight_decay, maximize, decay):
    """The bias correction is 1 - beta1^t."""
    param, grad = with_decay(param, grad, weight_decay, maximize=maximize, decay=decay)
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_inf = maximum(beta2 * exp_inf, abs(grad) + eps)
    step_size = lr / bias_correction
    return param - step_size * (exp_avg / exp_inf), exp_avg, exp_inf


class Adamax(torch.optim.Adamax):
    """As `torch.optim.Adamax`, which torch fuses on no device; here it is one kernel.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = Adamax([weight], lr=0.5)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000])
    """

    rule = staticmethod(adamax)
    counts_steps = True
    reads_counts = True

    def state_layout(self, group: Mapping[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_inf")

    def scalars(self, group: Mapping[str, Any], step: Any, fresh: bool) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {name: group[name] for name in ("lr", "eps", "weight_decay", "maximize")} | {
            "beta1": beta1,
            "beta2": beta2,
            "bias_correction": 1 - power(beta1, step),
            "decay": bool(group["weight_decay"] != 0),
        }

    def sparse(self, group: Mapping[str, Any]) -> str:
        raise RuntimeError("Adamax does not support sparse gradients")

    initial = RuleOptimizer.initial
    step = step
    load_state_dict = load_state_dict
