"""One side of the comparison: a model, inputs, and the library whose optimizers train it.

Every check takes a fresh copy of the model, so that none sees the buffers or gradients that another has left.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_bp.nn.convert import copied

Tensors = dict[str, Tensor | None]


class Subject:
    """A model with its inputs.

    Attributes:
        model: is copied, never run.
        inputs: (args, kwargs) of the model's call.
        optim: `torch.optim` or `torch_bp.optim`.
        torchs: the subject whose model is torch's; it itself on that side.
    """

    def __init__(
        self, model: torch.nn.Module, inputs: tuple[Any, Any], optim: ModuleType, torchs: Subject | None = None
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.optim = optim
        self.torchs = self if torchs is None else torchs

    def fresh(self) -> torch.nn.Module:
        """Return a copy of the model, without gradients."""
        model = copied(self.model)
        model.zero_grad()
        return model

    def arguments(self, writable: bool = True) -> tuple[Any, dict[str, Tensor]]:
        """Return (args, kwargs) of copies, and by name the leaves behind those that can be differentiated.

        A model may write into its inputs, which autograd refuses for a leaf; not `writable`, they are the leaves.
        """
        leaves: dict[str, Tensor] = {}

        def copy(path: Any, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.detach().clone()
            if not differentiable(value):
                return value
            leaf = leaves["input " + _dotted(path[1:])] = value.requires_grad_()
            return leaf.clone() if writable else leaf

        return pytree.tree_map_with_path(copy, self.inputs), leaves

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the model and of the inputs."""
        inputs = [t for t in pytree.tree_leaves(self.inputs) if isinstance(t, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *inputs]

    def double(self) -> Subject:
        """Return this subject in float64."""
        inputs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, self.inputs)
        return Subject(self.fresh().double(), inputs, self.optim)

    def nearby(self, number: int) -> Subject:
        """Return this subject with parameters and inputs a few roundings away: others for each number, none for 0."""

        def moved(t: Tensor) -> Tensor:
            if not differentiable(t):
                return t
            return t.detach() * (1 + 4 * number * torch.finfo(t.dtype).eps * scattered(t, number))

        model = self.fresh()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(moved(p))
        return Subject(model, pytree.tree_map_only(Tensor, moved, self.inputs), self.optim)


def outputs(result: Any) -> dict[str, Tensor]:
    """Return the tensors of what a model returned, in tuples, lists or dicts, by name."""
    found, _ = pytree.tree_flatten_with_path(result)
    return {f"output: {_dotted(path)}".removesuffix(": "): leaf for path, leaf in found if isinstance(leaf, Tensor)}


def projection(result: Any) -> Tensor:
    """Return a loss in which every number counts, times one without a pattern, over the root of how many they are."""
    terms = []
    for output in outputs(result).values():
        if differentiable(output):
            terms.append(weighed(output) / max(output.numel(), 1) ** 0.5)
    if not terms:
        raise ValueError("the model returns no floating-point tensor")
    return sum(terms[1:], terms[0])


def weighed(tensor: Tensor, start: int = 0) -> Tensor:
    """Return the sum of a tensor's real numbers, each times one without a pattern."""
    y = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    return (y * scattered(y, start)).sum()


def scattered(like: Tensor, start: int = 0) -> Tensor:
    """Return fixed numbers in [-1, 1] without a pattern, in the shape of `like`."""
    numbers = torch.arange(start, start + like.numel(), dtype=torch.float64, device="cpu").square().cos()
    return numbers.reshape(like.shape).to(like.device, like.dtype)


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def reproducible(seed: int, device: str) -> Iterator[None]:
    """Seed torch, Python and NumPy inside, restore them afterwards; gradients are on, warnings are off.

    A model warns where the user runs it; here it runs dozens of times.
    """
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = range(torch.cuda.device_count()) if device == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices),
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def differentiable(tensor: Tensor) -> bool:
    """True for real and complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def _dotted(path: Any) -> str:
    """Write a path in a tree: "0", "mask", "1.hidden"."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
