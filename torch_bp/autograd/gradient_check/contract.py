"""What a backward owes beside the right numbers.

It gives the same when it runs twice on one graph, whatever the layout of the gradient from above, whichever tensors
require grad, and with no gradient from above for some outputs. Where examples do not depend on each other forward, they
do not backward: then the first few examples alone are seen to have the gradients that they have among all, and serve
for the rest of these checks, which are many passes. Each is compared with another pass, to rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from torch_bp.autograd.gradient_check.passes import Passes, signals_like, signals_of_ones
from torch_bp.autograd.gradient_check.slope import Signal
from torch_bp.autograd.gradient_check.subject import Tensors, flat, real

_CURE = "if dropout is the cause, call module.eval(); else fix the random seed inside the function."
_EXAMPLES = 8


def require_repeatable(passes: Passes, nondet_tol: float) -> list[Tensor]:
    """Run forward again; return what it returns, with its graph."""
    outputs = passes.subject.forward()
    second = flat(outputs)
    if second.shape != passes.values.shape or not _alike(passes.values, second, nondet_tol):
        raise GradcheckError(f"not deterministic: two runs differ by more than {nondet_tol} in the outputs; {_CURE}")
    return outputs


def few_examples(passes: Passes, signal: Signal) -> tuple[Passes, Signal]:
    """Return passes of the first examples alone where the outputs show them to be independent; else those given.

    Raises:
        GradcheckError: the outputs do not depend on other examples, but the gradients do.
    """
    subject, outputs = passes.subject, passes.outputs
    n = _examples(outputs)
    inputs = {name: t for name, t in subject.tensors.items() if name.startswith("input") and t.layout is torch.strided}
    batched = [name for name, t in inputs.items() if t.dim() and len(t) == n]
    kept = min(_EXAMPLES, n // 2)
    if not kept or not any(name in subject.checked for name in batched):
        return passes, signal
    try:
        part = Passes(subject.first(batched, kept))
    except Exception:  # of a function of whole batches of this size: whatever it raises, it is one
        return passes, signal
    slack = _slack(passes)
    pairs = [(real(a)[:kept], real(b)) for a, b in zip(outputs, part.outputs)]
    if len(part.outputs) != len(outputs) or not all(a.shape == b.shape and close(a, b, slack) for a, b in pairs):
        return passes, signal
    sizes = [real(t).numel() for t in outputs]
    cut = [p.view(real(t).shape)[:kept] for p, t in zip(signal.covector.split(sizes), outputs)]
    part.covector = torch.cat([p.reshape(-1) for p in cut])
    try:
        found = part.signal()
    except GradcheckError:
        raise
    except Exception as error:
        raise GradcheckError(f"backward raised for {kept} of {n} examples: {type(error).__name__}: {error}") from error
    for name in subject.checked:
        if name in batched:
            whole = signal.gradients[name].view(real(subject.tensors[name]).shape)[:kept].reshape(-1)
            if not close(found.gradients[name], whole, slack):
                raise GradcheckError(
                    f"the gradient of {name} for {kept} of {n} examples changes with the others, though the outputs do "
                    "not; look for a sum, a mean or a size of the batch in backward."
                )
    return part, found


class Contract:
    """The checks of a subject, after a first pass."""

    def __init__(self, passes: Passes, signal: Signal, nondet_tol: float) -> None:
        self.passes, self.signal, self.nondet_tol = passes, signal, nondet_tol
        self.subject = passes.subject
        self.slack = _slack(passes)

    def backward_again(self, layout: str) -> None:
        """Run backward again on the first graph; with a gradient from above of another layout, if they agree."""
        covector = self.signal.covector
        if not torch.equal(flat(self.passes.outputs), self.passes.values):
            raise GradcheckError("backward altered the outputs in place; compute out of place.")
        again = self.passes.backward(self.passes.outputs, covector, layout=layout)
        if self._differing(again, exactly=layout == "dense"):
            if name := self._differing(self.passes.backward(self.passes.outputs, covector), exactly=True):
                raise GradcheckError(
                    f"not deterministic: two runs of backward differ by more than {self.nondet_tol} in the gradient of "
                    f"{name}; if it alters what it has saved, it must not; {_CURE}"
                )
            self._same(again, f"with a {layout} gradient from above")

    def _differing(self, found: Tensors, exactly: bool) -> str:
        """Return the name of a gradient that is another than in the first pass."""
        for name, gradient in self.signal.gradients.items():
            same = _alike(gradient, found[name], self.nondet_tol) if exactly else self._near(gradient, found[name])
            if not same:
                return name
        return ""

    def ones(self, outputs: list[Tensor]) -> None:
        """Backward of a single number expanded, and to some of the tensors.

        Of any two tensors, one requires grad in some pass without the other.
        """
        names = self.subject.checked
        expanded = self._expanded(outputs)
        ones = torch.ones_like(self.signal.covector)
        bits = math.ceil(math.log2(max(2, len(names))))
        masks = [[n for i, n in enumerate(names) if (i >> bit & 1) == side] for bit in range(bits) for side in (0, 1)]
        for subset in [[name] for name in names] if len(names) <= 2 * bits else masks:
            if len(names) > 1:
                found = self.subject.outputs(self.passes.frozen(subset))
                if len(found) != len(outputs) or not any(t.requires_grad for t in found):
                    continue  # outputs that do not depend on them were left out
            else:
                found = outputs
            alone = f"where {', '.join(subset)} alone requires grad" if len(subset) < 4 else "where others are frozen"
            try:
                gradients = self.passes.backward(found, ones, subset)
            except GradcheckError as error:
                raise GradcheckError(f"{alone}: {error}") from error
            for name in subset:
                if not self._near(gradients[name], expanded[name]):
                    dense = self.passes.backward(outputs, ones)
                    self._same(expanded, "with an expanded gradient from above, as .sum() gives,", dense)
                    self._same(gradients, alone, dense)

    def _expanded(self, outputs: list[Tensor]) -> Tensors:
        tensors = [self.subject.tensors[name] for name in self.subject.checked]
        if any(t.is_complex() for t in outputs):  # both parts are one here
            return self.passes.backward(outputs, torch.ones_like(self.signal.covector))
        dy = signals_of_ones(outputs)
        try:
            found = torch.autograd.grad(outputs, tensors, dy, allow_unused=True, retain_graph=True)
        except RuntimeError as error:
            raise GradcheckError(
                f"backward raised for an expanded gradient from above, as .sum() gives: {error}; use reshape, not view."
            ) from error
        return {n: _flat_or_zeros(g, t) for n, g, t in zip(self.subject.checked, found, tensors)}

    def undefined(self, outputs: list[Tensor]) -> None:
        """Backward with no gradient from above, for all outputs and for each of several."""
        every = range(len(outputs))
        sizes = [real(t).numel() for t in outputs]
        for absent in [[*every], *([[i] for i in every[:8]] if len(outputs) > 1 else [])]:
            covector = torch.cat([p * (i not in absent) for i, p in enumerate(self.signal.covector.split(sizes))])
            undefined = torch._C._functions.UndefinedGrad()  # type: ignore[attr-defined]
            ends: list[Any] = [undefined(t) if i in absent and t.requires_grad else t for i, t in enumerate(outputs)]
            tensors = [self.subject.tensors[name] for name in self.subject.checked]
            which = "any output" if len(absent) == len(outputs) else f"output {absent[0]}"
            try:
                found = torch.autograd.grad(
                    ends, tensors, signals_like(outputs, covector), allow_unused=True, retain_graph=True
                )
            except RuntimeError as error:
                raise GradcheckError(
                    f"backward raised with no gradient from above for {which}: {error}; expect None there, or leave "
                    "set_materialize_grads at True."
                ) from error
            given = {n: _flat_or_zeros(g, t) for n, g, t in zip(self.subject.checked, found, tensors)}
            expected = (
                {n: torch.zeros_like(g) for n, g in given.items()}
                if len(absent) == len(outputs)
                else self.passes.backward(outputs, covector)
            )
            self._same(given, f"with no gradient from above for {which}", expected)

    def _near(self, a: Tensor, b: Tensor) -> bool:
        return close(a, b, self.slack, self.nondet_tol + self._rounding)

    @property
    def _rounding(self) -> float:
        """What is left of sums over the outputs that are 0 but for rounding."""
        return self.slack * 1e-3 * (self.signal.covector * self.passes.values).norm().item()

    def _same(self, found: Tensors, when: str, expected: Tensors | None = None) -> None:
        for name, gradient in found.items():
            wanted = (self.signal.gradients if expected is None else expected)[name]
            if not self._near(gradient, wanted):
                i = int((gradient - wanted).abs().nan_to_num(torch.inf).argmax())
                raise GradcheckError(
                    f"{when} the gradient of {name} differs: {gradient[i].item():.6g} for {wanted[i].item():.6g}."
                )


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.equal(a, b) or bool(((a - b).abs() <= tolerance).all())


def close(a: Tensor, b: Tensor, slack: float, least: float = 0.0) -> bool:
    """True if two tensors differ by rounding alone: by `slack` of the largest entry, or by `least`."""
    if torch.equal(a, b):
        return True
    largest = max(torch.linalg.vector_norm(t, torch.inf).item() for t in (a, b))
    return torch.linalg.vector_norm(a - b, torch.inf).item() <= slack * largest + least


def _slack(passes: Passes) -> float:
    return 1e5 * torch.finfo(passes.dtype).eps


def _examples(outputs: list[Tensor]) -> int:
    """Return the size of the first dimension, if all outputs have the same; else 0."""
    sizes = {t.shape[0] if t.dim() else 0 for t in outputs}
    return sizes.pop() if len(sizes) == 1 else 0


def _flat_or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros(real(like).numel(), dtype=torch.float64) if gradient is None else flat([gradient])
