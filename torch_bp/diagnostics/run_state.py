"""The state of a training run: what there is to keep, and memory to keep it in that is used again and again."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class RunState:
    """All that a run goes on from: what is read into a `Snapshot` and written back from it.

    Args:
        model: its parameters and buffers, what is tied once; and the extra state of its modules.
        optimizers: their state and groups, and parameters of theirs that are not the model's.
        objects: anything with `state_dict` and `load_state_dict`, such as schedules, a GradScaler, or a loader that
            knows its position, and `torch.Generator`s.

    Random numbers are those of Python, NumPy if it is imported, and torch on the CPU and every CUDA device in use.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], objects: Iterable[Any] = ()) -> None:
        self.model, self.optimizers, self.objects = model, list(optimizers), list(objects)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        found = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        known = set(map(id, found.values()))
        for number, optimizer in enumerate(self.optimizers):
            for index, group in enumerate(optimizer.param_groups):
                for place, p in enumerate(group["params"]):
                    if id(p) not in known:
                        known.add(id(p))
                        found[f"optimizer {number}, group {index}, parameter {place}"] = p
        return found

    def extra_states(self) -> dict[str, Any]:
        """What modules keep beside tensors, in `get_extra_state`, by name."""
        modules = self.model.named_modules()
        return {n: m.get_extra_state() for n, m in modules if type(m).get_extra_state is not nn.Module.get_extra_state}

    def no_buffers(self) -> list[str]:
        """Names of buffers that are None."""
        modules = self.model.named_modules()
        return [f"{n}.{own}" if n else own for n, m in modules for own, b in m._buffers.items() if b is None]

    def put_back(self, name: str, buffer: Tensor | None) -> None:
        """Give a module another buffer, where the one that it has is none, or of another shape or dtype."""
        parent, _, own = name.rpartition(".")
        buffers = self.model.get_submodule(parent)._buffers
        if own in buffers:
            buffers[own] = buffer

    def structure(self) -> dict[str, Any]:
        """What must be the same objects when a snapshot is written back: parameters, and the optimizers' lists."""
        made: dict[str, Any] = {n: t for n, t in self.tensors().items() if isinstance(t, nn.Parameter)}
        for number, optimizer in enumerate(self.optimizers):
            for index, group in enumerate(optimizer.param_groups):
                for place, p in enumerate(group["params"]):
                    made[f"group {index}[{place}] of optimizer {number}"] = p
        return made


