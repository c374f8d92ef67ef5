"""An optimizer's step inside a graph of CUDA's: list kernels that are launched again and again as they were captured.

A graph freezes what its kernels were given. Addresses of parameters, gradients and state may be frozen; learning rate,
betas and step counts may not. These are numbers in memory of the device, which the host sends ahead of each launch: any
schedule, and anything else that changes a group, works as always, and the host waits for nothing.

Whether the step is taken is also a number on the device: where it is not 0, the kernels leave everything as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from torch_bp.kernels import Table
from torch_bp.kernels.program import presence
from torch_bp.optim.bucket import Bucket, but_step
from torch_bp.optim.copies import copies_of
from torch_bp.optim.plan import Share
from torch_bp.optim.state import forget
from torch_bp.optim.step import lists_may_serve, step

_SLOTS = 32  # of numbers that are on their way


class Numbers:
    """Numbers of the host in memory of the device, sent without waiting.

    Args:
        count: how many.
        device: where they are wanted.

    Attributes:
        there: the numbers (count), float64, on the device.

    Example:
        >>> numbers = Numbers(2, torch.device("cpu"))
        >>> numbers.send([0.5, torch.tensor(2.0)])
        >>> numbers.there
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.there = torch.zeros(count, dtype=torch.float64, device=device)
        self._slots = [torch.zeros(count, dtype=torch.float64, pin_memory=self._cuda) for _ in range(_SLOTS)]
        self._sent: list[Any] = [None] * _SLOTS
        self._next = 0

    def send(self, values: Sequence[Any]) -> None:
        """Let the device have these values from here on, in the order of its work."""
        number, self._next = self._next, (self._next + 1) % _SLOTS
        if self._sent[number] is not None:
            self._sent[number].synchronize()  # 32 steps ago: as a rule it has long been there
        tensors = [(k, value) for k, value in enumerate(values) if isinstance(value, Tensor)]
        slot = self._slots[number]
        slot.numpy()[:] = np.array([0.0 if isinstance(value, Tensor) else value for value in values], np.float64)
        self.there.copy_(slot, non_blocking=True)
        if self._cuda:
            self._sent[number] = self._sent[number] or torch.cuda.Event()
            self._sent[number].record(torch.cuda.current_stream(self.there.device))
        for k, value in tensors:  # a rate that is a tensor, where it is
            self.there[k].copy_(value.reshape(()), non_blocking=True)


class _Part:
    """What one launch updates: parameters of a group, one dtype and step count."""

    def __init__(self, optimizer: Any, group: dict[str, Any], bucket: Bucket) -> None:
        self.group, self.bucket, self.table = group, bucket, Table()
        self.after: dict[str, float] = {}
        self._optimizer = optimizer
        scalars = self._scalars()
        rule = optimizer.rule.formula
        self._static = {name: scalars.get(name) for name in rule.static}
        self._rows = [None if name is None else bucket.state[name] for name in bucket.layout]
        self._gradients = [p.grad for p in bucket.params]
        present = [row for row in self._lists() if row is not None]
        self.program: Any = rule.prepare(bucket.params[0], presence(self._lists()), scalars)
        self.serves = (
            self.program is not None
            and not self.program.numba
            and not self.program.totals
            and self.table.refresh(present, self.program.writes, self.program.chunk)
            and self.table.elements > 0
        )
        copies = copies_of(optimizer)
        self._generation = 0 if copies is None else copies.generation
        if copies is not None:
            copies.tell(self.table, bucket.params)
        self.values: Sequence[Any] = self.program.expression.host(**scalars) if self.serves else ()

    def _lists(self) -> list[Any]:
        return [self.bucket.params, self._gradients, *self._rows]

    def _scalars(self) -> dict[str, Any]:
        self.after = self.bucket.advanced(self._optimizer, self.group)
        return self._optimizer.scalars(self.group, self.after.get("step", 0), False, **but_step(self.after))

    def ready(self) -> bool:
        """Compute the numbers of the next step; False where the kernel would have to be another, or elsewhere."""
        copies = copies_of(self._optimizer)
        if copies is not None and copies.generation != self._generation:
            return False
        scalars = self._scalars()
        if any(scalars.get(name) != value for name, value in self._static.items()):
            return False
        self._gradients = [p.grad for p in self.bucket.params]
        built = self.table.built
        present = [row for row in self._lists() if row is not None]
        if not self.table.refresh(present, self.program.writes, self.program.chunk) or self.table.built != built:
            return False
        self.values = self.program.expression.host(**scalars)
        return True


