"""Gradient checking, sec. 10.1: the gradient that backward computes against central differences, eq. 17.

Differences are those of `slope`, the other checks those of `contract` and `mode`; f runs in double precision, unless it
is asked to run as it is. Sums are float64. Rounding costs about u |f| / eps, with u the machine epsilon, and truncation
eps^2 |f'''| / 6: least together near the cube root of u. In float64 that leaves 1e-10, hence the tolerance 1e-7; in
float32 a smaller eps, to cross fewer kinks, leaves 1e-3, hence 1e-2. (Sec. 10.1 has the precisions exchanged: its 1e-7
is out of reach in single precision.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from torch_bp.autograd.gradient_check import mode
from torch_bp.autograd.gradient_check.comparison import compare
from torch_bp.autograd.gradient_check.contract import Contract, few_examples, require_repeatable
from torch_bp.autograd.gradient_check.passes import Passes, require_supported
from torch_bp.autograd.gradient_check.report import GradcheckReport, GradcheckRow
from torch_bp.autograd.gradient_check.slope import Signal, Slopes
from torch_bp.autograd.gradient_check.subject import Gradient, Subject

_Option = float | None


@dataclass(frozen=True)
class Options:
    """What the check does, by torch's names."""

    eps: _Option = None
    atol: _Option = None
    rtol: _Option = None
    nondet_tol: float = 0.0
    check_undefined_grad: bool = True
    check_grad_dtypes: bool = True
    check_batched_grad: bool = False
    check_batched_forward_grad: bool = False
    check_forward_ad: bool = False
    check_backward_ad: bool = True
    check_contract: bool = True
    full: bool = False


def gradcheck(
    func: Callable[..., Any],
    inputs: Any,
    *,
    eps: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = True,
    check_batched_grad: bool = False,
    check_batched_forward_grad: bool = False,
    check_forward_ad: bool = False,
    check_backward_ad: bool = True,
    fast_mode: bool | None = None,
    masked: bool | None = None,
    full: bool = False,
    precise: bool = True,
    check_contract: bool = True,
) -> GradcheckReport:
    """Check the gradients of a function, a module or an autograd Function by eq. 17, central differences.

    As `torch.autograd.gradcheck`, but that a module's parameters are checked too, that one direction at random is
    compared for each tensor (two forward passes each), that float32 will do, that kinks raise no alarm, and that the
    report names what is wrong. Everything runs on copies: inputs, parameters, buffers, `.grad` and torch's random state
    are unchanged afterwards, and each pass sees the buffers as they are now. What a function captures is neither copied
    nor checked: pass a module itself, not a lambda around it.

    At a kink (ReLU at 0, max at a tie) no slope is right. Directions along which the function has one *at* the point
    are dropped and counted, and others tried; where none is left, the check fails and says so. Kinks near the point are
    avoided by smaller steps.

    Args:
        func: a function, a module, an autograd Function or its `apply`. Takes `*inputs`, returns a tensor, or tensors
            in tuples, lists or dicts. If some outputs require grad, those that do not are ignored.
        inputs: a tensor or a tuple. Tensors that require grad are checked, everything else is passed on. Where they
            are sparse, torch's own check runs instead, with the options that it knows.
        eps: half the step of eq. 17, in units of the input, > 0. Default: 6e-6 in float64, 1e-3 in float32.
        atol: absolute tolerance, > 0: relative errors are then relative to atol / rtol at the least. Default: to 1/20
            of the norm of the outputs, and to the norm of what is summed up for a slope.
        rtol: largest relative error that passes, > 0. Default: 1e-7 in float64, 1e-2 in float32.
        raise_exception: raise if the check fails (default), else return a report that is false.
        nondet_tol: how much the outputs and gradients of two equal runs may differ, >= 0. Default: 0.
        check_undefined_grad: run backward with no gradient from above, for all outputs and for each.
        check_grad_dtypes: refuse gradients in double precision that hold single-precision numbers only.
        check_batched_grad: compare gradients of several signals by `vmap` with those one by one.
        check_batched_forward_grad: the same in forward mode.
        check_forward_ad: compare forward mode with differences, too.
        check_backward_ad: compare backward with them. Default: True.
        fast_mode: torch's word for the opposite of `full`.
        masked: for sparse inputs, torch's option.
        full: compare entry by entry, two forward passes each: the report has the worst entry also where all is well.
        precise: run on copies in double precision. False: as they are. A function that does not run in double
            precision, or returns to single inside, runs as it is, and a note of the report says so.
        check_contract: check also what `contract` lists: layouts of the gradient from above, subsets of the tensors
            that require grad, part of the batch. Default: True.

    Returns:
        A report, true if all is well, with a row for each tensor.

    Raises:
        torch.autograd.gradcheck.GradcheckError: a gradient is wrong, None although the output depends on the tensor,
            or rounded to float32; backward fails; an output is not finite; two runs differ; a tensor is altered.
        ValueError: nothing requires grad; an option, dtype or layout is not supported; eps is lost in rounding.

    Example:
        >>> import torch
        >>> from torch_bp.autograd import gradcheck
        >>> x = torch.ones(4, 3, requires_grad=True)
        >>> report = gradcheck(torch.nn.Linear(3, 2), x)
        >>> bool(report), [row.name for row in report.rows]
        (True, ['input 0', 'parameter weight', 'parameter bias'])
        >>> gradcheck(lambda x: x * x.detach(), x, raise_exception=False).failure.split(": ")[-1]
        'it is 0.5 times the numeric gradient in every entry.'
    """
    if full and fast_mode:
        raise ValueError("gradcheck: full must be False with fast_mode=True, got True; leave one of them out.")
    if not (check_backward_ad or check_forward_ad):
        raise ValueError("gradcheck: one of check_backward_ad and check_forward_ad must be True, got neither.")
    options = Options(
        eps=eps,
        atol=atol,
        rtol=rtol,
        nondet_tol=nondet_tol,
        check_undefined_grad=check_undefined_grad,
        check_grad_dtypes=check_grad_dtypes,
        check_batched_grad=check_batched_grad,
        check_batched_forward_grad=check_batched_forward_grad,
        check_forward_ad=check_forward_ad,
        check_backward_ad=check_backward_ad,
        check_contract=check_contract,
        full=full or fast_mode is False,
    )
    if _is_sparse(inputs):
        report = _by_torch(func, inputs, options, masked)
    else:
        report = _in_precision(lambda precise: Subject(func, inputs, precise), options, precise)
    if raise_exception and not report:
        raise GradcheckError(str(report))
    return report


