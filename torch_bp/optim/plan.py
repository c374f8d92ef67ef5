"""What the list kernels need of an optimizer's groups, collected once and kept from step to step."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from torch_bp.kernels import engine, plain
from torch_bp.optim import shards
from torch_bp.optim.bucket import Bucket, Gradients
from torch_bp.optim.state import Layout, counted, forget, initial_state, on_device

_NOTHING = type(None)
FLAGS = ("capturable", "differentiable", "fused")


def eligible(p: Tensor, grad: Tensor | None, state: Mapping[str, Any], layout: Layout) -> bool:
    """True if a list kernel may update `p` from `grad`, as far as the two of them tell, and where its state lies."""
    if grad is not None and shards.is_distributed(p):
        if not shards.alike(p, [grad, *(t for name, t in state.items() if name in layout and t is not None)]):
            return False
        p, grad = shards.local(p), shards.local(grad)
    return (
        grad is not None
        and plain.PLAIN_TYPES.issuperset((type(p), type(grad)))
        and p.layout is grad.layout is torch.strided
        and p.dtype is grad.dtype
        and p.device == grad.device
        and p.shape == grad.shape
        and p.stride() == grad.stride()
        and not (p.is_neg() or grad.is_neg())
        and plain.dense(p)
        and engine.serving(p) is not None
    )


def in_turn(optimizer: Any, params: Sequence[Tensor], positions: Iterable[int]) -> set[int]:
    """Positions whose updates follow on each other: of a parameter that is listed again, of counts that are shared."""
    found: dict[Any, list[int]] = {}
    for i in positions:
        found.setdefault(id(params[i]), []).append(i)
        state = optimizer.state.get(params[i], {})
        for count in map(state.get, counted(optimizer)):
            if isinstance(count, Tensor):
                place = count.data_ptr() if type(count) in plain.PLAIN_TYPES else id(count)
                found.setdefault(("count", place), []).append(i)
    return {i for sharing in found.values() if len(sharing) > 1 for i in sharing}


class Share:
    """What a plan knows of one group: its buckets, and which parameters are no matter of a kernel."""

    def __init__(self, optimizer: Any, group: dict[str, Any], gradients: Gradients) -> None:
        self.params = list(group["params"])
        self.present = [i for i, g in enumerate(gradients) if g is not None]
        self.whole = len(self.present) == len(self.params)
        self.layout = tuple(optimizer.state_layout(group))
        self.flags = tuple(map(group.get, FLAGS))
        for i in self.present:
            if gradients[i].layout is not torch.strided:  # type: ignore[union-attr]
                optimizer.sparse(group)  # may refuse, before anything is changed
        listed = not on_device(group)
        self.in_turn = in_turn(optimizer, self.params, self.present)
        self.others = [i for i in self.present if not (listed and self._eligible(optimizer, i, gradients))]
        buckets: dict[Any, Bucket] = {}
        try:
            for i in sorted({*self.present}.difference(self.others)):
                p = self.params[i]
                state, created = initial_state(optimizer, p, group, self.layout)
                counts = {name: state[name].item() for name in counted(optimizer)}
                distributed = shards.is_distributed(p)
                key = (p.device, p.dtype, *counts.values(), bool(created), distributed)
                bucket = buckets.setdefault(key, Bucket(self.layout, counts, bool(created), distributed))
                bucket.add(i, p, state)
                bucket.created.append((state, created))
        except BaseException:
            forget(chain.from_iterable(bucket.created for bucket in buckets.values()))
            raise
        self.buckets = list(buckets.values())
        for bucket in self.buckets:
            bucket.collect()

    def _eligible(self, optimizer: Any, i: int, gradients: Gradients) -> bool:
        p = self.params[i]
        return i not in self.in_turn and eligible(p, gradients[i], optimizer.state.get(p, {}), self.layout)

    def fits(self, optimizer: Any, group: dict[str, Any], gradients: Gradients) -> bool:
        """True if this share, made at an earlier step, still tells the truth."""
        params = group["params"]
        if len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        if self.whole:
            if _NOTHING in map(type, gradients):
                return False
        elif self.present != [i for i, g in enumerate(gradients) if g is not None]:
            return False
        flags = tuple(map(group.get, FLAGS))
        if tuple(optimizer.state_layout(group)) != self.layout or flags != self.flags:
            return False
        if self.others and not on_device(group) and any(self._eligible(optimizer, i, gradients) for i in self.others):
            return False
        return all(map(Bucket.holds, self.buckets))

    def run(self, optimizer: Any, group: Mapping[str, Any], gradients: Gradients) -> Gradients:
        """Update every bucket that a kernel may serve; return the gradients that are still to be applied."""
        left = self.others
        try:
            for bucket in self.buckets:
                if not bucket.update(optimizer, group, gradients):
                    left = left + bucket.positions
        finally:  # what an update that did not happen was given
            forget(chain.from_iterable(bucket.created for bucket in self.buckets))
        if not left:
            return ()
        return [g if i in {*left} else None for i, g in enumerate(gradients)]


class Plan:
    """What the list kernels need of an optimizer, kept from step to step, group by group."""

    def __init__(self) -> None:
        self.shares: dict[int, Share] = {}
        self.again: dict[int, Any] = {}  # what repeats a step (`torch_bp.optim.again`)
        self.lock = threading.Lock()  # the tables hold one thread's gradients at a time
        self._container: Any = None
        self._states: list[dict[str, Any]] = []

    def look(self, optimizer: Any) -> None:
        """Drop what was collected if the states are not the same objects."""
        states = optimizer.state
        if (
            states is not self._container
            or len(states) != len(self._states)
            or not all(map(operator.is_, states.values(), self._states))
        ):
            self.forget()

    def forget(self) -> None:
        """Look at everything anew at the next step."""
        self.shares, self.again = {}, {}

    def update(self, optimizer: Any, index: int, group: dict[str, Any], gradients: Gradients) -> Gradients:
        """Update a group by list kernels; return the gradients that are still to be applied."""
        share = self.shares.pop(index, None)
        if share is None or not share.fits(optimizer, group, gradients):
            share = Share(optimizer, group, gradients)
            self._container = None  # until the step has gone well
        left = share.run(optimizer, group, gradients)
        if sum(g is not None for g in left) == len(share.others):  # else some tensor is not what it was: look anew
            self.shares[index] = share
        return left

    def remember(self, optimizer: Any) -> None:
        """Note the states that belong to what was collected."""
        if self._container is None:
            self._container, self._states = optimizer.state, list(optimizer.state.values())
