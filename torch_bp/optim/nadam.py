"""NAdam: Adam whose first moment looks ahead as Nesterov's does, with a momentum that grows towards beta1.

    mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)
    m <- beta1 m + (1 - beta1) g                 v <- beta2 v + (1 - beta2) g^2
    d = (1 - mu_t) g / (1 - mu_1 ... mu_t) + mu_{t+1} m / (1 - mu_1 ... mu_{t+1})
    W <- W - lr d / (sqrt(v / (1 - beta2^t)) + eps)

The product of all mu up to t is state, since `momentum_decay` and beta1 may have changed on the way.
Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam"; the schedule of mu is of Sutskever et al. 2013.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels import formula, sqrt
from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.step import power, step
from torch_bp.optim.terms import moments, with_decay


@formula(updates=("param", "exp_avg", "exp_avg_sq"), static=("maximize", "decay", "decoupled_weight_decay"))
def nadam(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    *,
    lr,
    beta1,
    beta2,
    eps,
    bias_correction2,
    mu,
    mu_next,
    mu_product,
    weight_decay,
    maximize,
    decay,
    decoupled_weight_decay,
):
    """`mu_product` is mu_1 ... mu_t; the bias correction is 1 - beta2^t."""
    rate = lr if decoupled_weight_decay else None
    param, grad = with_decay(param, grad, weight_decay, maximize=maximize, decay=decay, decoupled_from=rate)
    exp_avg, exp_avg_sq = moments(grad, exp_avg, exp_avg_sq, beta1, beta2)
    step_of_grad = lr * (1 - mu) / (1 - mu_product)
    step_of_average = lr * mu_next / (1 - mu_product * mu_next)
    root = sqrt(exp_avg_sq / bias_correction2) + eps
    return param - (step_of_grad * grad + step_of_average * exp_avg) / root, exp_avg, exp_avg_sq


def _momentum(group: Mapping[str, Any], step: Any) -> Any:
    """mu of a step."""
    return group["betas"][0] * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))


class NAdam(torch.optim.NAdam):
    """As `torch.optim.NAdam`, which torch fuses on no device; here it is one kernel.

    torch loads the one-element state `mu_product` in the dtype and on the device of its parameter. Here it stays what
    was saved, so that a run that is resumed goes on to the last bit.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = NAdam([weight], lr=0.5, momentum_decay=0.0)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.4718])
    """

    rule = staticmethod(nadam)
    counts_steps = True
    reads_counts = True
    numbers = ("mu_product",)

    def state_layout(self, group: Mapping[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq")

    def advance(self, group: Mapping[str, Any], step: Any, name: str, value: Any) -> Any:
        return value * _momentum(group, step)

    def scalars(self, group: Mapping[str, Any], step: Any, fresh: bool, mu_product: Any) -> dict[str, Any]:
        names = ("lr", "eps", "weight_decay", "maximize", "decoupled_weight_decay")
        beta1, beta2 = group["betas"]
        return {name: group[name] for name in names} | {
            "beta1": beta1,
            "beta2": beta2,
            "bias_correction2": 1 - power(beta2, step),
            "mu": _momentum(group, step),
            "mu_next": _momentum(group, step + 1),
            "mu_product": mu_product,
            "decay": bool(group["weight_decay"] != 0),
        }

    def load_state_dict(self, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        given = ((p, group["capturable"]) for group in self.param_groups for p in group["params"])
        for number, (p, capturable) in zip(saved, given):
            kept = state_dict["state"].get(number, {}).get("mu_product")
            loaded = self.state.get(p, {}).get("mu_product")
            if isinstance(kept, Tensor) and loaded is not None and kept.to(loaded) == loaded:  # a hook may have its way
                self.state[p]["mu_product"] = kept.to(loaded.device if capturable else "cpu")

    def sparse(self, group: Mapping[str, Any]) -> str:
        raise RuntimeError("NAdam does not support sparse gradients")

    def initial(self, name: str, group: Mapping[str, Any]) -> float:
        return 1 if name == "mu_product" else 0

    step = step
