"""Gradient checking, sec. 10.1: the gradient that backward computes against central differences, eq. 17.

Differences are those of `slope`, the other checks those of `contract` and `mode`; f runs in double precision, unless it
is asked to run as it is. Sums are float64. Rounding costs about u |f| / eps, with u the machine epsilon, and truncation
eps^2 |f'''| / 6: least together near the cube root of u. In float64 that leaves 1e-10, hence the tolerance 1e-7; in
float32 a smaller eps, to cross fewer kinks, leaves 1e-3, hence 1e-2. (Sec. 10.1 has the precisions exchanged: its 1e-7
is out of reach in single precision.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd.gradcheck import GradcheckError

from torch_bp.autograd.gradient_check import sparse
from torch_bp.autograd.gradient_check.options import Options
from torch_bp.autograd.gradient_check.precision import in_precision
from torch_bp.autograd.gradient_check.report import GradcheckReport
from torch_bp.autograd.gradient_check.subject import Gradient, Subject


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
            or the outputs are sparse, torch's own check runs instead, with the options that it knows.
        eps: half the step of eq. 17, in units of the input, > 0. Default: 6e-6 in float64, 1e-3 in float32.
        atol: absolute tolerance, >= 0: relative errors are then relative to atol / rtol at the least. Default: to 1/20
            of the norm of the outputs, and to the norm of what is summed up for a slope.
        rtol: largest relative error that passes, >= 0. Default: 1e-7 in float64, 1e-2 in float32.
        raise_exception: raise if the check fails (default), else return a report that is false.
        nondet_tol: how much the outputs and gradients of two equal runs may differ, >= 0. Default: 0.
        check_undefined_grad: run backward with no gradient from above, for all outputs and for each.
        check_grad_dtypes: refuse gradients in double precision that hold single-precision numbers only.
        check_batched_grad: compare gradients of several signals by `vmap` with those one by one.
        check_batched_forward_grad: the same in forward mode.
        check_forward_ad: compare forward mode with differences, too.
        check_backward_ad: compare backward with them. Default: True.
        fast_mode: torch's word for the opposite of `full`.
        masked: for sparse inputs and outputs, torch's option.
        full: compare entry by entry, two forward passes each: the report has the worst entry also where all is well.
        precise: run on copies in double precision. False: as they are. A function that does not run in double
            precision, or returns to single inside, runs as it is, and a note of the report says so.
        check_contract: check also what `contract` lists: layouts of the gradient from above, subsets of the tensors
            that require grad, part of the batch; and one backward in the precision that the inputs have.
            Default: True. The function is called with fewer examples then, too: False for one that would read out of
            bounds, as a kernel may that takes their number from elsewhere.

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
    if not (check_backward_ad or check_forward_ad):
        raise ValueError("gradcheck: one of check_backward_ad and check_forward_ad must be True, got neither.")
    options = Options.of(locals())
    return _reported(
        lambda: sparse.gradcheck(func, inputs, options),
        lambda: in_precision(lambda double: Subject(func, inputs, double), options, precise),
        sparse.is_sparse(inputs),
        raise_exception,
    )


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
    if not (check_fwd_over_rev or check_rev_over_rev):
        raise ValueError("gradgradcheck: one of check_fwd_over_rev and check_rev_over_rev must be True, got neither.")
    options = Options.of(
        locals(), check_forward_ad=check_fwd_over_rev, check_backward_ad=check_rev_over_rev, check_contract=False
    )
    made = Gradient.asked(func, inputs, grad_outputs, gen_non_contig_grad_outputs)
    return _reported(
        lambda: sparse.gradgradcheck(func, inputs, options, grad_outputs, gen_non_contig_grad_outputs),
        lambda: in_precision(made, options, precise),
        sparse.is_sparse(inputs),
        raise_exception,
    )


def _reported(
    by_torch: Callable[[], GradcheckReport], by_us: Callable[[], GradcheckReport], is_sparse: bool, raising: bool
) -> GradcheckReport:
    """Let torch check what is sparse, on either side of the function."""
    try:
        report = by_torch() if is_sparse else by_us()
    except sparse.SparseOutputError:
        report = by_torch()
    if raising and not report:
        raise GradcheckError(str(report))
    return report
