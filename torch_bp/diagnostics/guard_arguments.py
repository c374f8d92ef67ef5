"""What a `DivergenceGuard` may be made of; the errors say what is wrong before anything is attached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer


def several(value: Any) -> list[Any]:
    """The objects that were given: none, one, or a list or tuple of them."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def check_objects(model: Any, optimizers: Sequence[Any], schedulers: Any, scaler: Any, data: Sequence[Any]) -> None:
    """Refuse what has no state to go back to."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"DivergenceGuard: model must be a torch.nn.Module, got {type(model).__name__}.")
    if not optimizers:
        raise ValueError("DivergenceGuard: optimizer must be one or several, got none. Hand over all that step.")
    for each in optimizers:
        if not isinstance(each, Optimizer) or "param_groups" not in vars(each):
            raise TypeError(
                f"DivergenceGuard: optimizer must be a torch.optim.Optimizer, or several, got {type(each).__name__}; a "
                "wrapper has it as `.optimizer`."
            )
        if "_applied_in_backward" in vars(each):
            raise RuntimeError(
                "DivergenceGuard: optimizer must step after the backward, got one that is applied in it, which no "
                "look at the loss can stop; remove() its handle."
            )
    for each in schedulers:
        if not (_stateful(each) and any(getattr(each, "optimizer", None) is optimizer for optimizer in optimizers)):
            raise TypeError(
                f"DivergenceGuard: scheduler must be a schedule of one of the optimizers, or several, got "
                f"{type(each).__name__}. Data and all else that has a state go to `data`."
            )
    if scaler is not None and not (_stateful(scaler) and hasattr(scaler, "is_enabled")):
        raise TypeError(f"DivergenceGuard: scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}.")
    for each in data:
        if not (_stateful(each) or isinstance(each, torch.Generator)):
            raise TypeError(
                f"DivergenceGuard: data must have state_dict and load_state_dict, or be a torch.Generator, got "
                f"{type(each).__name__}. Hand over what knows the position: a stateful sampler or loader."
            )


def check_numbers(numbers: dict[str, Any]) -> None:
    """Refuse numbers outside of their ranges; `numbers` are all arguments by name."""
    for name, least in (("retries", 0), ("cooldown", 0), ("every", 1), ("keep", 2), ("trust", 1), ("patience", 1)):
        _integer(name, numbers[name], least)
    _integer("window", numbers["window"], 16)
    factor = numbers["factor"]
    if not _number(factor) or not 0 < factor <= 1:
        raise ValueError(f"DivergenceGuard: factor must be in (0, 1], got {factor!r}. 0.5 halves the rates.")
    for name in ("spike", "rise"):
        value = numbers[name]
        if value is not None and (not _number(value) or not 0 < value < math.inf):
            raise ValueError(f"DivergenceGuard: {name} must be positive and finite, got {value!r}. None does not test.")
    if numbers["storage"] not in ("device", "cpu"):
        raise ValueError(f"DivergenceGuard: storage must be 'device' or 'cpu', got {numbers['storage']!r}.")
    most = (numbers["keep"] - 1) * numbers["every"]
    if numbers["trust"] > most:
        raise ValueError(
            f"DivergenceGuard: trust must be at most (keep - 1) * every = {most}, got {numbers['trust']}, as a "
            "snapshot would be replaced before it is good. Keep more, or take them less often."
        )


def _integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"DivergenceGuard: {name} must be an integer >= {least}, got {value!r}.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stateful(each: Any) -> bool:
    return all(callable(getattr(each, name, None)) for name in ("state_dict", "load_state_dict"))
