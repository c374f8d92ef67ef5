"""What may stand where a formula wants a number, and which numbers of its surroundings it has taken."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from torch_bp.kernels import plain
from torch_bp.kernels.plain import grad_enabled
from torch_bp.kernels.program import PLAIN_NUMBERS


def numbers(values: Collection[Any]) -> bool:
    """True if the tensors among the keyword values are single numbers that may be read on the host or by a kernel."""
    if PLAIN_NUMBERS.issuperset(map(type, values)):
        return True
    try:
        for value in values:
            if isinstance(value, complex):
                return False
            if isinstance(value, torch.Tensor) and (
                type(value) not in plain.PLAIN_TYPES
                or value.is_complex()
                or value.numel() != 1
                or not value.data_ptr()  # a zero tensor, a freed storage
                or (value.requires_grad and grad_enabled())
            ):
                return False
    except RuntimeError:  # inside `is_grads_batched` a tensor has no address to ask for
        return False
    return True


def is_number(value: Any) -> bool:
    """True if this may be a scalar of a formula: a number, or what holds one."""
    return isinstance(value, int | float | complex) or hasattr(value, "item")


def in_quotes(value: Any) -> bool:
    """True if this is a number written as a string."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def why_no_number(value: Any) -> str:
    """Say what a value is that should be a number, and what to do."""
    if in_quotes(value):
        return f"the string {value!r}; write it without quotes (in YAML, 1.0e-3: PyYAML reads 1e-3 as a string)"
    return f"{value!r}, of type {type(value).__name__}"


def _cell_text(cell: Any) -> str:
    return repr(cell.cell_contents)


def _global_text(namespace: Mapping[str, Any], name: str) -> str:
    return repr(namespace.get(name))


def outer_numbers(function: Callable[..., Any]) -> list[Callable[[], Any]]:
    """Return readers of the numbers in a function's closure and module, which a trace would freeze."""
    readers: list[Callable[[], Any]] = []
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # not bound yet
            continue
        if isinstance(value, int | float):
            readers.append(functools.partial(_cell_text, cell))
    for name in function.__code__.co_names:
        if isinstance(function.__globals__.get(name), int | float):
            readers.append(functools.partial(_global_text, function.__globals__, name))
    return readers
