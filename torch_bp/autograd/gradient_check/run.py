"""One check of one subject, in its precision: the order of things, and the verdict."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.autograd.gradcheck import GradcheckError

from torch_bp.autograd.gradient_check import mode
from torch_bp.autograd.gradient_check.comparison import compare
from torch_bp.autograd.gradient_check.contract import Contract, require_repeatable
from torch_bp.autograd.gradient_check.example import another_number, few_examples
from torch_bp.autograd.gradient_check.options import Options
from torch_bp.autograd.gradient_check.passes import Passes, require_supported
from torch_bp.autograd.gradient_check.report import GradcheckReport, GradcheckRow
from torch_bp.autograd.gradient_check.slope import Signal, Slopes
from torch_bp.autograd.gradient_check.subject import Subject, largest


def run(subject: Subject, options: Options) -> tuple[GradcheckReport, Signal | None]:
    """Return the report, and the gradients of the first backward if there is one."""
    if not subject.checked:
        raise ValueError(
            "gradcheck expects at least one input tensor to require gradient, but none of them have requires_grad=True."
        )
    for name in subject.checked:
        require_supported(name, subject.tensors[name])
    try:
        with torch.random.fork_rng(subject.devices), torch.enable_grad():
            return _check(subject, options)
    except GradcheckError as error:
        return GradcheckReport(failure=str(error)), None


def _check(subject: Subject, options: Options) -> tuple[GradcheckReport, Signal | None]:
    passes = Passes(subject)
    slopes = Slopes(subject, passes.values, passes.dtype, options.eps, options.rtol, options.atol)
    rows: tuple[GradcheckRow, ...] = ()
    failure, signal = "", None
    if options.check_backward_ad:
        signal = passes.signal()
        require_repeatable(passes, options.nondet_tol)
        contract = Contract(passes, signal, options.nondet_tol)
        if not options.check_contract:
            contract.repeat()
        rows = tuple(compare(slopes, name, signal, passes.masked, options.full) for name in subject.checked)
        if options.check_grad_dtypes:
            rows = tuple(_with_dtype(row, signal, passes) for row in rows)
        worst = max((row for row in rows if row.failure), key=lambda row: row.error, default=None)
        if worst:
            contract.repeat()
        failure = worst.failure if worst else _owed(contract, options)
    failure = failure or _other_modes(passes, slopes, signal, options)
    if not failure:
        subject.require_unaltered("the function or its backward", thorough=True)
    return GradcheckReport(rows, slopes.eps, slopes.rtol, failure), signal


def _owed(contract: Contract, options: Options) -> str:
    """Return what the contract finds."""
    if not any(t.requires_grad for t in contract.passes.outputs):
        return ""
    try:
        if options.check_contract:
            contract.choose(few_examples(contract.passes))
            contract.require_linear()
            if contract.few is None:
                another_number(contract.passes, options)
        if options.check_undefined_grad:
            contract.undefined()
    except GradcheckError as error:
        return str(error)
    return ""


def _other_modes(passes: Passes, slopes: Slopes, signal: Signal | None, options: Options) -> str:
    try:
        if options.check_forward_ad:
            mode.check_forward(passes, slopes, signal)
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
    # few digits are left of what is 0 but for rounding
    size = max((signal.covector * passes.values).norm().item() / 20, 1e9 * torch.finfo(torch.float64).eps)
    # after a random float64 co-vector, entries above the rounding error that all fit float32 are no coincidence
    for few in (gradient[:256], gradient):
        entries = few[few.abs() > 1e-6 * max(size, largest(few))]
        if len(entries) and not entries.equal(entries.float().double()):
            return row
    if not len(entries):
        return row
    return replace(row, failure=f"the gradient of {row.name} holds float32 numbers only; backward must keep float64.")
