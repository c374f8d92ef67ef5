"""Gradient checking, sec. 10.1: the gradient that backward computes against central differences, eq. 17.

With a fixed random co-vector v for the outputs of f, the loss is L(x) = <v, f(x)>, and for every entry x_i

    analytic_i = dL/dx_i by autograd           numeric_i = (L(x + eps e_i) - L(x - eps e_i)) / (2 eps)
    error_i    = |analytic_i - numeric_i| / max(|analytic_i|, |numeric_i|, floor)

f runs in the precision of its tensors; differences and sums are float64. Rounding spoils the numeric gradient by
about u |L| / eps and truncation by eps^2 |L'''| / 6, with u the machine epsilon. So eps is the cube root of u, which
leaves some 1e-10 in float64 and 1e-4 in float32: hence the tolerances 1e-7 and 1e-2. (Sec. 10.1 has the precisions
exchanged: its 1e-7 is out of reach in single precision.) The floor spares entries that are zero but for rounding: it
is 1/20 of the tensor's largest numeric entry, or of the norm of v f(x) over outputs where that is larger.
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

_RTOL = {torch.float64: 1e-7, torch.float32: 1e-2}
_FLOOR = 0.05


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
        lines = [f"gradcheck failed: {self.failure}" if self.failure else "gradcheck passed."]
        if self.rows:
            width = max(len(row.name) for row in self.rows)
            lines.append(f"Largest relative error of each tensor, tolerance {self.rtol:.0e}, eps {self.eps:.1e}:")
        for row in self.rows:
            entry = f"analytic {row.analytic:12.5g}  numeric {row.numeric:12.5g}  at {row.index} of {row.shape}"
            lines.append(f"{row.name:{width}}  {row.error:.1e}  {entry}{'  failed' if row.failure else ''}")
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
    """Check the gradients of a function, a module or a Function's `apply` by eq. 17: see the module's docstring.

    Unlike `torch.autograd.gradcheck` it checks a module's parameters too, takes float32 and expanded inputs as they
    are, and reports the worst entry of each tensor. Forward mode and batched gradients are left to torch's.
    It costs two forward passes per entry of every tensor checked: keep them small.

    Inputs, parameters and buffers are copied: they, `.grad` and torch's random state are unchanged afterwards, and
    every forward pass sees the buffers as they are now. What a function captures is neither copied nor checked: pass
    a module itself, not a lambda around it.

    At a point within eps of a kink (ReLU at 0, max at a tie) a right gradient can fail, since the two values lie on
    different sides. In float32, where eps is 0.005, that is common: move the point, or check in float64.

    Args:
        func: takes `*inputs`, returns a tensor, or tensors in tuples, lists or dicts. Outputs that do not require
            grad count as constants if others do.
        inputs: a tensor or a tuple. Tensors that require grad are checked, everything else is passed on. What is
            checked and the outputs are float64 or float32; the coarsest of them sets the defaults.
        eps: half the step, in units of the input, > 0. Default: 6.1e-6 in float64, 4.9e-3 in float32.
        atol: absolute tolerance, > 0: makes the floor atol / rtol. Default: the floor above.
        rtol: largest relative error that passes, > 0. Default: 1e-7 in float64, 1e-2 in float32.
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
            state |= {name[10:]: t for name, t in tensors.items() if name.startswith("parameter ")}
            result = torch.func.functional_call(self.func, state, arguments)
        else:
            result = self.func(*arguments)
        leaves = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        numbers = [t for t in leaves if t.is_floating_point() or t.is_complex()]
        return [t for t in numbers if t.requires_grad] or numbers

    def forward(self) -> list[Tensor]:
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
        return outputs

    def backward(self, outputs: list[Tensor], covector: Tensor) -> dict[str, Tensor]:
        """Return the gradients of <covector, outputs> in float64, zeros where autograd gives None."""
        tensors = [self.tensors[name] for name in self.checked]
        parts = covector.clone().split([t.numel() for t in outputs])
        dy = [part.view(t.shape).to(t) for part, t in zip(parts, outputs)]
        found: tuple[Tensor | None, ...] = (None,) * len(tensors)
        try:
            if outputs[0].requires_grad:
                found = torch.autograd.grad(outputs, tensors, dy, allow_unused=True)
        except RuntimeError as error:
            names = ", ".join(name for name in self.checked if self.fails_alone(name))
            raise GradcheckError(f"backward to {names} raised: {error}") from error
        self.require_unaltered("its backward")
        if not torch.equal(_flat(dy), covector):
            raise GradcheckError("backward altered the gradient it was given in place; compute out of place.")
        dense = (torch.zeros_like(t) if g is None else g.to_dense() for g, t in zip(found, tensors))
        return {name: g.to("cpu", torch.float64) for name, g in zip(self.checked, dense)}

    def fails_alone(self, name: str) -> bool:
        """True if backward raises where no other tensor requires grad."""
        for other in self.checked:
            self.tensors[other].requires_grad_(other == name)
        outputs = [t for t in self.outputs(self.tensors) if t.requires_grad]
        with contextlib.suppress(RuntimeError):
            torch.autograd.grad([t.sum() for t in outputs], self.tensors[name], allow_unused=True)
            return False
        return bool(outputs)

    def require_unaltered(self, culprit: str) -> None:
        for name, t in self.originals.items():
            if t.layout is torch.strided and ((self.tensors[name] != t) & (t == t)).any():
                raise GradcheckError(f"{name} was altered in place by {culprit}; compute out of place, or on a clone.")