def gradgradcheck(
    func: Callable[..., Any],
    inputs: Any,
    grad_outputs: Any = None,
    *,
    eps: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    gen_non_contig_grad_outputs: bool = False,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = True,
    check_batched_grad: bool = False,
    check_fwd_over_rev: bool = False,
    check_rev_over_rev: bool = True,
    fast_mode: bool | None = None,
    masked: bool = False,
    full: bool = False,
    precise: bool = True,
) -> GradcheckReport:
    """Check second derivatives: `gradcheck` of the gradient, as a function of the tensors and of what comes from above.

    As `torch.autograd.gradgradcheck`, with the differences that `gradcheck` has from torch's, and its options.

    Args:
        grad_outputs: a tensor or a tuple, one for each output that requires grad. Default: at random.
        gen_non_contig_grad_outputs: make those at random non-contiguous.
        check_fwd_over_rev: compare forward mode through backward with differences, too.
        check_rev_over_rev: compare backward through backward with them. Default: True.

    Raises:
        torch.autograd.gradcheck.GradcheckError, ValueError: as `gradcheck`.

    Example:
        >>> import torch
        >>> from torch_bp.autograd import gradgradcheck
        >>> report = gradgradcheck(torch.tanh, torch.ones(3, requires_grad=True))
        >>> [row.name for row in report.rows]
        ['input 0', 'grad_output 0']
    """
    if full and fast_mode:
        raise ValueError("gradgradcheck: full must be False with fast_mode=True, got True; leave one of them out.")
    if not (check_fwd_over_rev or check_rev_over_rev):
        raise ValueError("gradgradcheck: one of check_fwd_over_rev and check_rev_over_rev must be True, got neither.")
    if _is_sparse(inputs):
        raise ValueError("gradgradcheck: inputs must be dense, got sparse ones; use torch.autograd.gradgradcheck.")
    options = Options(
        eps=eps,
        atol=atol,
        rtol=rtol,
        nondet_tol=nondet_tol,
        check_undefined_grad=check_undefined_grad,
        check_grad_dtypes=check_grad_dtypes,
        check_batched_grad=check_batched_grad,
        check_forward_ad=check_fwd_over_rev,
        check_backward_ad=check_rev_over_rev,
        check_contract=False,
        full=full or fast_mode is False,
    )

    def subject(precise: bool) -> Subject:
        return Gradient.of(Subject(func, inputs, precise), grad_outputs, gen_non_contig_grad_outputs)

    report = _in_precision(subject, options, precise)
    if raise_exception and not report:
        raise GradcheckError(str(report))
    return report


