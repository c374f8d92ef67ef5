"""The optimizer in the backward: each parameter is updated as soon as its gradient is there, and the gradient freed.

A backward then never holds more than one gradient beside those that autograd is still adding up; in an ordinary loop
all of them are alive at once, as much memory as the parameters take. Each parameter is then a kernel call of its own,
some 30 us, where an ordinary step is one call: it saves memory, and for many small parameters it costs time.

What needs all gradients before the first update has no place in it. The norm of all gradients is known when the last
one is; `clip_grad_norm_` between backward and step finds none. Clipping by that norm therefore takes two passes,
`handle.backward(loss, max_norm)`, which are exact. To clip each parameter by itself, give it a hook before:

    def clip(p):
        torch.nn.utils.clip_grad_norm_(p, 1.0)
    p.register_post_accumulate_grad_hook(clip)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from torch_bp.optim.plan import Plan
from torch_bp.optim.shards import is_distributed
from torch_bp.optim.step import lists_may_serve, step, update_group


class _Member:
    """A parameter in its group, updated by itself through the optimizer's rule and state."""

    def __init__(self, optimizer: Any, p: Tensor, name: str) -> None:
        self.optimizer, self.p, self.name = optimizer, p, name
        self.plan = Plan()
        self.state: Mapping[str, Any] | None = None
        self.number = self.position = 0

    def update(self) -> None:
        """Update from `p.grad`, as its group says now: rates change, and loading puts other dicts in its place."""
        group = {**self._found(), "params": [self.p]}
        if self.state is not self.optimizer.state.get(self.p):
            self.plan.shares.clear()
        update_group(self.optimizer, self.plan if lists_may_serve() else None, 0, group)
        self.state = self.optimizer.state.get(self.p)

    def _found(self) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        if self.number < len(groups):
            params = groups[self.number]["params"]
            if self.position < len(params) and params[self.position] is self.p:
                return groups[self.number]
        for self.number, group in enumerate(groups):
            for self.position, p in enumerate(group["params"]):
                if p is self.p:
                    return group
        raise RuntimeError(
            f"apply_in_backward: {self.name} must stay in the optimizer, got a gradient and no group that has "
            "it; remove() the handle first."
        )


