"""What a backward owes beside the right numbers.

It is linear in the gradient from above, whatever the layout of that, whichever tensors require grad and however many
examples there are; it gives the same when it runs twice on one graph, and zeros where nothing comes from above. Three
passes look at most of this together: with c a co-vector at random and 1 of ones, for a backward g,

    g(c) non-contiguous, 1024 times as large, to the first examples among all  +  g(1) expanded, of these alone
        =  g(c + 1) of these alone, to one tensor after the other

Only where that fails, more passes find out what is wrong.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from torch_bp.autograd.gradient_check.example import Examples
from torch_bp.autograd.gradient_check.passes import Passes, close, signals_like, signals_of_ones
from torch_bp.autograd.gradient_check.slope import Signal
from torch_bp.autograd.gradient_check.subject import Tensors, flat, largest, real

_CURE = "if dropout is the cause, call module.eval(); else fix the random seed inside the function."
_STRIDED = "with a non-contiguous gradient from above"


def require_repeatable(passes: Passes, nondet_tol: float) -> None:
    """Raise if the outputs are others the second time."""
    second = flat(passes.subject.forward())
    if second.shape != passes.values.shape or not _alike(passes.values, second, nondet_tol):
        raise GradcheckError(f"not deterministic: two runs differ by more than {nondet_tol} in the outputs; {_CURE}")


class Contract:
    """The checks of a subject, after a first pass."""

    def __init__(self, passes: Passes, signal: Signal, nondet_tol: float) -> None:
        self.passes, self.signal, self.nondet_tol = passes, signal, nondet_tol
        self.few: Examples | None = None
        self.least = nondet_tol + passes.slack * 1e-3 * (passes.covector * passes.values).norm().item()
        self.scale = 4.0 if passes.dtype is torch.float16 else 1024.0

    def choose(self, few: Examples | None) -> None:
        """Take the first few examples for what follows, or all of them."""
        self.few = few

    @property
    def base(self) -> Passes:
        return self.passes if self.few is None else self.few.passes

    def repeat(self) -> None:
        """Run backward again on the first graph."""
        self._require_same_outputs()
        again = self.passes.backward(self.passes.outputs, self.passes.covector)
        for name, gradient in self.signal.gradients.items():
            if not _alike(gradient, again[name], self.nondet_tol):
                raise GradcheckError(
                    f"not deterministic: two runs of backward differ by more than {self.nondet_tol} in the gradient of "
                    f"{name}; if it alters what it has saved, it must not; {_CURE}"
                )

    def require_linear(self) -> None:
        """Compare the three passes of the head of this file."""
        self._require_same_outputs()
        strided = self._backward_of_first(self.scale, "non-contiguous")
        once, whole = 1 / self.scale, self.signal.gradients
        if wrong := [
            n for n in self._of_examples() if not self._near(once * self._cut(n, strided), self._cut(n, whole))
        ]:
            if self.few is not None and not self.few.independent(self.passes):
                self.few = None
                return self.require_linear()
            self._explain(strided, None)
            raise GradcheckError(self._changes(wrong[0]))
        expanded = self._expanded()
        both = self._with_ones()
        for subset in _subsets(self.passes.subject.checked):
            alone = self._alone(subset, both)
            for name, gradient in alone.items():
                first, second = self._cut(name, strided), expanded[name]
                if not self._near(gradient, torch.add(second, first, alpha=once), second):
                    self._explain(strided, expanded)
                    self._explain_alone(alone)
        return None

    def _require_same_outputs(self) -> None:
        if not torch.equal(flat(self.passes.outputs), self.passes.values):
            raise GradcheckError("backward altered the outputs in place; compute out of place.")

    def _with_ones(self) -> Tensor:
        return (self.base.covector + 1).to(self.passes.dtype).double()

    def _of_examples(self) -> list[str]:
        """Return the checked tensors whose gradient can be seen among those of all examples."""
        names = self.passes.subject.checked
        return names if self.few is None else [n for n in names if n in self.few.names]

    def _cut(self, name: str, gradients: Tensors) -> Tensor:
        """Return the gradient of the first examples."""
        if self.few is None or name not in self.few.names:
            return gradients[name]
        shape = real(self.passes.subject.tensors[name]).shape
        return gradients[name].view(shape)[: self.few.count].reshape(-1)

    def _backward_of_first(self, scale: float = 1.0, layout: str = "dense") -> Tensors:
        """Backward from the outputs of the first examples, among all."""
        covector = self.passes.covector if self.few is None else self.passes.cut(self.few.count)[1]
        return self.passes.backward(self.passes.outputs, covector * scale, layout=layout)

    def _expanded(self) -> Tensors:
        """Backward of a single number expanded."""
        base = self.base
        tensors = [base.subject.tensors[name] for name in base.subject.checked]
        if any(t.is_complex() for t in base.outputs):  # both parts are one here
            return base.backward(base.outputs, torch.ones_like(base.covector))
        dy = signals_of_ones(base.outputs)
        try:
            found = torch.autograd.grad(base.outputs, tensors, dy, allow_unused=True, retain_graph=True)
        except Exception as error:
            self._dense_ones()  # it may be the number of examples
            raise GradcheckError(
                f"backward raised for an expanded gradient from above, as .sum() gives: {error}; use reshape, not view."
            ) from error
        base.subject.require_unaltered("its backward")
        return {n: _flat_or_zeros(g, t) for n, g, t in zip(base.subject.checked, found, tensors)}

    def _dense_ones(self) -> Tensors:
        try:
            return self.base.backward(self.base.outputs, torch.ones_like(self.base.covector))
        except GradcheckError as error:
            if self.few is None:
                raise
            raise GradcheckError(f"for {self.few.count} of {self.few.total} examples, {error}") from error

    def _alone(self, subset: list[str], covector: Tensor) -> Tensors:
        """Backward to some tensors, the others frozen; nothing where outputs do not depend on them."""
        base = self.base
        outputs = base.outputs
        if len(base.subject.checked) > 1:
            outputs = base.subject.outputs(base.frozen(subset))
        if len(outputs) != len(base.outputs) or not any(t.requires_grad for t in outputs):
            return {}
        try:
            return base.backward(outputs, covector, subset)
        except GradcheckError as error:
            raise GradcheckError(f"{_where(subset)}: {error}") from error

    def _explain(self, strided: Tensors, expanded: Tensors | None) -> None:
        """Raise for what differs from a plain backward."""
        self.repeat()
        dense = self._backward_of_first()
        strided = {name: g / self.scale for name, g in strided.items()}
        if self._differing(strided, dense):
            unscaled = self._backward_of_first(1.0, "non-contiguous")
            self._same(unscaled, _STRIDED, dense)
            self._same(strided, f"with a gradient from above {self.scale:.0f} times as large, divided by that,", dense)
        if expanded is None:
            return
        ones = self._dense_ones()
        alone = self.base.backward(self.base.outputs, self.base.covector)
        for name, gradient in alone.items():
            if not self._near(gradient, self._cut(name, dense)):
                raise GradcheckError(self._changes(name))
        self._same(expanded, "with an expanded gradient from above, as .sum() gives,", ones)

    def _explain_alone(self, found: Tensors) -> None:
        together = self.base.backward(self.base.outputs, self._with_ones())
        self._same(found, _where([*found]), {name: together[name] for name in found})

    def _changes(self, name: str) -> str:
        count, total = (self.few.count, self.few.total) if self.few else (0, 0)
        return (
            f"the gradient of {name} for {count} of {total} examples changes with the others, though the outputs do "
            "not; look for a sum, a mean or a size of the batch in backward."
        )

    def undefined(self) -> None:
        """Backward with no gradient from above, for all outputs and for each of several."""
        base, outputs = self.base, self.base.outputs
        every = range(len(outputs))
        sizes = [real(t).numel() for t in outputs]
        for absent in [[*every], *([[i] for i in every[:8]] if len(outputs) > 1 else [])]:
            covector = torch.cat([p * (i not in absent) for i, p in enumerate(base.covector.split(sizes))])
            undefined = torch._C._functions.UndefinedGrad()  # type: ignore[attr-defined]
            ends: list[Any] = [undefined(t) if i in absent and t.requires_grad else t for i, t in enumerate(outputs)]
            tensors = [base.subject.tensors[name] for name in base.subject.checked]
            which = "any output" if len(absent) == len(outputs) else f"output {absent[0]}"
            try:
                found = torch.autograd.grad(
                    ends, tensors, signals_like(outputs, covector), allow_unused=True, retain_graph=True
                )
            except Exception as error:
                raise GradcheckError(
                    f"backward raised with no gradient from above for {which}: {error}; expect None there, or leave "
                    "set_materialize_grads at True."
                ) from error
            base.subject.require_unaltered("its backward")
            if len(absent) == len(outputs):
                if all(g is None or not largest(real(g)) for g in found):
                    continue
                expected = {n: _flat_or_zeros(None, t) for n, t in zip(base.subject.checked, tensors)}
            else:
                expected = base.backward(outputs, covector)
            given = {n: _flat_or_zeros(g, t) for n, g, t in zip(base.subject.checked, found, tensors)}
            self._same(given, f"with no gradient from above for {which}", expected)

    def _near(self, a: Tensor, b: Tensor, of: Tensor | None = None) -> bool:
        """True if both differ by rounding alone; `of` is a term of theirs, if it may be larger."""
        if close(a, b, self.passes.slack, self.least):
            return True
        return of is not None and close(a, b, self.passes.slack, self.least + self.passes.slack * largest(of))

    def _differing(self, a: Tensors, b: Tensors) -> bool:
        return not all(self._near(a[name], b[name]) for name in a)

    def _same(self, found: Tensors, when: str, expected: Tensors) -> None:
        for name, gradient in found.items():
            wanted = expected[name]
            if not self._near(gradient, wanted):
                i = int((gradient - wanted).abs().nan_to_num(torch.inf).argmax())
                raise GradcheckError(
                    f"{when} the gradient of {name} differs: {gradient[i].item():.6g} for {wanted[i].item():.6g}."
                )


def _subsets(names: list[str]) -> list[list[str]]:
    """Return tensors to require grad alone: of any two, one does in some pass without the other."""
    bits = math.ceil(math.log2(max(2, len(names))))
    masks = [[n for i, n in enumerate(names) if (i >> bit & 1) == side] for bit in range(bits) for side in (0, 1)]
    return [[name] for name in names] if len(names) <= 2 * bits else masks


def _where(subset: list[str]) -> str:
    return f"where {', '.join(subset)} alone requires grad" if len(subset) < 4 else "where others are frozen"


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.equal(a, b) or bool(((a - b).abs() <= tolerance).all())


def _flat_or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    zeros = torch.zeros(real(like).numel(), dtype=torch.float64, device="cpu")
    return zeros if gradient is None else flat([gradient])