class CapturedStep:
    """The update of all parameters that have a gradient; `of` makes it.

    Attributes:
        device: of all parameters.
    """

    def __init__(self, optimizer: Any, shares: list[tuple[dict[str, Any], Share]], parts: list[_Part]) -> None:
        self._optimizer, self._shares, self._parts = optimizer, shares, parts
        self.device = parts[0].bucket.params[0].device
        self._numbers = Numbers(max(1, sum(len(part.values) for part in parts)), self.device)
        self._never = torch.ones((), dtype=torch.int32, device=self.device)

    @classmethod
    def of(cls, optimizer: Any) -> CapturedStep | None:
        """Return the update from the gradients that are in `p.grad`; None where it is not list kernels alone.

        That is so for optimizers of other packages, for NAdam, on the first step, whose state is yet to be made, for
        sparse and complex gradients, with `capturable` or `fused`, and with hooks on the step.
        """
        rule = getattr(getattr(optimizer, "rule", None), "formula", None)
        # numbers besides the step count could not be taken back
        if (
            rule is None
            or rule.outer
            or getattr(optimizer, "numbers", ())
            or _special(optimizer)
            or not lists_may_serve()
        ):
            return None
        shares, parts = [], []
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"]]
            if all(g is None for g in gradients):
                continue
            share = Share(optimizer, group, gradients)
            if share.others or any(bucket.fresh or bucket.distributed for bucket in share.buckets):
                for bucket in share.buckets:
                    forget(bucket.created)
                return None
            shares.append((group, share))
            parts += [_Part(optimizer, group, bucket) for bucket in share.buckets]
        if not parts or not all(part.serves for part in parts):
            return None
        if len({part.bucket.params[0].device for part in parts}) > 1:
            return None
        return cls(optimizer, shares, parts)

    def ready(self) -> bool:
        """Compute the numbers of the next step; False, and nothing is sent, where it is no longer the same update."""
        if _special(self._optimizer) or not lists_may_serve():
            return False
        groups = [group for group in self._optimizer.param_groups if any(p.grad is not None for p in group["params"])]
        if len(groups) != len(self._shares):
            return False
        for group, (known, share) in zip(groups, self._shares):
            for bucket in share.buckets:
                bucket.catch_up()
            if group is not known or not share.fits(self._optimizer, group, [p.grad for p in group["params"]]):
                return False
        return all(part.ready() for part in self._parts)

    def send(self) -> None:
        """Send the numbers of the next step, and where tensors are, to the device."""
        for part in self._parts:
            part.table.on_device(self.device)
        self._numbers.send([value for part in self._parts for value in part.values])

    def launch(self, skip: Tensor) -> None:
        """Launch the kernels; where `skip`, an int32 on the device, is not 0 when they run, they change nothing."""
        first = 0
        for part in self._parts:
            last = first + len(part.values)
            numbers: Any = self._numbers.there[first:last] if part.values else ()
            copied = part.program.copied(part.table)
            part.program.list.run_list(part.table, self.device, numbers, skip, copied)
            first = last

    def prepare(self) -> None:
        """Compile what `launch` will need, and copy addresses to the device, without changing anything."""
        self.launch(self._never)

    def ran(self) -> None:
        """Note on the host that the device has been told to do a step."""
        for part in self._parts:
            torch._C._increment_version(part.table.written)
            if part.table.copies is not None:
                copies_of(self._optimizer).written(part.bucket.params)  # type: ignore[union-attr]
            for name, value in part.after.items():
                part.bucket.counters[name].set(part.bucket.state[name], value)
        if "step" in vars(self._optimizer):  # by which schedules see that the step comes before them
            self._optimizer._opt_called = True

    def take_back(self, count: int) -> None:
        """Lower the step counts by steps that the device has not taken."""
        for part in self._parts:
            counter = part.bucket.counters.get("step")
            if counter is not None:
                counter.set(part.bucket.state["step"], counter.value - count)


def fresh(optimizer: Any) -> bool:
    """True if the optimizer is yet to make the state of a parameter that has a gradient."""
    if not hasattr(getattr(optimizer, "rule", None), "formula"):
        return False
    for group in optimizer.param_groups:
        wanted = optimizer.counts_steps or any(optimizer.state_layout(group))
        if wanted and any(p.grad is not None and not optimizer.state.get(p) for p in group["params"]):
            return True
    return False


def _special(optimizer: Any) -> bool:
    """True where a step is more than the kernels."""
    own = vars(optimizer)
    replaced = "step" in own and not getattr(own["step"], "_wrapped_by_lr_sched", False)
    return bool(
        replaced
        or type(optimizer).step is not step
        or "_applied_in_backward" in own
        or "_extras" in own
        or own.get("found_inf") is not None
        or own.get("grad_scale") is not None
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
