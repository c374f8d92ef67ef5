"""What several update rules have in common, once: parts of formulas, made of arithmetic as they are."""

from __future__ import annotations

from typing import Any


def with_decay(
    param: Any,
    grad: Any,
    weight_decay: Any,
    *,
    maximize: bool,
    decay: bool,
    decoupled_from: Any = None,
) -> tuple[Any, Any]:
    """The parameter and the gradient that a rule goes on with: L2 regularisation, sec. 9.5, item 3, and the sign.

    Args:
        decay: whether there is any. Coupled, it is part of the gradient, g + weight_decay W; decoupled from it
            (Loshchilov and Hutter 2017), the parameter shrinks by itself, to W (1 - lr weight_decay).
        decoupled_from: the rate lr where it is decoupled, else None.
    """
    if maximize:
        grad = -grad
    if decay and decoupled_from is not None:
        param = param * (1 - decoupled_from * weight_decay)
    elif decay:
        grad = grad + weight_decay * param
    return param, grad


def moments(grad: Any, exp_avg: Any, exp_avg_sq: Any, beta1: Any, beta2: Any) -> tuple[Any, Any]:
    """eq. 10: the moving averages of the gradient and of its square."""
    return beta1 * exp_avg + (1 - beta1) * grad, beta2 * exp_avg_sq + (1 - beta2) * grad * grad
