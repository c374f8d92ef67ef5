"""A pytest plugin: the fixture `gradcheck`, which fails a test with the report of the check.

It is loaded by itself where torch_bp is installed, else by `pytest_plugins = ["torch_bp.pytest_plugin"]` in a
`conftest.py`. Loading it imports neither torch nor the rest of torch_bp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def gradcheck() -> Callable[..., Any]:
    """Return `check(func, inputs, second=False, **options)`: `torch_bp.autograd.gradcheck`, as an assertion.

    With `second=True` second derivatives are checked, too. Inputs of real or complex numbers that do not require grad
    are checked as if they did, if none of them does. Returns the report.
    """
    return _check


def _check(func: Callable[..., Any], inputs: Any, *, second: bool = False, **options: Any) -> Any:
    __tracebackhide__ = True
    from torch_bp.autograd import gradcheck, gradgradcheck

    given = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not any(getattr(value, "requires_grad", False) for value in given):
        given = tuple(_requiring(value) for value in given)
    report = gradcheck(func, given, raise_exception=False, **options)
    if not report:
        pytest.fail(str(report), pytrace=False)
    if second:
        again = gradgradcheck(func, given, raise_exception=False)
        if not again:
            pytest.fail(f"second derivatives: {again}", pytrace=False)
    return report


def _requiring(value: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.detach().clone().requires_grad_()
