"""One explicit pass: a model's own forward, run so that every operation lands on a tape.

The model is called as it is, whatever its `forward` does in Python. A mode sees the calls of torch's functions and
sends each where its derivative is: to ours of the same name (`torch.relu`, `torch.nn.functional.linear`, and with them
torch's own modules), or, for arithmetic and for what only moves elements, through a small graph of autograd's. What it
does not know is refused by name, or with `fallback="autograd"` taken onto the tape the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

import torch_bp.nn.functional
from torch_bp.autograd.small_graph import through_autograd, writes
from torch_bp.autograd.tape import Tape
from torch_bp.kernels.capture import capturing
from torch_bp.step.recorder import NotCapturableError

_ARITHMETIC = """
    add sub mul div neg radd rsub rmul rdiv rtruediv truediv subtract multiply divide true_divide negative iadd isub
    imul itruediv add_ sub_ mul_ div_ pow square sqrt abs exp log sum mean matmul rmatmul mm bmm addmm einsum
"""
_MOVING = """
    view reshape flatten unflatten permute transpose t T mT movedim swapaxes squeeze unsqueeze expand expand_as
    broadcast_to broadcast_tensors contiguous clone to type type_as float double half bfloat16 view_as reshape_as
    cat concat concatenate stack hstack vstack chunk split unbind select narrow getitem index_select take gather
    flip roll repeat tile pad where copy_ setitem cumsum
"""
_ASKING = """
    int long bool argmax get is_inference requires_grad_
    size dim ndimension numel nelement element_size stride len is_floating_point is_complex is_contiguous detach
    empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full new_tensor
    eq ne lt le gt ge isnan isinf isfinite argmax argmin argsort sign
"""
# Functions and methods by name: sums and products, what moves elements, and what no gradient goes through.
_KNOWN = frozenset(f"{_ARITHMETIC} {_MOVING} {_ASKING}".split())
_READING = frozenset(f"__{name}__" for name in ("bool", "float", "int", "index", "complex", "array", "contains"))
_READING |= {"item", "tolist", "numpy", "__dlpack__"}
_MAYBE_READING = {"tensor", "as_tensor", "asarray", "tensor_split"}  # of tensors in lists, by indices that are one
_transforms_active = torch._C._are_functorch_transforms_active
_METHODS = {  # of tensors, and functions of torch's namespace, by the name that ours has
    name: getattr(torch_bp.nn.functional, name)
    for name in ("relu", "sigmoid", "tanh", "softmax", "log_softmax", "dropout")
}


def _counterparts() -> dict[Any, Callable[..., Any]]:
    """Map torch's functions to ours of the same name."""
    found: dict[Any, Callable[..., Any]] = {}
    for name, ours in vars(torch_bp.nn.functional).items():
        theirs = getattr(F, name, None)
        if callable(theirs) and callable(ours) and theirs is not ours and not name.startswith("_"):
            found[theirs] = ours
    for name, ours in _METHODS.items():
        for place in (torch, Tensor):
            if hasattr(place, name):
                found[getattr(place, name)] = ours
    return found


COUNTERPARTS = _counterparts()


class UnknownBackwardError(RuntimeError):
    """A step that has no explicit backward."""


class Explicit(TorchFunctionMode):
    """Sends torch's functions to where their derivative is, while a tape is open.

    Args:
        tape: takes down what runs.
        fallback: let autograd do what has no explicit backward.
        path: names the module that runs.
        writing: called with each tensor that a function is about to write to. None: nobody asks.
    """

    def __init__(
        self, tape: Tape, fallback: bool, path: Callable[[], str], writing: Callable[[Tensor], None] | None = None
    ) -> None:
        super().__init__()
        self.tape, self.fallback, self.path, self.writing = tape, fallback, path, writing

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.writing is not None:
            for target in _tensors((args[:1] if writes(func) else (), kwargs.get("out"))):
                self.writing(target)
        ours = COUNTERPARTS.get(func)
        if ours is not None:
            with self:
                return ours(*args, **kwargs)
        if _transforms_active():
            raise UnknownBackwardError(
                f"TrainStep: {self._where()}uses a transform of torch.func, inside of which the step cannot follow "
                "tensors; use loss.backward()."
            )
        name = func.__name__
        if name in _READING or (name in _MAYBE_READING and len(_tensors((args, kwargs))) > (name == "tensor_split")):
            if capturing():
                raise NotCapturableError(f"{self._where()}reads the values of a tensor ({name})")
            return func(*args, **kwargs)
        if name.startswith("__"):
            name = name.strip("_")
        if not torch.is_grad_enabled() or not any(map(self.tape.tracks, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if self.fallback or name in _KNOWN:
            return through_autograd(self.tape, func, args, kwargs)
        raise UnknownBackwardError(
            f"TrainStep: {self._where()}calls {resolve_name(func) or name}, whose backward torch_bp has not written; "
            'use fallback="autograd", which lets autograd do that part, or loss.backward().'
        )

    def _where(self) -> str:
        path = self.path()
        return f"module {path!r} " if path else "the model "


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Paths:
    """Tells which module of a model is running, from the frames of its forward."""

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self.names = {
            id(module): ".".join(filter(None, (prefix, name)))
            for prefix, root in roots.items()
            if isinstance(root, torch.nn.Module)
            for name, module in root.named_modules()
        }

        self.owners = {
            id(p): self.names[id(module)]
            for root in roots.values()
            if isinstance(root, torch.nn.Module)
            for module in root.modules()
            for p in module.parameters(recurse=False)
        }

    def of(self, tensors: Sequence[Any]) -> str:
        """Return the name of the module that is running, or, where a container runs its parts, that has the tensors."""
        return self() or next((self.owners[id(t)] for t in tensors if id(t) in self.owners), "")

    def __call__(self) -> str:
        frame: Any = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.nn.Module) and id(owner) in self.names:
                return self.names[id(owner)]
            frame = frame.f_back
        return ""
