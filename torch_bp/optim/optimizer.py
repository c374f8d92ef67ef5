"""An optimizer of your own: one rule, the names of its state, and the numbers that the rule takes.

The numbers come from the parameter group and the step count. `step` does the rest, for torch_bp's optimizers and for a
user's own, who subclasses `RuleOptimizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.rule import check_class, check_group, missing_keywords
from torch_bp.optim.step import step


class _Uninitialised:
    """Stands for what `torch.optim.Optimizer.__init__` sets on the object, which is then found before this."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Any, owner: type) -> Any:
        if optimizer is None:
            raise AttributeError(f"type object {owner.__name__!r} has no attribute {self.name!r}")
        raise AttributeError(
            f"{owner.__name__}: __init__ must call super().__init__(params, defaults), got an optimizer without "
            f"{self.name!r}; call it there, with the hyperparameters as a dict."
        )


class RuleOptimizer(torch.optim.Optimizer):
    """An optimizer of your own: name the rule and its state, and it runs fused, resumes and checkpoints.

    Class attributes of a subclass:
        rule: a `@formula(updates=("param", ...))` whose positional arguments are `param`, `grad` and the state, in the
            order of `state_names`. `updates` names the parameter and all of the state, and the rule returns their new
            values in that order.
        state_names: names under which the state is kept in `optimizer.state[p]`. State starts at zero.
        counts_steps: keep a `step` count per parameter, as Adam does. Default False.
        numbers: with `counts_steps`, names of state that is one number for a whole parameter, as the product of
            NAdam's momenta is. `advance` says what an update makes of one; `scalars` then gets them as keywords.

    As it stands, `scalars` takes the keyword-only arguments of the rule from the parameter group by name, and `step`,
    with `counts_steps`, is the number of the update, from 1 on. Override it where the rule wants something else: one
    of `betas`, a bias correction. What it computes, it computes on the host, once for all parameters. Gradients are
    never written.

    Args:
        params: parameters, named parameters or groups, as in `torch.optim.Optimizer`.
        defaults: the hyperparameters and their default values; `lr` should be one of them.

    Raises:
        TypeError: when the class is made, the rule, the state and `scalars` do not fit together; when a group is
            added, a hyperparameter that should be a number is none.

    Example:
        >>> import torch
        >>> from torch_bp.kernels import formula, sign, sqrt
        >>> from torch_bp.optim import RuleOptimizer
        >>> @formula(updates=("param", "momentum_buffer"))
        ... def sign_momentum(param, grad, momentum_buffer, *, lr, beta):
        ...     momentum_buffer = beta * momentum_buffer + (1 - beta) * grad
        ...     return param - lr * sign(momentum_buffer), momentum_buffer
        >>> class SignMomentum(RuleOptimizer):
        ...     rule, state_names = sign_momentum, ("momentum_buffer",)
        ...     def __init__(self, params, lr=1e-3, beta=0.9):
        ...         super().__init__(params, {"lr": lr, "beta": beta})
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SignMomentum([weight], lr=0.25)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.7500, 0.7500])

        AdaBelief (Zhuang et al. 2020, algorithm 2), with betas, a step count and two states:

        >>> @formula(updates=("param", "exp_avg", "exp_avg_var"))
        ... def adabelief(param, grad, exp_avg, exp_avg_var, *, step_size, beta1, beta2, eps, bias_correction2):
        ...     exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        ...     surprise = grad - exp_avg
        ...     exp_avg_var = beta2 * exp_avg_var + (1 - beta2) * surprise * surprise + eps
        ...     param = param - step_size * exp_avg / (sqrt(exp_avg_var / bias_correction2) + eps)
        ...     return param, exp_avg, exp_avg_var
        >>> class AdaBelief(RuleOptimizer):
        ...     rule, state_names, counts_steps = adabelief, ("exp_avg", "exp_avg_var"), True
        ...     def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-16):
        ...         super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        ...     def scalars(self, group, step, fresh):
        ...         beta1, beta2 = group["betas"]
        ...         return {
        ...             "step_size": group["lr"] / (1 - beta1**step),
        ...             "beta1": beta1,
        ...             "beta2": beta2,
        ...             "eps": group["eps"],
        ...             "bias_correction2": 1 - beta2**step,
        ...         }
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdaBelief([weight], lr=0.225)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.7500, 0.7500])
        >>> optimizer.state[weight]["step"]
        tensor(1.)
    """

    rule: Callable[..., Any]
    state_names: Sequence[str] = ()
    counts_steps = False
    numbers: Sequence[str] = ()

    defaults, param_groups, state = _Uninitialised(), _Uninitialised(), _Uninitialised()  # type: ignore[assignment]
    _optimizer_step_pre_hooks = _Uninitialised()  # type: ignore[assignment]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "rule" in cls.__dict__:
            rule = getattr(cls.__dict__["rule"], "__func__", cls.__dict__["rule"])
            if not hasattr(rule, "formula"):
                raise TypeError(
                    f"{cls.__name__}: rule must be a @formula(updates=(...)), got {type(rule).__name__}; "
                    "decorate it with torch_bp.kernels.formula."
                )
            cls.rule = staticmethod(rule)
        if hasattr(cls, "rule"):
            check_class(cls, RuleOptimizer)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if not hasattr(self, "rule"):
            raise TypeError(
                f"{type(self).__name__}: the class must have a rule, got none; name a @formula(updates=(...)) in it."
            )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; TypeError for hyperparameters that should be numbers."""
        if isinstance(param_group, dict):
            check_group(self, self.defaults | param_group, type(self).scalars is RuleOptimizer.scalars)
        super().add_param_group(param_group)

    def state_layout(self, group: Mapping[str, Any]) -> Sequence[str | None]:
        """Return the state's names in the order of the rule's arguments, None for one that this group does without."""
        return self.state_names

    def initial(self, name: str, group: Mapping[str, Any]) -> float:
        """Return what the state of this name starts at. Default 0."""
        return 0

    def advance(self, group: Mapping[str, Any], step: Any, name: str, value: Any) -> Any:
        """Return what update number `step` makes of `value`, the one-element tensor of this name among `numbers`."""
        raise NotImplementedError(f"{type(self).__name__}: advance must be overridden, as there are numbers.")

    def scalars(self, group: Mapping[str, Any], step: Any, fresh: bool) -> dict[str, Any]:
        """Return the keyword-only arguments of the rule.

        Args:
            group: the parameter group.
            step: which update of these parameters this is, from 1 on: a number, or a tensor where the count must stay
                on the device. 0 if steps are not counted. `torch_bp.optim.step.power(beta, step)` is beta^step also
                in a compiled step, and where a schedule changes beta.
            fresh: True at the first update of these parameters.
        """
        rule = self.rule.formula  # type: ignore[attr-defined]
        names = (*rule.scalars, *rule.static)
        if self.counts_steps and "step" in names:
            group = {**group, "step": step}
        missing = [name for name in names if name not in group]
        if missing:
            raise missing_keywords(self, missing)
        return {name: group[name] for name in names}

    def sparse(self, group: Mapping[str, Any]) -> str:
        """Say how a sparse gradient is applied: "rows" where zero gradients change nothing, "dense", or raise."""
        return "dense"

    step = step
    load_state_dict = load_state_dict
