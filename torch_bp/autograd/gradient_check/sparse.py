"""Sparse inputs and outputs: torch's own checks, which know what `masked` means, with the report of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from torch_bp.autograd.gradient_check.options import Options
from torch_bp.autograd.gradient_check.report import GradcheckReport

_NOTE = "checked by torch.autograd: sparse; parameters of a module are not looked at"


class SparseOutputError(ValueError):
    """An output is sparse: its slopes depend on what `masked` says."""


def is_sparse(inputs: Any) -> bool:
    """True if one of the tensors to check is not dense."""
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return any(isinstance(t, Tensor) and t.requires_grad and t.layout is not torch.strided for t in given)


def gradcheck(func: Callable[..., Any], inputs: Any, options: Options) -> GradcheckReport:
    """Run `torch.autograd.gradcheck` with the options that it knows."""
    return _reported(
        torch.autograd.gradcheck,
        options,
        func,
        inputs,
        masked=options.masked,
        check_batched_forward_grad=options.check_batched_forward_grad,
        check_forward_ad=options.check_forward_ad,
        check_backward_ad=options.check_backward_ad,
    )


def gradgradcheck(
    func: Callable[..., Any], inputs: Any, options: Options, grad_outputs: Any, strided: bool
) -> GradcheckReport:
    """Run `torch.autograd.gradgradcheck` with the options that it knows."""
    return _reported(
        torch.autograd.gradgradcheck,
        options,
        func,
        inputs,
        grad_outputs,
        masked=bool(options.masked),
        gen_non_contig_grad_outputs=strided,
        check_fwd_over_rev=options.check_forward_ad,
        check_rev_over_rev=options.check_backward_ad,
    )


def _reported(check: Callable[..., bool], options: Options, *arguments: Any, **more: Any) -> GradcheckReport:
    """Return what torch's check says; numbers that nobody gave are torch's."""
    given = {"eps": options.eps, "atol": options.atol, "rtol": options.rtol}
    numbers = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3} | {k: v for k, v in given.items() if v is not None}
    failure = ""
    try:
        check(
            *arguments,
            **numbers,
            nondet_tol=options.nondet_tol,
            check_undefined_grad=options.check_undefined_grad,
            check_grad_dtypes=options.check_grad_dtypes,
            check_batched_grad=options.check_batched_grad,
            fast_mode=not options.full,
            **more,
        )
    except GradcheckError as error:
        failure = str(error)
    return GradcheckReport((), numbers["eps"], numbers["rtol"], failure, (_NOTE,))