def _check(
    call: _Call, eps: float | None, atol: float | None, rtol: float | None, nondet_tol: float
) -> GradcheckReport:
    outputs = call.forward()
    dtypes = [t.dtype for t in outputs] + [call.tensors[name].dtype for name in call.checked]
    dtype = torch.float32 if torch.float32 in dtypes else torch.float64
    eps, rtol = eps or torch.finfo(dtype).eps ** (1 / 3), rtol or _RTOL[dtype]
    covector = _covector(sum(t.numel() for t in outputs), dtype)
    gradients = call.backward(outputs, covector)
    again = call.forward()
    _require_equal("the outputs of two forward passes", _flat(outputs), _flat(again), nondet_tol)
    for name, repeated in call.backward(again, covector).items():
        _require_equal(f"the gradients of {name} in two backward passes", gradients[name], repeated, nondet_tol)
    rows = []
    for name, analytic in gradients.items():
        numeric, floor = _central_differences(call, name, eps, covector)
        floor = floor if atol is None else torch.full_like(floor, atol / rtol)
        rows.append(_compare(name, analytic, numeric, floor, rtol, dtype))
    worst = max((row for row in rows if row.failure), key=lambda row: row.error, default=GradcheckRow("", ()))
    return GradcheckReport(tuple(rows), eps, rtol, worst.failure)


def _central_differences(call: _Call, name: str, eps: float, covector: Tensor) -> tuple[Tensor, Tensor]:
    """eq. 17 for every entry of one tensor, and the default floor."""
    centre = call.tensors[name].detach().clone()
    step = (centre.abs() + eps) - centre.abs()  # what an entry can hold of eps, the same in both directions
    if not step.all():
        raise ValueError(
            f"gradcheck: eps must be large enough to change every entry of {name}, got {eps:.1e} for {centre.dtype} "
            f"entries up to {centre.abs().max():.1e}; pass a larger eps, or scale the tensor."
        )
    upper, lower = centre + step, centre - step
    point = centre.clone().requires_grad_()

    def terms(index: tuple[int, ...], value: Tensor) -> Tensor:
        with torch.no_grad():
            point[index] = value
        return covector * _flat(call.outputs(call.tensors | {name: point}))

    numeric, size = torch.zeros(2, *centre.shape, dtype=torch.float64, device="cpu")
    for index in itertools.product(*map(range, centre.shape)):
        above, below = terms(index, upper[index]), terms(index, lower[index])
        with torch.no_grad():
            point[index] = centre[index]
        numeric[index] = (above - below).sum() / (upper[index].double() - lower[index].double()).item()
        size[index] = torch.maximum(above.norm(), below.norm())
    return numeric, _FLOOR * torch.maximum(size, numeric.abs().max()) if numeric.numel() else size


