"""RAdam: Adam that waits for its second moment. While few squares have been averaged, the step is m alone.

    m <- beta1 m + (1 - beta1) g                 v <- beta2 v + (1 - beta2) g^2
    rho_inf = 2 / (1 - beta2) - 1                rho = rho_inf - 2 t beta2^t / (1 - beta2^t)
    rho > 5:  W <- W - lr m / (1 - beta1^t) r sqrt(1 - beta2^t) / (sqrt(v) + eps),
              r^2 = (rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho)
    else:     W <- W - lr m / (1 - beta1^t)

rho is the length of a simple moving average that is as uncertain as v. Source: Liu et al. 2020, "On the Variance of
the Adaptive Learning Rate and Beyond", algorithm 2; eps beside the uncorrected root is torch's.
"""

from collections.abc import Mapping
from typing import Any

import torch

from torch_bp.kernels import formula, maximum, sqrt, where
from torch_bp.optim.adam import Adam
from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.optimizer import RuleOptimizer
from torch_bp.optim.step import power, step
from torch_bp.optim.terms import moments, with_decay


@formula(updates=("param", "exp_avg", "exp_avg_sq"), static=("maximize", "decay", "decoupled_weight_decay"))
def radam(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    *,
    lr,
    beta1,
    beta2,
    eps,
    bias_correction1,
    bias_correction2,
    rho,
    rectification,
    weight_decay,
    maximize,
    decay,
    decoupled_weight_decay,
):
    """`rho` and `rectification`, r, are numbers of the step; the two bias corrections are 1 - beta^t."""
    rate = lr if decoupled_weight_decay else None
    param, grad = with_decay(param, grad, weight_decay, maximize=maximize, decay=decay, decoupled_from=rate)
    exp_avg, exp_avg_sq = moments(grad, exp_avg, exp_avg_sq, beta1, beta2)
    # The root of 0 has an infinite slope, which differentiating the branch not taken must not meet.
    root = sqrt(where(rho > 5, exp_avg_sq, 1)) + eps
    scale = where(rho > 5, rectification * sqrt(bias_correction2) / root, 1)
    step_size = lr / bias_correction1
    return param - step_size * exp_avg * scale, exp_avg, exp_avg_sq


class RAdam(torch.optim.RAdam):
    """As `torch.optim.RAdam`, which torch fuses on no device; here it is one kernel.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = RAdam([weight], lr=0.25)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000])
    """

    rule = staticmethod(radam)
    counts_steps = True
    reads_counts = True

    def state_layout(self, group: Mapping[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq")

    def scalars(self, group: Mapping[str, Any], step: Any, fresh: bool) -> dict[str, Any]:
        beta2 = group["betas"][1]
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * power(beta2, step) / (1 - power(beta2, step))
        long, longest = maximum(rho, 5.0), maximum(rho_inf, 5.0)  # where r is not used, it is still a number
        return Adam.scalars(self, group, step, fresh) | {
            "rho": rho,
            "rectification": sqrt((long - 4) * (long - 2) * longest / ((longest - 4) * (longest - 2) * long)),
        }

    def sparse(self, group: Mapping[str, Any]) -> str:
        raise RuntimeError("RAdam does not support sparse gradients")

    initial = RuleOptimizer.initial
    step = step
    load_state_dict = load_state_dict