class Snapshot:
    """A copy of the state of a run, in memory that the next copy uses again.

    Args:
        storage: "device": beside what is copied; "cpu": on the host, pinned where that makes copies faster.
    """

    def __init__(self, storage: str = "device") -> None:
        self._storage = storage
        self._buffers: dict[Any, Tensor] = {}
        self._devices: dict[int, torch.device] = {}  # where what is in a buffer belongs
        self._used: set[Any] = set()
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._structure: dict[str, Any] = {}
        self._tree: dict[str, Any] = {}

    @torch.no_grad()
    def take(self, state: RunState) -> None:
        """Copy the state as it is now. On a CUDA device nothing is waited for."""
        self._used, self._pairs = set(), ([], [])
        self._structure = state.structure()
        self._tree = {
            "tensors": self._keep(("tensor",), state.tensors()),
            "none": state.no_buffers(),
            "extra": self._keep(("extra",), state.extra_states()),
            "optimizers": [self._optimizer(number, each) for number, each in enumerate(state.optimizers)],
            "objects": [self._keep(("object", n), _state_of(each)) for n, each in enumerate(state.objects)],
            "random": _random_numbers(),
        }
        for key in self._buffers.keys() - self._used:
            del self._devices[id(self._buffers.pop(key))]
        kept, now = self._pairs
        self._pairs = ([], [])
        if kept:
            torch._foreach_copy_(kept, now, non_blocking=self._storage == "cpu")

    @torch.no_grad()
    def restore(self, state: RunState) -> None:
        """Write it back, in place. Gradients are dropped.

        Raises:
            RuntimeError: parameters of the model, or what the optimizers hold, are not the same objects any more.
        """
        self.check(state)
        if self._storage == "cpu" and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies to the host may be on their way
        now = state.tensors()  # a buffer that has come since is nothing to go back to
        for name, kept in self._tree["tensors"].items():
            tensor = _once(now[name]) if name in now else None
            alike = tensor is not None and (tensor.shape, tensor.dtype) == (kept.shape, kept.dtype)
            if tensor is not None and (alike or name in self._structure):
                tensor.copy_(kept)
            else:  # a buffer that grows
                state.put_back(name, kept.to(self._devices[id(kept)], copy=True))
        for name in self._tree["none"]:
            state.put_back(name, None)
        for name, extra in self._tree["extra"].items():
            state.model.get_submodule(name).set_extra_state(_copied(extra))
        for optimizer, kept in zip(state.optimizers, self._tree["optimizers"]):
            _restore_optimizer(optimizer, kept, self._devices)
        for each, kept in zip(state.objects, self._tree["objects"]):
            if isinstance(each, torch.Generator):
                each.set_state(kept.cpu().clone())
            else:
                each.load_state_dict(_copied(kept))
        _set_random_numbers(self._tree["random"])
        for tensor in state.tensors().values():
            if tensor.is_leaf:
                tensor.grad = None

    def check(self, state: RunState) -> None:
        """RuntimeError unless the parameters are the same objects as in this snapshot, under the same names."""
        before, now = self._structure, state.structure()
        names = [name for name in {**before, **now} if before.get(name) is not now.get(name)]
        if names:
            raise RuntimeError(
                f"DivergenceGuard: parameters must be the same objects as at the last snapshot, got {len(names)} that "
                f"were added, removed or replaced, such as {names[0]}; call guard.reset() after such a change."
            )

    def bytes(self) -> dict[str, int]:
        """Memory of the copies, by device."""
        sizes: dict[str, int] = {}
        for buffer in self._buffers.values():
            device = str(buffer.device)
            sizes[device] = sizes.get(device, 0) + buffer.untyped_storage().nbytes()
        return sizes

    def _optimizer(self, number: int, optimizer: Optimizer) -> dict[str, Any]:
        order = {p: place for place, p in enumerate(_parameters(optimizer))}
        state = {p: self._keep((number, order.get(p, id(p))), of_p) for p, of_p in optimizer.state.items()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"state": state, "groups": self._keep((number, "groups"), groups)}

    def _keep(self, key: tuple[Any, ...], value: Any) -> Any:
        """A copy of a value, of dicts, lists and tuples one of each part."""
        if isinstance(value, dict):
            return {name: self._keep((*key, name), each) for name, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._keep((*key, place), each) for place, each in enumerate(value))
        return self._tensor(key, value) if isinstance(value, Tensor) else copy.deepcopy(value)

    def _tensor(self, key: tuple[Any, ...], tensor: Tensor) -> Tensor:
        tensor = _once(tensor)
        self._used.add(key)
        buffer = self._buffers.get(key)
        if buffer is not None and _alike(buffer, tensor) and tensor.layout is torch.strided:
            self._pairs[0].append(buffer)
            self._pairs[1].append(tensor)
            return buffer
        if self._storage == "cpu" and tensor.is_cuda and tensor.layout is torch.strided:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._pairs[0].append(buffer)
            self._pairs[1].append(tensor)
        else:
            buffer = tensor.clone(memory_format=torch.preserve_format)
            buffer = buffer.cpu() if self._storage == "cpu" else buffer
        if key in self._buffers:
            del self._devices[id(self._buffers[key])]
        self._buffers[key] = buffer
        self._devices[id(buffer)] = tensor.device
        return buffer


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and a.stride() == b.stride()


def _once(tensor: Tensor) -> Tensor:
    """The tensor without the repetitions of an expanded one, into which torch does not write."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or 0 not in tensor.stride():
        return tensor
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _copied(value: Any) -> Any:
    """What an object may keep, apart from the snapshot."""
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _state_of(each: Any) -> Any:
    return each.get_state() if isinstance(each, torch.Generator) else each.state_dict()


def _restore_optimizer(optimizer: Optimizer, kept: dict[str, Any], devices: dict[int, torch.device]) -> None:
    for p in [p for p in optimizer.state if p not in kept["state"]]:
        del optimizer.state[p]
    for p, of_p in kept["state"].items():
        optimizer.state[p] = _back(optimizer.state.get(p), of_p, devices)
    for group, values in zip(optimizer.param_groups, kept["groups"]):
        for name in [name for name in group if name != "params" and name not in values]:
            del group[name]
        for name, value in values.items():
            group[name] = _back(group.get(name), value, devices)


def _back(now: Any, kept: Any, devices: dict[int, torch.device]) -> Any:
    """The kept value: in a dict that is there, and in the memory of its tensors, as far as they fit."""
    if isinstance(kept, dict):
        now = now if isinstance(now, dict) else {}
        for name in [name for name in now if name not in kept]:
            del now[name]
        for name, value in kept.items():
            now[name] = _back(now.get(name), value, devices)
        return now
    if type(kept) in (list, tuple):  # whose elements move, as in LBFGS: none is written over
        return type(kept)(_back(None, each, devices) for each in kept)
    if isinstance(kept, Tensor):
        if isinstance(now, Tensor) and _alike(now, kept) and kept.layout is torch.strided:
            return now.copy_(kept)
        return kept.to(devices[id(kept)], copy=True)
    return copy.deepcopy(kept)


def _random_numbers() -> dict[str, Any]:
    numpy: Any = sys.modules.get("numpy")  # if it has not been imported nobody draws from it
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state() if numpy else None,
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _set_random_numbers(kept: dict[str, Any]) -> None:
    random.setstate(kept["python"])
    if kept["numpy"] is not None:
        sys.modules["numpy"].random.set_state(kept["numpy"])  # type: ignore[attr-defined]
    torch.set_rng_state(kept["cpu"])
    if kept["cuda"]:
        torch.cuda.set_rng_state_all(kept["cuda"])
