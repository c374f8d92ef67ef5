"""What is checked: a function of named tensors, all of them copies, and its outputs.

A module is called with copies of its parameters and buffers in the place of its own. Real numbers are all that the
check sees: a complex tensor counts as the pair of its parts (`flat`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._pytree import tree_leaves

Tensors = dict[str, Tensor]
_PRECISE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


class Subject:
    """A function with copies of its tensors by name.

    Attributes:
        tensors: the copies; those of `checked` are leaves that require grad.
        originals: what must remain of them.
        checked: names of those that are checked.
    """

    def __init__(self, func: Callable[..., Any], inputs: Any, precise: bool = False) -> None:
        if isinstance(func, type) and issubclass(func, torch.autograd.Function):
            func = func.apply
        self.func = func
        self.module = func if isinstance(func, torch.nn.Module) else None
        self.inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        found = {f"input {i}": t for i, t in enumerate(self.inputs) if isinstance(t, Tensor)}
        self.state: Tensors = {}
        if self.module is not None:
            found |= {f"parameter {name}": t for name, t in self.module.named_parameters()}
            self.state = {name: widened(t.detach(), precise) for name, t in self.module.named_buffers()}
        self.checked = [name for name, t in found.items() if t.requires_grad]
        # what is integer, or not differentiated, keeps its identity as far as it can: masks, indices, sparse constants
        self.originals = {name: widened(t, precise) for name, t in found.items()}
        self.promoted = precise and any(self.originals[n].dtype is not found[n].dtype for n in found)
        self.tensors = {n: copied(t).requires_grad_(found[n].requires_grad) for n, t in self.originals.items()}
        self._unseen()

    def _unseen(self) -> None:
        self.seen: set[str] = set()
        self.versions: dict[str, int] = {}

    @property
    def devices(self) -> set[torch.device]:
        """The CUDA devices whose random numbers the function may draw."""
        return {t.device for t in self.tensors.values() if t.is_cuda}

    def outputs(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the function; return the outputs that require grad, or every real or complex one if none does."""
        arguments = tuple(tensors.get(f"input {i}", value) for i, value in enumerate(self.inputs))
        if self.module is None:
            result = self.func(*arguments)
        else:
            state = {name: buffer.clone() for name, buffer in self.state.items()}
            state |= {k.removeprefix("parameter "): t for k, t in tensors.items() if k.startswith("parameter ")}
            result = torch.func.functional_call(self.module, state, arguments)
        return differentiable(result)

    def require_unaltered(self, culprit: str, thorough: bool = False) -> None:
        """Raise if one of the copies is no longer what it was.

        Numbers are compared once for each culprit, if `thorough`, and where the version of a tensor says that somebody
        wrote to it; between, those who write to `.data` are found by the last look.
        """
        thorough = thorough or culprit not in self.seen
        self.seen.add(culprit)
        for name, t in self.originals.items():
            found = self.tensors[name]
            if t.layout is not torch.strided or not (thorough or found._version != self.versions.get(name)):
                continue
            self.versions[name] = found._version
            if torch.equal(found, t):
                continue
            if ((found != t) & (t == t)).any():
                raise GradcheckError(f"{name} was altered in place by {culprit}; compute out of place, or on a clone.")

    def part(self, names: list[str], first: int, last: int) -> Subject:
        """Return the same function of some entries of some tensors."""
        part = copy.copy(self)
        part.originals = self.originals | {n: self.originals[n][first:last] for n in names}
        sliced = {n: self.tensors[n].detach()[first:last].clone() for n in names}
        part.tensors = self.tensors | {n: t.requires_grad_(n in self.checked) for n, t in sliced.items()}
        part.seen, part.versions = set(self.seen), dict(self.versions)
        return part

    def moved(self, name: str, point: Tensor) -> Tensor:
        """Return a point for a tensor, laid out as that is, unless entries share memory there."""
        tensor = self.tensors[name].detach()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        if (tensor.is_contiguous() and whole) or type(tensor) not in (Tensor, torch.nn.Parameter) or overlaps(tensor):
            return point
        return copied(tensor).copy_(point)

    def forward(self) -> list[Tensor]:
        """Run the function; raise if it alters what it is given."""
        tensors = self.tensors
        try:
            outputs = self.outputs(tensors)
        except RuntimeError:  # autograd refuses writes into a leaf; without it they happen, and are seen here
            with contextlib.suppress(RuntimeError), torch.no_grad():
                self.outputs(tensors)
            self.require_unaltered("the function")
            raise
        self.require_unaltered("the function")
        return outputs