def _in_precision(make: Callable[[bool], Subject], options: Options, precise: bool) -> GradcheckReport:
    """Check in double precision, and as it is where the function cannot run there, or leaves it by itself."""
    for name in ("eps", "atol", "rtol"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(
                f"gradcheck: eps, atol and rtol must be > 0, got {options.eps}, {options.atol} and {options.rtol}."
            )
    subject = make(precise)
    try:
        report = _run(subject, options)
    except (RuntimeError, TypeError) as error:
        if not subject.promoted:
            raise
        report = _run(make(False), options)
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__
        return replace(report, notes=(f"checked as it is: it does not run in double precision ({reason})",))
    if subject.promoted and not report and "float32 numbers only" in report.failure:
        report = _run(make(False), options)
        return replace(report, notes=("checked as it is: it computes in single precision also on double",))
    return report


def _run(subject: Subject, options: Options) -> GradcheckReport:
    _require_checkable(subject)
    devices = {t.device for t in subject.tensors.values() if t.is_cuda}
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            return _check(subject, options)
    except GradcheckError as error:
        return GradcheckReport(failure=str(error))


def _check(subject: Subject, options: Options) -> GradcheckReport:
    passes = Passes(subject)
    slopes = Slopes(subject, passes.values, passes.dtype, options.eps, options.rtol, options.atol)
    rows: tuple[GradcheckRow, ...] = ()
    failure = ""
    if options.check_backward_ad:
        signal = passes.signal()
        require_repeatable(passes, options.nondet_tol)
        contract, given = _on_few(passes, signal, options)
        contract.backward_again("non-contiguous" if options.check_contract else "dense")
        rows = tuple(compare(slopes, name, signal, passes.masked, options.full) for name in subject.checked)
        if options.check_grad_dtypes:
            rows = tuple(_with_dtype(row, signal, passes) for row in rows)
        worst = max((row for row in rows if row.failure), key=lambda row: row.error, default=GradcheckRow("", ()))
        failure = worst.failure or given or _owed(contract, options)
    failure = failure or _other_modes(passes, slopes, options)
    return GradcheckReport(rows, slopes.eps, slopes.rtol, failure)


def _on_few(passes: Passes, signal: Signal, options: Options) -> tuple[Contract, str]:
    """Return the contract of few examples, if they will do, and what is wrong if they do not.

    That the gradient of one example changes with others says less than which gradient is wrong.
    """
    if options.check_contract:
        try:
            return Contract(*few_examples(passes, signal), options.nondet_tol), ""
        except GradcheckError as error:
            return Contract(passes, signal, options.nondet_tol), str(error)
    return Contract(passes, signal, options.nondet_tol), ""


def _owed(contract: Contract, options: Options) -> str:
    """Return what the rest of the contract finds."""
    outputs = contract.passes.outputs
    if not any(t.requires_grad for t in outputs):
        return ""
    try:
        if options.check_contract:
            contract.ones(outputs)
        if options.check_undefined_grad:
            contract.undefined(outputs)
    except GradcheckError as error:
        return str(error)
    return ""


def _other_modes(passes: Passes, slopes: Slopes, options: Options) -> str:
    try:
        if options.check_forward_ad:
            mode.check_forward(passes, slopes)
        if options.check_batched_forward_grad:
            mode.check_batched_forward(passes, slopes)
        if options.check_batched_grad:
            mode.check_batched(passes)
    except GradcheckError as error:
        return str(error)
    return ""


def _with_dtype(row: GradcheckRow, signal: Signal, passes: Passes) -> GradcheckRow:
    """Refuse a gradient that is double by name only."""
    gradient = signal.gradients[row.name]
    if passes.dtype is not torch.float64 or not len(gradient) or row.error > 1e-4:
        return row
    rounding = 1e-6 * max(
        torch.linalg.vector_norm(gradient, torch.inf).item(), (signal.covector * passes.values).norm().item() / 20
    )
    # after a random float64 co-vector, entries above the rounding error that all fit float32 are no coincidence
    for few in (gradient[:256], gradient):
        entries = few[few.abs() > rounding]
        if len(entries) and not entries.equal(entries.float().double()):
            return row
    if not len(entries):
        return row
    return replace(row, failure=f"the gradient of {row.name} holds float32 numbers only; backward must keep float64.")


def _require_checkable(subject: Subject) -> None:
    if not subject.checked:
        raise ValueError(
            "gradcheck expects at least one input tensor to require gradient, but none of them have requires_grad=True."
        )
    for name in subject.checked:
        require_supported(name, subject.tensors[name])


def _is_sparse(inputs: Any) -> bool:
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return any(isinstance(t, Tensor) and t.requires_grad and t.layout is not torch.strided for t in given)


def _by_torch(func: Callable[..., Any], inputs: Any, options: Options, masked: bool | None) -> GradcheckReport:
    """Let torch check what is sparse."""
    eps, atol, rtol = options.eps or 1e-6, options.atol or 1e-5, options.rtol or 1e-3
    try:
        torch.autograd.gradcheck(
            func,
            inputs,
            eps=eps,
            atol=atol,
            rtol=rtol,
            nondet_tol=options.nondet_tol,
            check_undefined_grad=options.check_undefined_grad,
            check_batched_grad=options.check_batched_grad,
            check_batched_forward_grad=options.check_batched_forward_grad,
            check_forward_ad=options.check_forward_ad,
            check_backward_ad=options.check_backward_ad,
            fast_mode=not options.full,
            masked=masked,
        )
    except GradcheckError as error:
        return GradcheckReport((), eps, rtol, str(error), ("checked by torch.autograd.gradcheck: sparse",))
    return GradcheckReport((), eps, rtol, "", ("checked by torch.autograd.gradcheck: sparse",))
