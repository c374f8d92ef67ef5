"""Runs of a subject, forward and backward, each watched for what a backward must not do."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from torch_bp.autograd.gradient_check.slope import PRECISION, Signal, covector_like
from torch_bp.autograd.gradient_check.sparse import SparseOutputError
from torch_bp.autograd.gradient_check.subject import Subject, Tensors, flat, largest, real


class Passes:
    """The first pass of a subject, and others to compare with it.

    Attributes:
        outputs: of the first pass, with its graph.
        values: the same, flat.
        dtype: the coarsest of the outputs and of what is checked; real.
        signal: a co-vector at random, and the gradients that the first backward makes of it.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.outputs = subject.forward()
        if not self.outputs:
            raise ValueError("gradcheck: func must return a floating-point tensor, got none.")
        for i, output in enumerate(self.outputs):
            require_supported(f"output {i}", output)
            if not real(output).isfinite().all():
                count = int((~real(output).isfinite()).sum())
                raise GradcheckError(f"output {i} is NaN or infinite in {count} entries.")
        tensors = [*self.outputs, *(subject.tensors[name] for name in subject.checked)]
        self.dtype = min((t.dtype.to_real() for t in tensors), key=lambda dtype: (dtype.itemsize, str(dtype)))
        self.values = flat(self.outputs)
        self._sizes = [real(t).numel() for t in self.outputs]
        self.covector = covector_like(len(self.values), self.dtype)

    @property
    def slack(self) -> float:
        """How far apart rounding may set two ways to the same numbers, relative to the largest."""
        return 1e5 * torch.finfo(self.dtype).eps

    def cut(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the co-vector of the first examples alone, and the same with zeros for the others."""
        parts = [p.view(real(t).shape) for p, t in zip(self.covector.split(self._sizes), self.outputs)]
        first = [p[:count].reshape(-1) for p in parts]
        rest = [torch.cat([f, torch.zeros_like(p[count:]).reshape(-1)]) for f, p in zip(first, parts)]
        return torch.cat(first), torch.cat(rest)

    def signal(self) -> Signal:
        return Signal(self.covector, self.backward(self.outputs, self.covector))

    def masked(self, mask: Tensor) -> Signal:
        """Return a signal from some of the outputs alone."""
        covector = self.covector * mask
        return Signal(covector, self.backward(self.outputs, covector))

    def backward(
        self, outputs: list[Tensor], covector: Tensor, names: Sequence[str] | None = None, layout: str = "dense"
    ) -> Tensors:
        """Return the gradients of <covector, outputs>, flat in float64, zeros where autograd gives None.

        Raises:
            GradcheckError: backward fails, or alters the outputs or what it is given.
        """
        names = self.subject.checked if names is None else names
        tensors = [self.subject.tensors[name] for name in names]
        dy = signals_like(outputs, covector, layout)
        found: Any = [None] * len(tensors)
        try:
            if any(t.requires_grad for t in outputs):
                found = torch.autograd.grad(outputs, tensors, dy, allow_unused=True, retain_graph=True)
        except Exception as error:
            raise GradcheckError(self._blame(names, layout, error)) from error
        self.subject.require_unaltered("its backward")
        if not torch.equal(flat(dy), covector):
            raise GradcheckError("backward altered the gradient it was given in place; compute out of place.")
        return {
            name: torch.zeros(real(t).numel(), dtype=torch.float64, device="cpu") if g is None else flat([g])
            for name, t, g in zip(names, tensors, found)
        }

    def _blame(self, names: Sequence[str], layout: str, error: Exception) -> str:
        if layout != "dense":
            return f"backward raised for a {layout} gradient from above: {error}; use reshape, not view, or contiguous."
        culprits = [name for name in names if self._fails_alone(name)] or names
        return f"backward to {', '.join(culprits)} raised: {error}"

    def _fails_alone(self, name: str) -> bool:
        """True if backward raises where no other tensor requires grad."""
        with contextlib.suppress(Exception):
            outputs = self.subject.outputs(self.frozen([name]))
            found = [t for t in outputs if t.requires_grad]
            torch.autograd.grad(found, self.subject.tensors[name], signals_of_ones(found), allow_unused=True)
            return False
        return True

    def frozen(self, names: Sequence[str]) -> Tensors:
        """Return the tensors, of which these alone require grad."""
        others = {n: self.subject.tensors[n].detach() for n in self.subject.checked if n not in names}
        return self.subject.tensors | others


def signals_like(outputs: list[Tensor], covector: Tensor, layout: str = "dense") -> list[Tensor]:
    """Cut a flat co-vector into gradients for the outputs: "dense", or "non-contiguous", at an offset."""
    dy = []
    sizes = [real(t).numel() for t in outputs]
    for part, output in zip(covector.split(sizes), outputs):
        shape = real(output).shape
        part = part.view(shape).to(output.device, output.dtype.to_real())
        part = torch.view_as_complex(part.clone()) if output.is_complex() else part.clone()
        if layout == "non-contiguous":
            part = part.transpose(0, -1) if output.dim() > 1 else part
            wide = torch.zeros(*part.shape, 2, dtype=output.dtype, device=output.device)
            wide[..., 1] = part  # neither its strides nor its offset are what they usually are
            part = wide[..., 1].transpose(0, -1) if output.dim() > 1 else wide[..., 1]
        dy.append(part)
    return dy


def signals_of_ones(outputs: list[Tensor]) -> list[Tensor]:
    """Return for each output the gradient that `.sum()` hands down: a single 1, expanded."""
    return [torch.ones((), dtype=t.dtype, device=t.device).expand(t.shape) for t in outputs]


def require_supported(name: str, tensor: Tensor) -> None:
    """Refuse what has no slopes of its own here."""
    if name.startswith("output") and tensor.layout is not torch.strided:
        raise SparseOutputError(f"gradcheck: {name} must be dense, got {tensor.layout}.")
    if tensor.is_meta:
        raise ValueError(f"gradcheck: {name} must have numbers, got a tensor on the meta device; use to_empty.")
    if tensor.dtype.to_real() not in PRECISION or tensor.layout is not torch.strided:
        raise ValueError(
            f"gradcheck: {name} must be dense, real or complex, of half to double precision, got {tensor.dtype} and "
            f"{tensor.layout}; use torch.autograd.gradcheck."
        )


def close(a: Tensor, b: Tensor, slack: float, least: float = 0.0) -> bool:
    """True if two tensors differ by rounding alone: by `slack` of the largest entry, or by `least`."""
    if torch.equal(a, b):
        return True
    off = largest(a - b)
    return off <= least or off <= slack * largest(b) + least
