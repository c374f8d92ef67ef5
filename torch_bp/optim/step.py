"""The `step` of every optimizer: which way an update runs.

- *The list kernels.* Parameters of one group, device, dtype and step count are one call over a table of addresses.
  What was collected (`Plan`) is kept while it still holds, which one compiled look at all tensors tells; step counts
  are read once and then known. Of DTensors that are cut alike, the parts on this rank.
- *One by one*, through the same formula: sparse and complex gradients, other tensor subclasses, `differentiable`,
  `capturable`, `torch.compile`, parameters that are listed twice, and whatever else a kernel may not serve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from torch_bp.kernels.plain import unwatched
from torch_bp.kernels.program import write
from torch_bp.optim.again import Again
from torch_bp.optim.bucket import Gradients
from torch_bp.optim.plan import Plan
from torch_bp.optim.rule import UNKNOWN, explain
from torch_bp.optim.state import counted, forget, initial_state, on_device

_set_recording = torch._C._set_grad_enabled
_profiling = torch.autograd._profiler_enabled
_is_compiling = torch.compiler.is_dynamo_compiling
_range = torch._C._profiler._RecordFunctionFast
# torch's check that a captured graph holds a capturable optimizer; renamed after torch 2.11
_check_capture = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or Optimizer._cuda_graph_capture_health_check
)


def _observed(self: Any) -> bool:
    """True where torch's own wrapper of `step` has something to do: hooks, a profiler, a compiler that reads along."""
    return bool(
        self._optimizer_step_pre_hooks
        or self._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or _profiling()
        or _is_compiling()
    )


def _step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
    """Update the parameters from their gradients.

    Args:
        closure: evaluates the model anew, computes gradients and returns the loss.

    Returns:
        What the closure returned, or None.
    """
    if "capturable" in self.defaults:
        _check_capture(self)
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    recording = torch.is_grad_enabled()
    _set_recording(self.defaults.get("differentiable", False))
    try:
        if not _overflowed(self):
            _update(self, getattr(self, "grad_scale", None))
    finally:
        _set_recording(recording)
    return loss


_observed_step = Optimizer.profile_hook_step(_step)  # in torch's wrapper, which runs hooks and tells the profiler


def _entered(self: Any, *args: Any, **keywords: Any) -> Any:
    if getattr(type(self).step, "__code__", None) is _observed_step.__code__:
        return _step(self, *args, **keywords)  # called by a subclass's own step, which torch has wrapped
    if args or keywords or _observed(self):
        return _observed_step(self, *args, **keywords)
    # What torch puts around a step for the profiler costs more than half of a small step, with nobody profiling.
    with _range(f"Optimizer.step#{type(self).__name__}.step"):
        return _step(self)


step: Any = functools.wraps(_step)(_entered)
step.__name__ = step.__qualname__ = "step"
step.hooked = True  # torch wraps a `step` in its hooks that does not say so


