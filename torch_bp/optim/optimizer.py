"""From one rule to an optimizer: groups, state, step counts, and which way the update runs.

An optimizer is a rule (a `@formula` that updates a parameter and its state from a gradient), the names of its state,
and the numbers the rule takes from a group and the step count. `step` does the rest, for torch_bp's optimizers and
for a user's own, who subclasses `RuleOptimizer`:

- *The list kernel.* Parameters of one device, dtype and step count are one call over a table of addresses. What was
  collected (`Plan`) is kept while parameters, state and the set of gradients stay the same objects, which a few
  comparisons tell; step counts are read once and then known.
- *One by one*, through the same formula: sparse and complex gradients, tensor subclasses, `differentiable`,
  `capturable`, `torch.compile`, and whatever else a kernel may not serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels.plain import unwatched
from torch_bp.optim.plan import Plan, forget, initial_state

_layout_of = Tensor.layout.__get__  # type: ignore[attr-defined]


class RuleOptimizer(torch.optim.Optimizer):
    """An optimizer of your own: name the rule and its state, and it runs fused, resumes and checkpoints.

    Class attributes of a subclass:
        rule: a `@formula(updates=("param", ...))` whose positional arguments are `param`, `grad` and the state, in the
            order of `state_names`.
        state_names: names under which the state is kept in `optimizer.state[p]`. State starts at zero.
        counts_steps: keep a `step` count per parameter, as Adam does. Default False.

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

    def state_layout(self, group: Mapping[str, Any]) -> Sequence[str | None]:
        """Return the state's names in the order of the rule's arguments, None for one that this group does without."""
        return self.state_names

    def scalars(self, group: Mapping[str, Any], step: Any, fresh: bool) -> dict[str, Any]:
        """Return the keyword-only arguments of the rule.

        Args:
            group: the parameter group.
            step: which update of these parameters this is, from 1 on: a number, or a tensor where the count must stay
                on the device. 0 if steps are not counted.
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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters from their gradients.

        Args:
            closure: evaluates the model anew, computes gradients and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        return step(self, closure)


# torch's check that a captured graph holds a capturable optimizer; renamed after torch 2.11
_check_capture = (
    getattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", None)
    or torch.optim.Optimizer._cuda_graph_capture_health_check
)


def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
    """The `step` of every optimizer here; `self` has what `RuleOptimizer` describes."""
    if "capturable" in self.defaults:
        _check_capture(self)
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    recording = torch.is_grad_enabled()
    torch.set_grad_enabled(self.defaults.get("differentiable", False))
    try:
        if not _overflowed(self):
            for index, group in enumerate(self.param_groups):
                _step_group(self, index, group, getattr(self, "grad_scale", None))
    finally:
        torch.set_grad_enabled(recording)
    return loss


def _overflowed(optimizer: Any) -> bool:
    """True if a GradScaler that leaves unscaling to us found Inf or NaN: the step is skipped."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def _step_group(self: Any, index: int, group: dict[str, Any], scale: Tensor | None) -> None:
    gradients: list[Tensor | None] = [p.grad for p in group["params"]]
    listed = scale is None and not torch.is_inference_mode_enabled() and not _on_device(group)
    if listed and _listable(group["params"], gradients):
        plans = self.__dict__.setdefault("_plans", {})
        plan = plans.get(index)
        if plan is None or not plan.fits(self, group, gradients):
            plan = plans[index] = Plan(self, group, gradients)
        gradients = plan.run(self, group, gradients)
    if gradients:
        _one_by_one(self, group, gradients, scale)


def _on_device(group: Mapping[str, Any]) -> bool:
    """True where the step count is a tensor that the host must not read, or the update itself is differentiated."""
    if torch.compiler.is_compiling() or not unwatched():
        return True
    if group.get("differentiable") or group.get("capturable"):
        return True
    return bool(group.get("fused")) and any(p.device.type != "cpu" for p in group["params"])


def _listable(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> bool:
    """True if the gradients are dense and real, as the list kernel wants them."""
    return {_layout_of(g) for g in gradients if g is not None} == {torch.strided} and not any(
        map(Tensor.is_complex, params)
    )


def _one_by_one(self: Any, group: dict[str, Any], gradients: Sequence[Tensor | None], scale: Tensor | None) -> None:
    """Update parameter by parameter: the way for everything that is not plain memory."""
    layout = self.state_layout(group)
    work = []
    for p, grad in zip(group["params"], gradients):
        if grad is not None:
            how = self.sparse(group) if grad.layout is not torch.strided else "as it is"
            work.append((p, grad, how))
    on_device = _on_device(group)
    for p, grad, how in work:
        state, created = initial_state(self, p, group, layout)
        step: Any = 0
        if self.counts_steps:
            step = state["step"] + 1 if on_device else state["step"].item() + 1
        try:
            scalars = self.scalars(group, step, bool(created))
            states = [None if name is None else state[name] for name in layout]
            if scale is not None:
                grad = grad / scale.to(grad.device)
            _update(self.rule, p, grad, states, scalars, how)
        except BaseException:
            forget([(state, created)])
            raise
        if self.counts_steps:
            state["step"] += 1


def _update(
    rule: Any, p: Tensor, grad: Tensor, states: list[Tensor | None], scalars: Mapping[str, Any], how: str
) -> None:
    if how == "rows":
        grad = grad.coalesce()
        where, tensors = tuple(grad._indices()), [p, *states]
        rows = [None if t is None else t[where] for t in tensors]
        rule(rows[0], grad._values(), *rows[1:], **scalars)
        for tensor, row in zip(tensors, rows):
            if tensor is not None:
                tensor[where] = row  # type: ignore[assignment]
        return
    if how == "dense":
        grad = grad.to_dense()
    tensors = [p, grad, *states]
    if p.is_complex():
        tensors = [None if t is None else torch.view_as_real(t) for t in tensors]
    scalars = {n: v.reshape(()) if isinstance(v, Tensor) else v for n, v in scalars.items()}
    rule(*tensors, **scalars)
