"""Where the first NaN or infinity of a step comes from, by a replay of the step: sec. 10.2, item 2.

A reading tells the layer. The replay tells more: which examples of the batch, which module of any kind, and whether
float64 would do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.reading import PLACES
from torch_bp.diagnostics.remedy import EARLIER_CHECKPOINT
from torch_bp.diagnostics.replica import replica, same_random_numbers


@dataclass(frozen=True, slots=True)
class _Bad:
    """A tensor that is not finite: in which module, in which part of the step, and how it came about."""

    module: str
    cause: str
    cure: str
    count: int
    overflow: bool = False


def find_origin(
    model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, target: Any, step: int = 0
) -> Finding | None:
    """Replay one step on a copy, and name the first NaN or infinity; None if there is none.

    Args:
        model: as it was before the step. It is not touched, nor are random numbers.
        loss_fn: called with the output and `target`.
        inputs: a tensor, or a tuple of arguments.
        target: of the loss.
        step: to be named in the finding.

    Returns:
        A finding whose layer is the module path, and whose cause names the part of the step (input, weight, forward,
        loss, backward) and the first examples of the batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> x = torch.ones(5, 3)
        >>> x[2, 1] = float("nan")
        >>> print(find_origin(model, nn.MSELoss(), x, torch.zeros(5, 4)).cause)
        input 0 has 1 NaN or infinite value of 15 (example 2)
    """
    bad = _replayed(model, loss_fn, inputs, target)
    if bad is None:
        return None
    cause = bad.cause
    if bad.overflow and _replayed(model, loss_fn, inputs, target, torch.float64) is None:
        cause += "; in float64 all is finite: it is the range of the dtype that is too small"
    return Finding("NaN or Inf", bad.module, step, float(bad.count), 0.0, cause, bad.cure, "error")


def _replayed(
    model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, target: Any, dtype: torch.dtype | None = None
) -> _Bad | None:
    with same_random_numbers(model), torch.enable_grad():
        copied, loss = replica(model, loss_fn)
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        args = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
        if dtype is not None:
            copied = copied.to(dtype)
            loss = loss.to(dtype) if isinstance(loss, nn.Module) else loss
            args, target = tuple(_cast(x, dtype) for x in args), _cast(target, dtype)
        return _at_rest(copied, args, target) or _step(copied, loss, args, target)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _at_rest(model: nn.Module, args: tuple[Any, ...], target: Any) -> _Bad | None:
    """What is not finite before the step begins."""
    named = [*((f"input {n}", x) for n, x in enumerate(args)), ("the target", target)]
    for name, x in named:
        if isinstance(x, Tensor) and (count := _count(x)):
            return _Bad("", f"{name} has {_which(x, count)}", "drop such examples, or torch.nan_to_num(x)", count)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if count := _count(parameter):
            cause = f"{name} has {count} NaN or infinite values before the step"
            return _Bad(name.rpartition(".")[0], cause, EARLIER_CHECKPOINT, count)
    return None


def _step(model: nn.Module, loss_fn: Callable[..., Tensor], args: tuple[Any, ...], target: Any) -> _Bad | None:
    """What is not finite in the forward pass, the loss, or the backward pass."""
    found: list[_Bad] = []
    ended: list[str] = []  # modules whose output's gradient has come and was finite
    names = {module: name for name, module in model.named_modules() if not any(module.children())}

    def backward(name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            count = _count(gradient)
            if count and not found:
                # the gradient of this output was made by what uses it, the module that came last
                place = ended[-1] if ended else ""
                what = f"the derivative of {place}" if place else "the derivative of the loss"
                cause = f"backward: {what} makes {_which(gradient, count)} of finite ones"
                cure = "no sqrt, log or division at 0: add an eps inside, or clamp the argument"
                found.append(_Bad(place, cause, cure, count, True))
            ended.append(name)

        return hook

    def forward(module: nn.Module, _: Any, output: Any) -> None:
        if found or not isinstance(output, Tensor):
            return
        if count := _count(output):
            cause = f"forward: {type(module).__name__} makes {_which(output, count)} of finite ones"
            found.append(_Bad(names[module], cause, "a lower learning rate, or nn.LayerNorm before it", count, True))
        elif output.requires_grad:
            output.register_hook(backward(names[module]))

    for module in names:
        module.register_forward_hook(forward)
    loss = loss_fn(model(*args), target)
    if not found and (count := _count(loss)):
        cause = "the loss is not finite, while all that it gets is: a logarithm of 0, or an overflow"
        found.append(_Bad("", cause, "take a loss on logits, such as nn.CrossEntropyLoss", count, True))
    if not found and loss.requires_grad:
        loss.sum().backward()
        for name, parameter in model.named_parameters():
            if not found and parameter.grad is not None and (count := _count(parameter.grad)):
                cause = f"backward: the gradient of {name} has {count} NaN or infinite values"
                cure = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
                found.append(_Bad(name.rpartition(".")[0], cause, cure, count, True))
    return found[0] if found else None


def _count(x: Tensor) -> int:
    return int((~x.detach().isfinite()).sum()) if x.is_floating_point() or x.is_complex() else 0


def _which(x: Tensor, count: int) -> str:
    """How many, and of which examples."""
    text = f"{count} NaN or infinite value{'s' if count > 1 else ''} of {x.numel()}"
    if x.dim() < 1:
        return text
    rows = (~x.detach().isfinite()).reshape(len(x), -1).any(1).nonzero().flatten().tolist()
    shown = ", ".join(map(str, rows[:PLACES])) + (", ..." if len(rows) > PLACES else "")
    return f"{text} (example{'s' if len(rows) > 1 else ''} {shown})"
