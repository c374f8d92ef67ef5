"""Gradient checking, sec. 10.1: the gradient that backward computes against central differences, eq. 17.

With a fixed random co-vector v for the outputs of f, the loss is L(x) = <v, f(x)>, and for every entry x_i

    analytic_i = dL/dx_i by autograd           numeric_i = (L(x + eps e_i) - L(x - eps e_i)) / (2 eps)
    error_i    = |analytic_i - numeric_i| / max(|analytic_i|, |numeric_i|, floor)

f runs in the precision of its tensors; differences and sums are float64. Rounding costs about u |L| / eps, with u the
machine epsilon, and truncation eps^2 |L'''| / 6: least together near the cube root of u. In float64 that leaves 1e-10,
hence the tolerance 1e-7; in float32 a smaller eps, to cross fewer kinks, leaves 1e-3, hence 1e-2. (Sec. 10.1 has the
precisions exchanged: its 1e-7 is out of reach in single precision.) The floor spares entries that are zero but for
rounding: 1/20 of the tensor's largest numeric entry, or of the norm of v f(x) over outputs where that is larger.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._pytree import tree_leaves

_DEFAULTS = {torch.float64: (6e-6, 1e-7), torch.float32: (1e-3, 1e-2)}  # eps, rtol
_Option = float | None


@dataclass(frozen=True)
class GradcheckRow:
    """The worst entry of one tensor, "input 0" or "parameter 0.weight"; `index` is None if it has no entries."""

    name: str
    shape: tuple[int, ...]
    error: float = 0.0
    index: tuple[int, ...] | None = None
    analytic: float = 0.0
    numeric: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class GradcheckReport:
    """What `gradcheck` found; true if it passed. There are no rows if it failed before gradients were compared."""

    rows: tuple[GradcheckRow, ...] = ()
    eps: float = float("nan")
    rtol: float = float("nan")
    failure: str = ""

    def __bool__(self) -> bool:
        return not self.failure

    def __str__(self) -> str:
        passed = f"passed: relative errors are below {self.rtol:.0e}, with eps {self.eps:.0e}."
        lines = [f"gradcheck {'failed: ' + self.failure if self.failure else passed}"]
        for row in self.rows:
            entry = f"analytic {row.analytic:12.5g}  numeric {row.numeric:12.5g}  at {row.index} of {row.shape}"
            lines.append(f"{row.name:24} {row.error:.1e}  {entry}{'  failed' if row.failure else ''}")
        return "\n".join(lines)


def gradcheck(
    func: Callable[..., Any],
    inputs: Any,
    *,
    eps: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
) -> GradcheckReport:
    """Check the gradients of a function, a module or a Function's `apply` by eq. 17, central differences.

    Unlike torch's it checks a module's parameters too, takes float32 and expanded inputs as they are, and reports the
    worst entry of each tensor. It costs two forward passes per entry: keep the tensors small. Everything runs on
    copies: inputs, parameters, buffers, `.grad` and torch's random state are unchanged afterwards, and each pass sees
    the buffers as they are now. What a function captures is neither copied nor checked: pass a module itself, not a
    lambda around it. Within eps of a kink (ReLU at 0, max at a tie) a right gradient can fail: move the point, or in
    float32, where that is common, use float64.

    Args:
        func: takes `*inputs`, returns a tensor, or tensors in tuples, lists or dicts. If some outputs require grad,
            those that do not are ignored.
        inputs: a tensor or a tuple. Tensors that require grad are checked, everything else is passed on. They and the
            outputs are float64 or float32; the defaults are for float64 (for float32, if any of them is).
        eps: half the step of eq. 17, in units of the input, > 0. Default: 6e-6 (1e-3).
        atol: absolute tolerance, > 0: makes the floor atol / rtol. Default: the floor is 1/20 of the tensor's largest
            numeric entry, or of the norm of the outputs where that is larger.
        rtol: largest relative error that passes, > 0. Default: 1e-7 (1e-2).
        raise_exception: raise if the check fails (default), else return a report that is false.
        nondet_tol: how much the outputs and gradients of two equal runs may differ, >= 0. Default: 0.

    Raises:
        torch.autograd.gradcheck.GradcheckError: a gradient is wrong, None although the output depends on the tensor,
            or rounded to float32; backward fails; an output is not finite; two runs differ; a tensor is altered.
        ValueError: nothing requires grad; an option, dtype or layout is not supported; eps is lost in rounding.

    Example:
        >>> import torch
        >>> from torch_bp.autograd import gradcheck
        >>> x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
        >>> report = gradcheck(torch.nn.Linear(3, 2, dtype=torch.float64), x)
        >>> bool(report), [row.name for row in report.rows]
        (True, ['input 0', 'parameter weight', 'parameter bias'])
        >>> gradcheck(lambda x: x * x.detach(), x, raise_exception=False).failure.split(": ")[-1]
        'it is 0.5 times the numeric gradient in every entry.'
    """
    if not all(value is None or value > 0 for value in (eps, atol, rtol)):
        raise ValueError(f"gradcheck: eps, atol and rtol must be > 0, got {eps}, {atol} and {rtol}.")
    call = _Call(func, inputs)
    try:
        with torch.random.fork_rng({t.device for t in call.tensors.values() if t.is_cuda}), torch.enable_grad():
            report = _check(call, eps, atol, rtol, nondet_tol)
    except GradcheckError as error:
        report = GradcheckReport(failure=str(error))
    if raise_exception and not report:
        raise GradcheckError(str(report))
    return report


class _Call:
    """A function with copies of its tensors by name, and the names of those that are checked."""

    def __init__(self, func: Callable[..., Any], inputs: Any) -> None:
        self.func = func
        self.inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        self.originals = {f"input {i}": t for i, t in enumerate(self.inputs) if isinstance(t, Tensor)}
        if isinstance(func, torch.nn.Module):
            self.originals |= {f"parameter {name}": t for name, t in func.named_parameters()}
        self.checked = [name for name, t in self.originals.items() if t.requires_grad]
        if not self.checked:
            raise ValueError(
                "gradcheck expects at least one input tensor to require gradient, "
                "but none of them have requires_grad=True."
            )
        for name in self.checked:
            _require_supported(name, self.originals[name])
        self.tensors = {name: _copy(t).requires_grad_(t.requires_grad) for name, t in self.originals.items()}

    def outputs(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """Run the function; return the outputs that require grad, or every number if none does."""
        arguments = tuple(tensors.get(f"input {i}", value) for i, value in enumerate(self.inputs))
        if isinstance(self.func, torch.nn.Module):
            state = {name: buffer.detach().clone() for name, buffer in self.func.named_buffers()}
            state |= {k.removeprefix("parameter "): t for k, t in tensors.items() if k.startswith("parameter ")}
            result = torch.func.functional_call(self.func, state, arguments)
        else:
            result = self.func(*arguments)
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
        return [t for t in found if t.requires_grad] or found

    def run(self) -> tuple[torch.dtype, Tensor, dict[str, Tensor]]:
        """Return the coarsest dtype, the co-vector, and by name the outputs, flat, and their gradients."""
        try:
            outputs = self.outputs(self.tensors)
        except RuntimeError:  # autograd refuses writes into a leaf; without it they happen, and are seen here
            with contextlib.suppress(RuntimeError), torch.no_grad():
                self.outputs(self.tensors)
            self.require_unaltered("the function")
            raise
        self.require_unaltered("the function")
        if not outputs:
            raise ValueError("gradcheck: func must return a floating-point tensor, got none.")
        for i, output in enumerate(outputs):
            _require_supported(f"output {i}", output)
            if not output.isfinite().all():
                raise GradcheckError(f"output {i} is NaN or infinite in {int((~output.isfinite()).sum())} entries.")
        tensors = [*outputs, *(self.tensors[name] for name in self.checked)]
        dtype = min((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize)
        covector = _covector(sum(t.numel() for t in outputs), dtype)
        return dtype, covector, {"the outputs": _flat(outputs)} | self.backward(outputs, covector)

    def backward(self, outputs: list[Tensor], covector: Tensor) -> dict[str, Tensor]:
        """Return the gradients of <covector, outputs> in float64, zeros where autograd gives None."""
        tensors = [self.tensors[name] for name in self.checked]
        parts = covector.clone().split([t.numel() for t in outputs])
        dy = [part.view(t.shape).to(t) for part, t in zip(parts, outputs)]
        found: Any = [None] * len(tensors)
        try:
            if outputs[0].requires_grad:
                found = torch.autograd.grad(outputs, tensors, dy, allow_unused=True)
        except RuntimeError as error:
            names = [name for name in self.checked if self.fails_alone(name)] or self.checked
            raise GradcheckError(f"backward to {', '.join(names)} raised: {error}") from error
        self.require_unaltered("its backward")
        if not torch.equal(_flat(dy), covector):
            raise GradcheckError("backward altered the gradient it was given in place; compute out of place.")
        dense = (torch.zeros_like(t) if g is None else g.to_dense() for g, t in zip(found, tensors))
        return {f"the gradient of {name}": g.to("cpu", torch.float64) for name, g in zip(self.checked, dense)}

    def fails_alone(self, name: str) -> bool:
        """True if backward raises where no other tensor requires grad."""
        others = {other: self.tensors[other].detach() for other in self.checked if other != name}
        outputs = [t.sum() for t in self.outputs(self.tensors | others) if t.requires_grad]
        with contextlib.suppress(RuntimeError):
            torch.autograd.grad(outputs, self.tensors[name], allow_unused=True)
            return False
        return True

    def require_unaltered(self, culprit: str) -> None:
        for name, t in self.originals.items():
            if t.layout is torch.strided and ((self.tensors[name] != t) & (t == t)).any():
                raise GradcheckError(f"{name} was altered in place by {culprit}; compute out of place, or on a clone.")


def _check(call: _Call, eps: _Option, atol: _Option, rtol: _Option, nondet_tol: float) -> GradcheckReport:
    dtype, covector, first = call.run()
    for name, second in call.run()[2].items():
        if second.shape != first[name].shape or ((second - first[name]).abs() > nondet_tol).any():
            cure = "if dropout is the cause, call module.eval(); else fix the random seed inside the function."
            raise GradcheckError(f"not deterministic: two runs differ by more than {nondet_tol} in {name}; {cure}")
    eps, rtol = eps or _DEFAULTS[dtype][0], rtol or _DEFAULTS[dtype][1]
    _, *gradients = first.values()
    rows = tuple(
        _compare(name, gradient, *_central_differences(call, name, eps, covector), atol, rtol, dtype)
        for name, gradient in zip(call.checked, gradients)
    )
    worst = max((row for row in rows if row.failure), key=lambda row: row.error, default=GradcheckRow("", ()))
    return GradcheckReport(rows, eps, rtol, worst.failure)


def _central_differences(call: _Call, name: str, eps: float, covector: Tensor) -> tuple[Tensor, Tensor]:
    """Return eq. 17 for every entry of one tensor, and the norm of v f(x) there."""
    centre = call.tensors[name].detach().clone()
    step = (centre.abs() + eps) - centre.abs()  # what an entry can hold of eps, the same in both directions
    if not step.all():
        raise ValueError(f"gradcheck: eps must exceed the rounding of {name}, got {eps:.0e}; scale {name} down.")
    upper, lower = centre + step, centre - step

    def terms(index: tuple[int, ...], value: Tensor) -> Tensor:
        point = centre.clone()
        point[index] = value
        return covector * _flat(call.outputs(call.tensors | {name: point.requires_grad_()}))

    numeric, size = torch.zeros(2, *centre.shape, dtype=torch.float64, device="cpu")
    for index in itertools.product(*map(range, centre.shape)):
        above, below = terms(index, upper[index]), terms(index, lower[index])
        numeric[index] = (above - below).sum() / (upper[index].double() - lower[index].double()).item()
        size[index] = torch.maximum(above.norm(), below.norm())
    return numeric, size


def _compare(
    name: str, analytic: Tensor, numeric: Tensor, size: Tensor, atol: _Option, rtol: float, dtype: torch.dtype
) -> GradcheckRow:
    if not numeric.numel():
        return GradcheckRow(name, tuple(numeric.shape))
    floor = torch.maximum(size, numeric.abs().nan_to_num(0, 0).max()) / 20 if atol is None else atol / rtol
    difference = (analytic - numeric).abs()
    errors = difference / torch.maximum(analytic.abs(), numeric.abs()).clamp(min=floor)
    errors = errors.where(difference != 0, 0.0).nan_to_num(torch.inf, torch.inf)
    index = tuple(int(i) for i in torch.unravel_index(errors.argmax(), numeric.shape))
    error, a, n = (t[index].item() for t in (errors, analytic, numeric))
    # after a random float64 co-vector, entries above the rounding error that all fit float32 are no coincidence
    entries = analytic[analytic.abs() > 1e-6 * floor]
    rounded = dtype is torch.float64 and len(entries) > 0 and entries.equal(entries.float().double())
    failure = f"the gradient of {name} holds float32 numbers only; backward must keep {dtype}." if rounded else ""
    if error > rtol:
        failure = (
            f"the gradient of {name} at index {index} is {a:.6g} (analytic) but should be {n:.6g} (numeric), "
            f"relative error {error:.1e}, tolerance {rtol:.0e}: {_cause(analytic, numeric, rtol)}"
        )
    return GradcheckRow(name, tuple(numeric.shape), error, index, a, n, failure)


def _cause(analytic: Tensor, numeric: Tensor, rtol: float) -> str:
    if not analytic.any():
        return "autograd gives None or zeros, yet the output depends on it; look for detach, .data or a returned None."
    ratio = ((analytic * numeric).sum() / numeric.square().sum()).item()
    if abs(ratio - 1) > 1e-3 and (analytic - ratio * numeric).abs().max() <= rtol * numeric.abs().max():
        return f"it is {ratio:.4g} times the numeric gradient in every entry."
    return "correct backward, or move the point if the function has a kink or an end within eps of it."


def _require_supported(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DEFAULTS or tensor.layout is not torch.strided:
        raise ValueError(
            f"gradcheck: {name} must be dense and of torch.float64 or torch.float32, got {tensor.dtype} and "
            f"{tensor.layout}; use torch.autograd.gradcheck if complex or sparse, .double() if of half precision."
        )


def _copy(tensor: Tensor) -> Tensor:
    """Copy with strides and offset, so that an expanded or sliced input remains one."""
    t = tensor.detach().resolve_conj().resolve_neg()
    if t.layout is not torch.strided or type(t) is not Tensor:
        return t.clone()
    return t.new_empty(0).set_(t.untyped_storage().clone(), t.storage_offset(), t.shape, t.stride())


def _covector(size: int, dtype: torch.dtype) -> Tensor:
    """Numbers of `dtype` in 0.5 to 2, of alternating sign: every output counts, no sign or scale is special."""
    fixed = torch.Generator("cpu").manual_seed(0)
    covector = torch.empty(size, dtype=torch.float64, device="cpu").uniform_(0.5, 2, generator=fixed)
    covector[::2].neg_()
    return covector.to(dtype).double()


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).to("cpu", torch.float64) for t in tensors])
