"""A gradient check of the step that has just been taken, on its own batch: `torch_bp.autograd.directional_check`.

The arguments of the model and of the loss are kept as they pass by, as references, until the step is over; then the
model runs again, with nothing of the monitor attached. A check that cannot be had is no reason to stop a training: why
is logged, once for each reason.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_bp.autograd import directional_check
from torch_bp.diagnostics.hook import Hook
from torch_bp.diagnostics.replica import same_random_numbers

_logger = logging.getLogger("torch_bp")


@dataclass(frozen=True, slots=True)
class GradientErrors:
    """Relative errors of the gradient, by layer and for the "loss", and the largest that is all right."""

    errors: dict[str, float]
    tolerance: float


@dataclass(frozen=True, slots=True)
class _Call:
    """Of the model: what it was called with, and under which autocast."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: dict[str, torch.dtype]
    output: Any = None


class LiveCheck:
    """Keeps what a check needs of the steps that are due, and makes it.

    Args:
        model: that is watched.
        every: steps from one check to the next; None: no step is checked.
        loss_fn: module that computes the loss. Default: none, as where a `TrainStep` says it.
    """

    def __init__(self, model: nn.Module, every: int | None, loss_fn: nn.Module | None) -> None:
        self._model, self.every, self.loss_fn = model, every, loss_fn
        self._hooks: list[Any] = []
        self._call: _Call | None = None
        self._loss: Callable[[Any], Tensor] | None = None
        self._versions: list[tuple[Tensor, int]] = []
        self._reason = ""  # why there is no loss for the call
        self._said: set[str] = set()

    def due(self, step: int) -> bool:
        """Whether this step is checked."""
        return self.every is not None and step % self.every == 0

    def attach(self) -> None:
        """Listen to the model and the loss."""
        if self._hooks:
            return
        self._hooks.append(self._model.register_forward_hook(Hook(self._model_ran), with_kwargs=True))
        if self.loss_fn is not None:
            self._hooks.append(self.loss_fn.register_forward_hook(Hook(self._loss_ran), with_kwargs=True))

    def detach(self) -> None:
        """Listen no longer, and keep nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        self._forget()

    def ran(self, model: nn.Module, args: tuple[Any, ...], targets: tuple[Any, ...], loss_fn: Any) -> None:
        """A `TrainStep` has run the model, and the loss of what it returned."""
        self._call = _Call(model, args, {}, _autocast(args))
        compare = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
        self._loss = lambda output: compare(output, *targets)
        self._note(args, targets)

    def run(self, step: int) -> GradientErrors | None:
        """Check the gradients, and forget the batch; None where that cannot be."""
        call, loss, reason = self._call, self._loss, self._why_not()
        self.detach()  # it would hear the passes of the check, too
        if call is None or loss is None or reason:
            self._say(reason)
            return None
        try:
            with same_random_numbers(self._model), _autocasting(call.autocast):
                report = directional_check(call.model, loss, _arguments(call), seed=step)
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}")
            return None
        prefix = self._prefix(call.model)
        errors = {(name if name == "loss" else prefix + name): error for name, error in report.errors.items()}
        return GradientErrors(errors, report.rtol)

    def _why_not(self) -> str:
        if self._call is None:
            return "the model was not called in the step"
        if self._loss is None:
            return self._reason or (
                "the loss is not known; pass its module as loss_fn, and call that with what the model returns"
                if self.loss_fn is None
                else "loss_fn was not called in the step"
            )
        if any(t._version != version for t, version in self._versions):
            return "the batch was written to before the step was over"
        return ""

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _logger.warning("watch: no gradient check was made: %s.", reason.rstrip("."))

    def _forget(self) -> None:
        self._call = self._loss = None
        self._versions, self._reason = [], ""

    def _model_ran(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:  # no evaluation, and no checkpoint
            self._forget()
            self._call = _Call(module, args, kwargs, _autocast((args, kwargs)), output)
            self._note(args, kwargs)

    def _loss_ran(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if not torch.is_grad_enabled() or self._call is None:
            return
        others, named = args[1:], {name: value for name, value in kwargs.items() if name != "input"}
        output = args[0] if args else kwargs.get("input")
        if output is not self._call.output:
            self._loss, self._reason = None, "loss_fn was not called with what the model returned, but with another"
            return
        # not the module itself, whose hooks would take this for a loss of the training
        self._loss = lambda output: module.forward(output, *others, **named)
        self._note(others, named)

    def _note(self, *arguments: Any) -> None:
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and not t.is_inference()]
        self._versions += [(t, t._version) for t in tensors]

    def _prefix(self, model: nn.Module) -> str:
        """Where the model that was called lies in the one that is watched."""
        names = (name for name, module in self._model.named_modules() if module is model)
        name = next(names, "")
        return f"{name}." if name else ""


def _arguments(call: _Call) -> Any:
    if not call.kwargs:
        return call.args
    if not call.args:
        return call.kwargs
    return dict(inspect.signature(call.model.forward).bind(*call.args, **call.kwargs).arguments)


def _autocast(arguments: Any) -> dict[str, torch.dtype]:
    """The dtype of `torch.autocast` on each device where it is on."""
    devices = {t.device.type for t in tree_leaves(arguments) if isinstance(t, Tensor)}
    return {device: torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}


@contextlib.contextmanager
def _autocasting(dtypes: dict[str, torch.dtype]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device, dtype in dtypes.items():
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        yield