class AppliedInBackward:
    """What `apply_in_backward` returns: `remove()`, also as a context manager, and `backward` with clipping."""

    def __init__(self, optimizer: Any, members: list[_Member], model: torch.nn.Module) -> None:
        self._optimizer, self._members = optimizer, members
        self._updated: set[Tensor] = set()
        self._norms: dict[Tensor, Tensor] | None = None
        self._clip: tuple[float, Tensor] | None = None
        self._scaling = vars(optimizer).get("_step_supports_amp_scaling")
        optimizer._step_supports_amp_scaling = True  # a GradScaler then tells the step that it is there
        optimizer._applied_in_backward = self
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            model.register_forward_pre_hook(_refuse_data_parallel),
        ]
        for member in members:
            self._handles.append(member.p.register_post_accumulate_grad_hook(self._hook_of(member)))

    def _hook_of(self, member: _Member) -> Any:
        def hook(p: Tensor) -> None:
            try:
                with torch.no_grad():
                    self._take(p, member)
            finally:  # also a gradient that is refused: a step would apply it
                p.grad = None

        return hook

    def _take(self, p: Tensor, member: _Member) -> None:
        if p in self._updated:
            raise RuntimeError(
                "apply_in_backward: optimizer.step() must be called after each backward, got a second gradient for "
                f"{member.name}; gradients that are freed cannot be accumulated: remove() the handle to do so, or make "
                "one backward of the sum of the losses."
            )
        if self._norms is not None:
            self._norms[p] = get_total_norm([p.grad], self._norm_type)  # type: ignore[list-item]
            return
        if self._clip is not None:
            clip_grads_with_norm_([p], *self._clip)
        member.update()
        self._updated.add(p)

    def backward(self, loss: Tensor, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Compute gradients twice: for their total norm, and, clipped by it, for the updates.

        The same numbers as `loss.backward()`, `torch.nn.utils.clip_grad_norm_(parameters, max_norm)` and a step, for
        one backward more. Only the gradients of this optimizer's parameters are computed.

        Args:
            loss: of one element; its graph is gone through twice, so plain parameters only, not those of `fully_shard`.
            max_norm: above which all gradients are made smaller by one factor; at least 0.
            norm_type: which norm. Default: 2.

        Returns:
            The total norm, before it is clipped.

        Raises:
            ValueError: parameters that are DTensors, or that have gradients already.
        """
        inputs: Any = [member.p for member in self._members if member.p.requires_grad]
        left = [member.name for member in self._members if member.p.grad is not None]
        if left:
            raise ValueError(
                "apply_in_backward: parameters must have no gradient before a backward that clips, got one of "
                f"{', '.join(left)}; call optimizer.zero_grad() first."
            )
        if any(map(is_distributed, inputs)):
            raise ValueError(
                "apply_in_backward: parameters must be plain tensors for a backward that clips, got DTensors; clip "
                "each by itself in a hook made before."
            )
        self._norms, self._norm_type = {}, norm_type
        try:
            loss.backward(retain_graph=True, inputs=inputs)
            norms = [self._norms[p] for p in inputs if p in self._norms]
        finally:
            self._norms = None
        total = get_total_norm(norms, norm_type)
        self._clip = max_norm, total
        try:
            loss.backward(inputs=inputs)
        finally:
            self._clip = None
        return total

    def _before_step(self, optimizer: Any, args: Any, keywords: Any) -> None:
        if hasattr(optimizer, "grad_scale"):
            del optimizer.grad_scale, optimizer.found_inf
            raise RuntimeError(
                "apply_in_backward: gradients must be unscaled when they come, got a GradScaler, which unscales them "
                "after the backward; the parameters were updated from scaled ones. Train in bfloat16, which needs no "
                "scaling, or without apply_in_backward."
            )

    def _after_step(self, *_: Any) -> None:
        self._updated.clear()

    def remove(self) -> None:
        """Leave the model and the optimizer as they were; a second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        del self._optimizer._applied_in_backward
        if self._scaling is None:
            del self._optimizer._step_supports_amp_scaling
        else:
            self._optimizer._step_supports_amp_scaling = self._scaling

    def __enter__(self) -> AppliedInBackward:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def apply_in_backward(model: torch.nn.Module, optimizer: Any) -> AppliedInBackward:
    """Update each parameter as soon as its gradient is there, and free the gradient at once.

    A training loop stays as it is: `step()` finds no gradients and updates nothing, but runs hooks and closures and
    lets schedules count; `zero_grad()` has nothing to do. The weights are the same, to the bit. Rates, groups and
    `state_dict` are the optimizer's as before. Parameters of the optimizer that the model does not have, or that do not
    require gradients yet, are updated by `step()` as always.

    One backward for each step: gradients cannot be accumulated over several, nor scaled by a `GradScaler`, and
    `clip_grad_norm_` finds none; the handle's `backward` clips. `fully_shard` works, `DistributedDataParallel`, which
    averages gradients later, does not.

    Args:
        model: whose parameters; the whole of what is trained, so that its forward can tell who has wrapped it.
        optimizer: one of `torch_bp.optim`'s, or a `RuleOptimizer`.

    Returns:
        A handle, whose `remove()` restores everything. It is a context manager as well.

    Raises:
        TypeError: an optimizer without a rule, or with a `step` of its own, such as LBFGS.
        ValueError: nothing to update, `differentiable`, a model that DistributedDataParallel wraps.
        RuntimeError: a second call for the same optimizer; later, in the backward, a second gradient before `step()`,
            and in the step, a GradScaler.

    Example:
        >>> import torch
        >>> from torch_bp.optim import SGD, apply_in_backward
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = SGD(model.parameters(), lr=0.25)
        >>> handle = apply_in_backward(model, optimizer)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     assert model.weight.grad is None
        ...     optimizer.step()
        >>> model.weight.data
        tensor([[0.5000, 0.5000]])
        >>> handle.remove()
    """
    if not hasattr(optimizer, "rule") or type(optimizer).step is not step:
        raise TypeError(
            "apply_in_backward: optimizer must be one of torch_bp.optim's own, with its step, got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}; update after the backward with that one."
        )
    if optimizer.defaults.get("differentiable"):
        raise ValueError("apply_in_backward: differentiable must be False, got True; the graph would be freed.")
    if "_applied_in_backward" in vars(optimizer):
        raise RuntimeError("apply_in_backward: the optimizer is applied in the backward already; remove() that first.")
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) or type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(_refusal(module))
    names = {p: name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    members = [_Member(optimizer, p, names[p]) for p in params if p in names and p.requires_grad]
    if not members:
        raise ValueError(
            "apply_in_backward: model must have parameters of the optimizer that require gradients, got none; build "
            "the optimizer from this model's parameters."
        )
    return AppliedInBackward(optimizer, members, model)


def _refusal(module: torch.nn.Module) -> str:
    return (
        f"apply_in_backward: gradients must be complete when they come, got {type(module).__name__}, which averages "
        "them over processes later; use torch.distributed.fsdp.fully_shard."
    )


def _refuse_data_parallel(*_: Any) -> None:
    """In the forward of the model: DistributedDataParallel has wrapped it since."""
    wrapping = DistributedDataParallel._active_ddp_module
    if wrapping is not None:
        raise RuntimeError(_refusal(wrapping))
