"""Adam, eq. 10 and 11: moving averages m of the gradient and v of its square, both corrected for their start at 0.

    m <- beta1 m + (1 - beta1) g                 v <- beta2 v + (1 - beta2) g^2
    W <- W - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

AMSGrad puts the largest v so far in the place of v. Source: Kingma and Ba 2014; Reddi et al. 2018 for AMSGrad.
"""

from collections.abc import Mapping
from typing import Any

import torch

from torch_bp.kernels import formula, maximum, sqrt
from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.optimizer import RuleOptimizer
from torch_bp.optim.step import power, step
from torch_bp.optim.terms import moments, with_decay


@formula(
    updates=("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), static=("maximize", "decay", "decoupled_weight_decay")
)
def adam(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    *,
    lr,
    beta1,
    beta2,
    eps,
    bias_correction1,
    bias_correction2,
    weight_decay,
    maximize,
    decay,
    decoupled_weight_decay,
):
    """eq. 10 and 11; the two bias corrections are 1 - beta^t."""
    rate = lr if decoupled_weight_decay else None
    param, grad = with_decay(param, grad, weight_decay, maximize=maximize, decay=decay, decoupled_from=rate)
    exp_avg, exp_avg_sq = moments(grad, exp_avg, exp_avg_sq, beta1, beta2)
    largest = exp_avg_sq
    if max_exp_avg_sq is not None:
        largest = max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    step_size = lr / bias_correction1
    param = param - step_size * (exp_avg / (sqrt(largest) / sqrt(bias_correction2) + eps))
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


class Adam(torch.optim.Adam):
    """As `torch.optim.Adam`; eq. 10 and 11.

    `foreach` and `fused` are accepted; the update is one kernel over all parameters with or without them. Only
    `differentiable`, `capturable` and, on CUDA, `fused=True` are updated one by one, with the step count on the device.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = Adam([weight], lr=0.5)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000])
    """

    rule = staticmethod(adam)
    counts_steps = True

    def state_layout(self, group: Mapping[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None)

    def scalars(self: Any, group: Mapping[str, Any], step: Any, fresh: bool) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "bias_correction1": 1 - power(beta1, step),
            "bias_correction2": 1 - power(beta2, step),
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
            "decay": bool(group["weight_decay"] != 0),
            "decoupled_weight_decay": group["decoupled_weight_decay"],
        }

    def sparse(self, group: Mapping[str, Any]) -> str:
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")

    initial = RuleOptimizer.initial
    step = step
    load_state_dict = load_state_dict