def _overflowed(optimizer: Any) -> bool:
    """True if a GradScaler that leaves unscaling to us found Inf or NaN: the step is skipped."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def _update(self: Any, scale: Tensor | None) -> None:
    """Update group by group: by list kernels where they may serve, and what is left one by one."""
    plan = None
    if scale is None and lists_may_serve():
        plan = self.__dict__.get("_plan")
        if plan is None:
            plan = self._plan = Plan()
        if not plan.lock.acquire(blocking=False):  # another thread is at it
            plan = None
    try:
        if plan is not None:
            plan.look(self)
        for index, group in enumerate(self.param_groups):
            if plan is None or not repeated(self, plan, index, group):
                update_group(self, plan, index, group, scale)
        if plan is not None:
            plan.remember(self)
    finally:
        if plan is not None:
            plan.lock.release()


def repeated(self: Any, plan: Plan, index: int, group: Any) -> bool:
    """Update one group as in the last step, if nothing but numbers and gradients is new."""
    again = plan.again.get(index)
    if again is not None and "_extras" not in self.__dict__:
        if again.step(self, group):
            return True
        del plan.again[index]
    return False


def update_group(self: Any, plan: Plan | None, index: int, group: Any, scale: Tensor | None = None) -> None:
    """Update the parameters of one group; `plan` is None where no list kernel may serve."""
    gradients: Gradients = [p.grad for p in group["params"]]
    if plan is not None:
        gradients = plan.update(self, index, group, gradients)
        share = plan.shares.get(index)
        again = None if share is None else Again.of(self, group, share)
        if again is not None:
            plan.again[index] = again
    if gradients:
        _one_by_one(self, group, gradients, scale)


def lists_may_serve() -> bool:
    """True unless every operation must go through torch."""
    return not _watched() and not torch.is_inference_mode_enabled()


def _watched() -> bool:
    """True if every operation must go through torch, and no step count be read on the host."""
    return _is_compiling() or not unwatched()


def _one_by_one(self: Any, group: dict[str, Any], gradients: Gradients, scale: Tensor | None) -> None:
    """Update parameter by parameter: the way for everything that is not plain memory."""
    layout, extras = self.state_layout(group), getattr(self, "_extras", None)
    work = []
    for p, grad in zip(group["params"], gradients):
        if grad is not None:
            how = self.sparse(group) if grad.layout is not torch.strided else "as it is"
            work.append((p, grad, how))
    begun: dict[Tensor, tuple[dict[str, Any], list[str]]] = {}
    for p, grad, how in work:
        if getattr(self, "begins_each", False) and p in begun:
            forget([begun[p]])
        state, created = initial_state(self, p, group, layout)
        if created:
            begun[p] = state, created
        scalars = UNKNOWN
        try:
            counts = _advanced(self, group, state)
            numbers = {name: value for name, (value, _) in counts.items()}
            scalars = self.scalars(group, numbers.pop("step", 0), bool(created), **numbers)
            states = [None if name is None else state[name] for name in layout]
            if scale is not None:
                grad = grad / scale.to(grad.device)
            before = None
            if extras is not None:
                grad, before = extras.prepare(p, grad)
            _apply(self.rule, p, grad, states, scalars, how)
        except BaseException as error:
            forget([(state, created)])
            explain(self, scalars, error)
            raise
        for name, (_, after) in counts.items():
            write(state[name], after)
        if extras is not None:
            extras.finish(p, before)


def power(base: Any, step: Any) -> Any:
    """base^step, of a number that schedules may change.

    torch.compile writes the number of `pow(number, tensor)` into the graph. It then compiles anew for each one, at most
    eight times, and its cache of compiled graphs has been seen to give out one that was made for another number. As a
    tensor the number is an input of the graph.
    """
    if isinstance(step, Tensor) and not isinstance(base, Tensor) and _is_compiling():
        base = torch.zeros_like(step) + base
    return base**step


def _advanced(self: Any, group: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What the counts of a parameter are after one more update: for its rule, and as they are kept."""
    if not self.counts_steps:
        return {}
    watched = _watched()
    kept = watched or on_device(group)  # as tensors, for the rule too
    # of some optimizers torch reads the step count where nothing but `differentiable` asks for tensors
    readable = not watched and getattr(self, "reads_counts", False) and not group.get("capturable")
    after = state["step"] + 1
    step = after if kept and not readable else after.item()
    advanced = {"step": (step, after)}
    for name in counted(self)[1:]:
        after = self.advance(group, step, name, state[name])
        advanced[name] = (after if kept else after.item(), after)
    return advanced


def _apply(
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
        tensors[1] = grad.resolve_conj()  # of conj() in the model, which leaves it pending
        tensors = [None if t is None else torch.view_as_real(t) for t in tensors]
    scalars = {n: v.reshape(()) if isinstance(v, Tensor) else v for n, v in scalars.items()}
    rule(*tensors, **scalars)
