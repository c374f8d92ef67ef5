"""`common_methods_invocations.op_db`: what torch feeds the functions behind its modules, in every dtype they take."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db

import torch_bp.nn.functional as ours
from tests.conformance.comparison import assert_alike, behaviour, failure, wide
from tests.conformance.group import CLASSES, Group

INPUTS, ERRORS = "operator inputs", "operator errors"
SPELLED_OTHERWISE = {
    "batch_norm": "BatchNorm1d",
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "cross_entropy": "CrossEntropyLoss",
}


def class_of(function: str) -> str | None:
    """The class that is this function of `nn.functional`."""
    plain = function.replace("_", "")
    return SPELLED_OTHERWISE.get(function) or next((name for name in CLASSES if name.lower() == plain), None)


def groups() -> Iterator[Group]:
    """For every function its inputs by dtype, and its error inputs."""
    for info in op_db:
        function = info.name.removeprefix("nn.functional.")
        name = class_of(function)
        if name is None:
            continue
        pair, variant = _pair(function), f" {info.variant_test_name}".rstrip()
        for dtype in sorted(info.supported_dtypes("cpu"), key=str):
            yield Group(name, INPUTS, f"{dtype}{variant}", partial(_inputs, info, pair, dtype))
        if info.error_inputs_func is not None:
            yield Group(name, ERRORS, f"any{variant}", partial(_errors, info, pair))


def _pair(function: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Ours, found when it is called, and torch's; `op_db` has dropout with a seed inside, which would hide ours."""
    return lambda *a, **k: getattr(ours, function)(*a, **k), getattr(torch.nn.functional, function)


def _inputs(info: Any, pair: tuple[Any, Any], dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    differentiable = dtype in info.supported_backward_dtypes("cpu")
    for number, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=differentiable)):
        yield f"{number} {sample.summary()}", partial(_check, *pair, sample)


def _check(mine: Callable[..., Any], theirs: Callable[..., Any], sample: Any) -> None:
    given = sample.input, sample.args, sample.kwargs
    assert_alike(_run(mine, given), _run(theirs, given), lambda: _run(theirs, wide(given)))


def _run(function: Callable[..., Any], given: tuple[Any, Any, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    input, args, kwargs = given
    return behaviour(function, input, *args, **kwargs)


def _errors(info: Any, pair: tuple[Any, Any]) -> Iterator[tuple[str, Any]]:
    for sample in info.error_inputs("cpu"):
        yield sample.error_regex, partial(_check_error, *pair, sample)


def _check_error(mine: Callable[..., Any], theirs: Callable[..., Any], error: Any) -> None:
    """The type that torch's data asks for, and the very words of torch's function."""
    sample = error.sample_input
    kind, message = failure(lambda: mine(sample.input, *sample.args, **sample.kwargs))
    assert kind is not None, "no error"
    assert issubclass(kind, error.error_type), f"{kind.__name__} instead of {error.error_type}"
    assert re.search(error.error_regex, message), message
    assert (kind, message) == failure(lambda: theirs(sample.input, *sample.args, **sample.kwargs)), message
