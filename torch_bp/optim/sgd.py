"""Gradient descent: plain (eq. 6, 7), with momentum (eq. 8, 9) and as Nesterov has it (sec. 5.4).

    v <- momentum v + (1 - dampening) g          W <- W - lr v            (at the first update v = g)
    Nesterov:                                    W <- W - lr (g + momentum v)

Nesterov's method evaluates the gradient g' at a look-ahead point, and steps from where it stands:

    v <- momentum v + g'(W' - lr momentum v)     W' <- W' - lr v

Here, as in torch, W *is* the look-ahead point, W = W' - lr momentum v, so that the gradient that `backward` leaves is
the one at W. Inserted into both lines, with v+ for the new v:

    W+ = W' - lr v+ - lr momentum v+
       = W + lr momentum v - lr (momentum v + g) - lr momentum v+
       = W - lr (g + momentum v+)

which is the line above. Both make the same steps while lr and momentum stay the same; W' = W + lr momentum v is
where the report's method stands. Sources: Sutskever et al. 2013; Bengio et al. 2013, sec. 3.5, for the change of
variables.
"""

from collections.abc import Mapping
from typing import Any

import torch

from torch_bp.kernels import formula
from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.optimizer import RuleOptimizer
from torch_bp.optim.step import step
from torch_bp.optim.terms import with_decay


@formula(updates=("param", "momentum_buffer"), static=("nesterov", "maximize", "decay"))
def sgd(param, grad, momentum_buffer, *, lr, momentum, gain, weight_decay, nesterov, maximize, decay):
    """eq. 6 to 9; `gain` is 1 - dampening."""
    param, grad = with_decay(param, grad, weight_decay, maximize=maximize, decay=decay)
    if momentum_buffer is None:
        return param - lr * grad, None
    momentum_buffer = momentum * momentum_buffer + gain * grad
    direction = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    return param - lr * direction, momentum_buffer


class SGD(torch.optim.SGD):
    """As `torch.optim.SGD`; eq. 6 to 9 and sec. 5.4.

    With `nesterov` the parameters are the look-ahead points of the report: the gradient is wanted where they are, and
    the step goes along g + momentum v. The report's weights, from which it looks ahead, are
    `p + lr * momentum * state[p]["momentum_buffer"]`.

    `foreach` and `fused` are accepted; the update is one kernel over all parameters with or without them. Only
    `differentiable` and, on CUDA, `fused=True` are updated one by one. With `differentiable` and momentum, the first
    step has its derivative by the gradient, which torch loses: it detaches the buffer that it makes of the gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = SGD([weight], lr=0.5)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.])
    """

    rule = staticmethod(sgd)
    counts_steps = False
    begins_each = True  # as torch, which makes a buffer for each place of a parameter that is listed twice

    def state_layout(self, group: Mapping[str, Any]) -> tuple[str | None, ...]:
        return ("momentum_buffer" if group["momentum"] != 0 else None,)

    def scalars(self, group: Mapping[str, Any], step: Any, fresh: bool) -> dict[str, Any]:
        return {
            "lr": group["lr"],
            "momentum": group["momentum"],
            "gain": 1 if fresh else 1 - group["dampening"],
            "weight_decay": group["weight_decay"],
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
            "decay": bool(group["weight_decay"] != 0),
        }

    def sparse(self, group: Mapping[str, Any]) -> str:
        return "rows" if group["momentum"] == 0 and group["weight_decay"] == 0 else "dense"

    initial = RuleOptimizer.initial
    step = step
    load_state_dict = load_state_dict
