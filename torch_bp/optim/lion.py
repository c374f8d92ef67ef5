"""Lion: every element moves by the rate, in the direction of a momentum that the new gradient has a say in.

    W <- W - lr (sign(beta1 m + (1 - beta1) g) + weight_decay W)
    m <- beta2 m + (1 - beta2) g

One state per parameter, half of Adam's. Steps are as long as lr, so its rate is 3 to 10 times smaller than AdamW's
and its weight decay larger by as much. Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms",
algorithm 2 and sec. 5.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torch_bp.kernels import formula, sign
from torch_bp.optim.optimizer import RuleOptimizer


@formula(updates=("param", "exp_avg"), static=("maximize",))
def lion(param, grad, exp_avg, *, lr, beta1, beta2, weight_decay, maximize):
    """Algorithm 2; the direction is taken from the average before it takes the gradient in."""
    if maximize:
        grad = -grad
    direction = sign(beta1 * exp_avg + (1 - beta1) * grad)
    exp_avg = beta2 * exp_avg + (1 - beta2) * grad
    return param * (1 - lr * weight_decay) - lr * direction, exp_avg


class Lion(RuleOptimizer):
    """Lion, the sign of an interpolated momentum, with decoupled weight decay.

    Args:
        params: parameters, named parameters or groups, as in `torch.optim.Optimizer`.
        lr: learning rate, at least 0; a number or a one-element tensor. Default: 1e-4.
        betas: how much of the momentum is in the direction of a step, and how much of it stays, both in [0, 1).
            Default: (0.9, 0.99).
        weight_decay: the weight shrinks by the share `lr * weight_decay` in each step; at least 0. Default: 0.
        maximize: go up the gradient. Default: False.

    Raises:
        ValueError: a hyperparameter is out of its range.

    State: `exp_avg`, of the parameter's shape.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = Lion([weight], lr=0.25)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.7500])
    """

    rule = staticmethod(lion)
    state_names = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for index, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not weight_decay >= 0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    def scalars(self, group: Mapping[str, Any], step: Any, fresh: bool) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        names = ("lr", "weight_decay", "maximize")
        return {name: group[name] for name in names} | {"beta1": beta1, "beta2": beta2}