def _compare(
    name: str, analytic: Tensor, numeric: Tensor, floor: Tensor, rtol: float, dtype: torch.dtype
) -> GradcheckRow:
    shape = tuple(numeric.shape)
    if not numeric.numel():
        return GradcheckRow(name, shape)
    difference = (analytic - numeric).abs()
    errors = difference / torch.maximum(analytic.abs(), numeric.abs()).maximum(floor)
    errors = errors.where(difference != 0, 0.0).nan_to_num(torch.inf, torch.inf)
    index = tuple(int(i) for i in torch.unravel_index(errors.argmax(), shape))
    error, a, n = (t[index].item() for t in (errors, analytic, numeric))
    failure = ""
    if error > rtol:
        failure = (
            f"the gradient of {name} at index {index} is {a:.6g} (analytic) but should be {n:.6g} (numeric), relative "
            f"error {error:.1e}, tolerance {rtol:.0e}: {_cause(analytic, numeric, rtol)}"
        )
    elif dtype is torch.float64 and _rounded(analytic):
        failure = f"the gradient of {name} holds float32 numbers only; its backward must keep torch.float64."
    return GradcheckRow(name, shape, error, index, a, n, failure)


def _cause(analytic: Tensor, numeric: Tensor, rtol: float) -> str:
    """What the tensor as a whole tells about the error."""
    if not numeric.isfinite().all():
        return "the function is NaN or infinite within eps of the point; move the point."
    if not analytic.any():
        return "autograd gives None or zeros, yet the output depends on it; look for detach, .data or a returned None."
    ratio = ((analytic * numeric).sum() / numeric.square().sum()).item()
    if abs(ratio - 1) > rtol and (analytic - ratio * numeric).abs().max() <= rtol * numeric.abs().max():
        return f"it is {ratio:.4g} times the numeric gradient in every entry."
    return "correct backward; but if the function has a kink within eps of the point, move the point."


def _rounded(gradient: Tensor) -> bool:
    """True if the gradient passed through float32: after a random float64 co-vector that is no coincidence."""
    entries = gradient[gradient != 0]
    return entries.numel() > 0 and torch.equal(entries.float().double(), entries)


def _require_equal(what: str, first: Tensor, second: Tensor, nondet_tol: float) -> None:
    if first.shape != second.shape or ((first - second).abs() > nondet_tol).any():
        raise GradcheckError(
            f"not deterministic: {what} differ by more than nondet_tol={nondet_tol}. Call module.eval() if it has "
            "dropout, or fix the random seed inside the function."
        )


def _require_supported(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _RTOL or tensor.layout is not torch.strided:
        raise ValueError(
            f"gradcheck: {name} must be dense and of torch.float64 or torch.float32, got {tensor.dtype} and "
            f"{tensor.layout}. Use torch.autograd.gradcheck for complex or sparse tensors, .double() for half precision."
        )


def _copy(tensor: Tensor) -> Tensor:
    """Copy with strides and offset, so that an expanded or sliced input remains one."""
    plain = tensor.detach()
    if plain.layout is not torch.strided or type(plain) is not Tensor:
        return plain.clone()
    plain = plain.resolve_conj().resolve_neg()
    storage = plain.untyped_storage().clone()
    return plain.new_empty(0).set_(storage, plain.storage_offset(), plain.shape, plain.stride())


def _covector(size: int, dtype: torch.dtype) -> Tensor:
    """Numbers of `dtype` in 0.5 to 2 of either sign: none vanishes, none is a power of 2."""
    fixed = torch.Generator("cpu").manual_seed(0)
    magnitude = torch.empty(size, dtype=torch.float64, device="cpu").uniform_(0.5, 2, generator=fixed)
    sign = torch.randint(0, 2, (size,), generator=fixed, device="cpu") * 2 - 1
    return (sign * magnitude).to(dtype).double()


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).to("cpu", torch.float64) for t in tensors])
