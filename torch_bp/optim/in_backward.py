"""The optimizer in the backward: each parameter is updated as soon as its gradient is there, and the gradient freed.

A backward then never holds more than one gradient beside those that autograd is still adding up; in an ordinary loop
all of them are alive at once, as much memory as the parameters take. Each parameter is then a kernel call of its own,
some 30 us, where an ordinary step is one call: it saves memory, and for many small parameters it costs time.

What needs all gradients before the first update has no place in it. The norm of all gradients is known when the last
one is; `clip_grad_norm_` between backward and step finds none, which torch takes for a norm of 0. Clipping by that norm
therefore takes two passes, `handle.backward(loss, max_norm)`, which are exact. To clip each parameter by itself, give
it a hook before:

    def clip(p):
        torch.nn.utils.clip_grad_norm_(p, 1.0)
    p.register_post_accumulate_grad_hook(clip)

A backward that fails, in a hook or for want of memory, has updated some parameters and not others. The next one cannot
tell that from gradients that are to be accumulated, and is refused, until `handle.reset()` or `step()` is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from torch_bp.optim import loss_scale
from torch_bp.optim.member import Member
from torch_bp.optim.shards import is_distributed
from torch_bp.optim.step import step


class AppliedInBackward:
    """What `apply_in_backward` returns: `remove()`, also as a context manager, `backward` with clipping, and `reset()`.

    Attributes:
        names: the parameters that are updated in the backward, and their names.
    """

    def __init__(self, optimizer: Any, members: list[Member], model: torch.nn.Module) -> None:
        self._optimizer, self._members = optimizer, members
        self.names = {member.p: member.name for member in members}
        self._of_model = {p: name for name, p in model.named_parameters()}
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
        loss_scale.watch(self)

    def _hook_of(self, member: Member) -> Any:
        def hook(p: Tensor) -> None:
            try:
                with torch.no_grad():
                    self._take(p, member)
            finally:  # also a gradient that is refused: a step would apply it
                p.grad = None

        return hook

    def _take(self, p: Tensor, member: Member) -> None:
        if p in self._updated:
            raise RuntimeError(
                "apply_in_backward: optimizer.step() must be called after each backward, got a second gradient for "
                f"{member.name}. After a backward that failed, call reset() of the handle. Gradients that are freed "
                "cannot be accumulated: remove() the handle to do so, or make one backward of the sum of the losses."
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
        one backward more. Only the gradients of this optimizer's parameters are computed: of all of them that require
        gradients now. Those that are not updated in the backward are left their clipped gradients for `step()`.

        Args:
            loss: of one element; its graph is gone through twice, so plain parameters only, not those of `fully_shard`.
            max_norm: above which all gradients are made smaller by one factor; at least 0.
            norm_type: which norm. Default: 2.

        Returns:
            The total norm, before it is clipped.

        Raises:
            RuntimeError: after `remove()`.
            ValueError: parameters that are DTensors, or that have gradients already; `max_norm` is negative or NaN.
        """
        if not max_norm >= 0:
            raise ValueError(f"apply_in_backward: max_norm must be >= 0, got {max_norm}.")
        if not self._handles:
            raise RuntimeError(
                "apply_in_backward: the handle must be in force, got backward() after remove(); call loss.backward(), "
                "clip_grad_norm_ and step."
            )
        params = self._params()
        inputs: Any = [p for p in params if p.requires_grad]
        left = [name for p, name in params.items() if p.requires_grad and p.grad is not None]
        if left:
            raise ValueError(
                "apply_in_backward: parameters must have no gradient before a backward that clips, got one of "
                f"{', '.join(left)}; call optimizer.zero_grad() first, and after a backward that failed reset()."
            )
        if any(map(is_distributed, inputs)):
            raise ValueError(
                "apply_in_backward: parameters must be plain tensors for a backward that clips, got DTensors; clip "
                "each by itself in a hook made before."
            )
        total = self._total_norm(loss, inputs, norm_type)
        self._clip = max_norm, total
        try:
            loss.backward(inputs=inputs)
        finally:
            self._clip = None
        clip_grads_with_norm_([p for p in inputs if p not in self.names], max_norm, total)
        return total

    def _total_norm(self, loss: Tensor, inputs: list[Tensor], norm_type: float) -> Tensor:
        """Of the gradients of `inputs`, none of which is kept."""
        norms = self._norms = {}
        self._norm_type = norm_type

        def measure(p: Tensor) -> None:
            norms[p] = get_total_norm([p.grad], norm_type)  # type: ignore[list-item]
            p.grad = None

        hooks = [p.register_post_accumulate_grad_hook(measure) for p in inputs if p not in self.names]
        try:
            loss.backward(retain_graph=True, inputs=inputs)
        finally:
            self._norms = None
            for hook in hooks:
                hook.remove()
        return get_total_norm([norms[p] for p in inputs if p in norms], norm_type)

    def _params(self) -> dict[Tensor, str]:
        """All parameters that the optimizer has now, or had when it was applied, and their names."""
        groups = enumerate(self._optimizer.param_groups)
        numbered = {p: f"parameter {k} of group {n}" for n, group in groups for k, p in enumerate(group["params"])}
        return {p: self._of_model.get(p, name) for p, name in {**numbered, **self.names}.items()}

    def reset(self) -> None:
        """Drop what a backward that failed has left, so that the next one starts clean.

        That is the note of what was updated, and the gradients of all parameters of the optimizer. The updates
        themselves stay, as after a step for these parameters alone: where they must not, load the weights and the
        optimizer's state of before. A call at any other time between a backward and the next does no harm, but for
        gradients that `step()` was to apply.
        """
        self._updated.clear()
        self._norms = self._clip = None
        for p in self._params():
            p.grad = None

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
        loss_scale.unwatch(self)
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

    One backward for each step: gradients cannot be accumulated over several, and `clip_grad_norm_` finds none; the
    handle's `backward` clips. After a backward that failed, the handle's `reset()` lets the next one start clean.
    `fully_shard` works, `DistributedDataParallel`, which averages gradients later, does not.

    Nor can a loss be scaled by a `GradScaler`, which divides the gradients after the backward, or skips the step: by
    then they have been used. It is refused in `scaler.scale(loss)`, before anything is updated; a scaler that is not
    seen there, of a class with a `scale` of its own, is refused in `scaler.step`, when the parameters have been
    updated. bfloat16 needs no scaling.

    Args:
        model: whose parameters; the whole of what is trained, so that its forward can tell who has wrapped it.
        optimizer: one of `torch_bp.optim`'s, or a `RuleOptimizer`.

    Returns:
        A handle: `remove()` restores everything, `backward` clips, and `reset()` drops what a backward that failed has
        left. It is a context manager as well.

    Raises:
        TypeError: an optimizer without a rule, or with a `step` of its own, such as LBFGS.
        ValueError: nothing to update, `differentiable`, a model that DistributedDataParallel wraps.
        RuntimeError: a second call for the same optimizer; later, in the backward, a second gradient before `step()`,
            and a GradScaler, in its `scale`.

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
    members = [Member(optimizer, p, names[p]) for p in params if p in names and p.requires_grad]
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
