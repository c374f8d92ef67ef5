"""An optimizer of your own: one rule, the names of its state, and the numbers that the rule takes.

The numbers come from the parameter group and the step count. `step` does the rest, for torch_bp's optimizers and for a
user's own, who subclasses `RuleOptimizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.step import step


class RuleOptimizer(torch.optim.Optimizer):
    """An optimizer of your own: name the rule and its state, and it runs fused, resumes and checkpoints.

    Class attributes of a subclass:
        rule: a `@formula(updates=("param", ...))` whose positional arguments are `param`, `grad` and the state, in the
            order of `state_names`.
        state_names: names under which the state is kept in `optimizer.state[p]`. State starts at zero.
        counts_steps: keep a `step` count per parameter, as Adam does. Default False.
        numbers: with `counts_steps`, names of state that is one number for a whole parameter, as the product of
            NAdam's momenta is. `advance` says what an update makes of one; `scalars` then gets them as keywords.

    `scalars` may be overridden; as it stands, the keyword-only arguments of the rule are taken from the parameter
    group by name. Gradients are never written.

    Args:
        params: parameters, named parameters or groups, as in `torch.optim.Optimizer`.
        defaults: the hyperparameters and their default values; `lr` should be one of them.

    Example:
        >>> import torch
        >>> from torch_bp.kernels import formula, sign
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
    """

    rule: Callable[..., Any]
    state_names: Sequence[str] = ()
    counts_steps = False
    numbers: Sequence[str] = ()

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
            cls._check_rule()

    @classmethod
    def _check_rule(cls) -> None:
        """Refuse a rule that does not update the parameter, or writes to the gradient, or has other arguments."""
        formula = cls.rule.formula  # type: ignore[attr-defined]
        if isinstance(cls.state_names, str):
            raise TypeError(f"{cls.__name__}: state_names must be a tuple of names, got {cls.state_names!r}.")
        wanted = f"(param, grad{''.join(f', {name}' for name in cls.state_names)}, *, ...)"
        if cls.state_layout is RuleOptimizer.state_layout and len(formula.tensors) != 2 + len(cls.state_names):
            raise TypeError(
                f"{cls.__name__}: rule must take the parameter, the gradient and the state of state_names, {wanted}, "
                f"got {', '.join(formula.tensors)}."
            )
        state = formula.tensors[2:]
        if {*state} == {*cls.state_names} and state != tuple(cls.state_names):  # checkpoints would swap them
            raise TypeError(f"{cls.__name__}: state_names must be in the rule's order, {state}, got {cls.state_names}.")
        param, grad = (*formula.tensors, "", "")[:2]
        if param not in formula.updates or grad in formula.updates:
            raise TypeError(
                f"{cls.__name__}: updates of the rule must name its first argument, the parameter {param!r}, and not "
                f"its second, the gradient {grad!r}; got updates={formula.updates}."
            )

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if not hasattr(self, "rule"):
            raise TypeError(
                f"{type(self).__name__}: the class must have a rule, got none; name a @formula(updates=(...)) in it."
            )
        super().__init__(params, defaults)

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
        missing = [name for name in names if name not in group]
        if missing:
            raise ValueError(
                f"{type(self).__name__}: the rule's keywords must be in the parameter group, got no "
                f"{', '.join(map(repr, missing))}; add them to `defaults` or override `scalars`."
            )
        return {name: group[name] for name in names}

    def sparse(self, group: Mapping[str, Any]) -> str:
        """Say how a sparse gradient is applied: "rows" where zero gradients change nothing, "dense", or raise."""
        return "dense"

    step = step
    load_state_dict = load_state_dict