class Gradient(Subject):
    """The gradient of a subject, as a function of its tensors and of the gradients that come from above."""

    def __init__(self, subject: Subject, grad_outputs: list[Tensor]) -> None:
        self.subject = subject
        given = {f"grad_output {i}": t for i, t in enumerate(grad_outputs)}
        self.originals = subject.originals | given
        self.tensors = subject.tensors | {n: copied(t).requires_grad_(t.requires_grad) for n, t in given.items()}
        self.checked = [name for name, t in self.tensors.items() if t.requires_grad]
        self.promoted = subject.promoted
        self._unseen()

    @classmethod
    def asked(
        cls, func: Callable[..., Any], inputs: Any, grad_outputs: Any, strided: bool
    ) -> Callable[[bool], Subject]:
        """Return what makes the gradient of a function, in double precision or as it is."""
        return lambda precise: cls.of(Subject(func, inputs, precise), grad_outputs, strided)

    @classmethod
    def of(cls, subject: Subject, grad_outputs: Any, strided: bool) -> Gradient:
        """Take gradients from above, or draw them for the outputs that require grad."""
        if grad_outputs is None:
            drawn = torch.Generator("cpu").manual_seed(1)
            found = [t for t in subject.outputs(subject.tensors) if t.requires_grad]
            made = [torch.randn(t.shape, dtype=t.dtype, generator=drawn, device="cpu").to(t.device) for t in found]
            given = [t.repeat_interleave(2, -1)[..., ::2] if strided and t.dim() else t for t in made]
            return cls(subject, [t.requires_grad_() for t in given])
        given = list(grad_outputs) if isinstance(grad_outputs, tuple | list) else [grad_outputs]
        return cls(subject, [widened(t, subject.promoted).requires_grad_(t.requires_grad) for t in given])

    def outputs(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        points = {n: t if t.requires_grad else t.detach().requires_grad_() for n, t in self._points(tensors).items()}
        outputs = self.subject.outputs({**tensors, **points})
        signals = [t for name, t in tensors.items() if name.startswith("grad_output ")]
        if not any(t.requires_grad for t in outputs):
            return [0 * t for t in points.values()]
        found = torch.autograd.grad(outputs, [*points.values()], signals, create_graph=True, allow_unused=True)
        return differentiable([g for g in found if g is not None]) or [0 * t for t in points.values()]

    def _points(self, tensors: Mapping[str, Tensor]) -> Tensors:
        return {name: tensors[name] for name in self.subject.checked}


def differentiable(result: Any) -> list[Tensor]:
    """Return the tensors of a result that require grad, or every real or complex one if none does."""
    found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
    return [t for t in found if t.requires_grad] or found


def widened(tensor: Tensor, precise: bool) -> Tensor:
    """Return the values, in double precision if `precise` and they are not integers."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if precise and tensor.is_floating_point() and tensor.dtype is not torch.float64:
        return _as_laid_out(tensor, torch.float64)
    if precise and tensor.dtype in _PRECISE:
        return _as_laid_out(tensor, _PRECISE[tensor.dtype])
    return tensor


def copied(tensor: Tensor) -> Tensor:
    """Copy with strides and offset, so that an expanded or sliced input remains one."""
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
        return tensor.detach().clone()
    t = tensor.detach()
    return t.new_empty(0).set_(t.untyped_storage().clone(), t.storage_offset(), t.shape, t.stride())


def _as_laid_out(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values in another dtype, with the strides and the offset that they have."""
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
        return tensor.to(dtype)
    whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).to(dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def overlaps(tensor: Tensor) -> bool:
    """True if entries may share memory: an expanded tensor, or windows."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers, any other as it is; dense."""
    tensor = tensor.detach()
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def flat(tensors: list[Tensor]) -> Tensor:
    """Return all numbers of some tensors, in float64, on the CPU."""
    parts = [real(t).reshape(-1).to("cpu", torch.float64) for t in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def largest(tensor: Tensor) -> float:
    """Return the largest size of a number, NaN if there is one: many times faster than the norm of infinite order."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high).item()
