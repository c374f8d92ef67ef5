"""In which precision a gradient is checked: double where the function runs there, and its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from torch_bp.autograd.gradient_check.comparison import ratio_of
from torch_bp.autograd.gradient_check.options import Options
from torch_bp.autograd.gradient_check.passes import Passes
from torch_bp.autograd.gradient_check.report import GradcheckReport
from torch_bp.autograd.gradient_check.run import run
from torch_bp.autograd.gradient_check.slope import PRECISION, Signal
from torch_bp.autograd.gradient_check.subject import Subject


def in_precision(make: Callable[[bool], Subject], options: Options, precise: bool) -> GradcheckReport:
    """Check in double precision, and as it is where the function cannot run there, or leaves it by itself.

    Where it can, one backward in its own precision is compared with that in double.
    """
    subject = make(precise)
    try:
        report, signal = run(subject, options)
    except (RuntimeError, TypeError) as error:
        if not subject.promoted:
            raise
        report, _ = run(make(False), options)
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__
        return replace(report, notes=(f"checked as it is: it does not run in double precision ({reason})",))
    if subject.promoted and not report and "float32 numbers only" in report.failure:
        report, _ = run(make(False), options)
        return replace(report, notes=("checked as it is: it computes in single precision also on double",))
    if subject.promoted and report and signal is not None and options.check_contract:
        return replace(report, failure=_as_it_is(make(False), signal, options))
    return report


def _as_it_is(subject: Subject, signal: Signal, options: Options) -> str:
    """Return what is wrong with a backward that is right in double precision; nothing if it does not run.

    Where its gradient is far from that in double, differences in its own precision decide: they know about rounding.
    """
    try:
        with torch.random.fork_rng(subject.devices), torch.enable_grad():
            passes = Passes(subject)
            found = passes.backward(passes.outputs, signal.covector.to(passes.dtype).double())
    except GradcheckError as error:
        if not isinstance(error.__cause__, RuntimeError) or isinstance(error.__cause__, NotImplementedError):
            return ""
        return f"in the precision of the inputs: {error}"
    except Exception:  # of what has no kernel in this precision, or an outcome of its own: double precision will do
        return ""
    usual = PRECISION[passes.dtype][1]
    if all(_near(found[name], right, usual) for name, right in signal.gradients.items()):
        return ""
    kinds = " and ".join(sorted({str(subject.tensors[name].dtype) for name in subject.checked}))
    for name, right in signal.gradients.items():
        ratio = ratio_of(found[name], right, usual / 100)
        # rounding has no one factor, but over one or two numbers
        if ratio and abs(ratio) > 1e-3 and abs(ratio - 1) > usual and right.count_nonzero() > 2:
            return f"in {kinds} the gradient of {name} is {ratio:.4g} times that in double precision."
    report, _ = run(subject, replace(options, check_contract=False, check_undefined_grad=False))
    return f"in {kinds}: {report.failure}" if report.failure else ""


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())
