"""What a loop does around a step, which numbers of the step do not show: listened to in the first steps of a run.

    carried        norm of the gradients that were there when the backward pass of a step began: 0 after `zero_grad`
    unused         parameters that had no gradient when the optimizer stepped
    loss_function  class of the loss
    output         values that the loss was given

A loop is wrong in its first steps or never, so that listening to these costs nothing later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_bp.diagnostics.reading import Spread

STEPS = 5  # that are listened to


class Circumstances:
    """Listens to the first steps of a run.

    Args:
        model: whose parameters are meant.
        optimizer: whose steps are counted.
        loss_fn: a module; without it `carried`, `loss_function` and `output` stay unknown.
        steps: how many are listened to.

    Example:
        >>> model, loss_fn = nn.Linear(3, 2), nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> circumstances = Circumstances(model, optimizer, loss_fn)
        >>> for _ in range(2):
        ...     loss_fn(model(torch.ones(4, 3)), torch.zeros(4, dtype=torch.long)).backward()
        ...     optimizer.step()
        >>> circumstances.facts[0]["carried"], circumstances.facts[1]["carried"] > 0
        (0.0, True)
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module | None = None, steps: int = STEPS
    ) -> None:
        self.facts: dict[int, dict[str, Any]] = {}
        self._model, self._steps, self._step = model, steps, 0
        self._now: dict[str, Any] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._step_begins),
            optimizer.register_step_post_hook(self._step_ended),
        ]
        if loss_fn is not None:
            self._hooks.append(loss_fn.register_forward_hook(self._loss_computed, with_kwargs=True))

    def close(self) -> None:
        """Listen no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _loss_computed(self, loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        if torch.compiler.is_compiling() or not isinstance(loss, Tensor) or not loss.requires_grad or self._now:
            return  # a validation, or a later micro-batch
        self._now["loss_function"] = type(loss_fn).__name__
        output = args[0] if args else kwargs.get("input")
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            values = output.detach().float()
            numbers = (values.mean(), values.std(correction=0), values.min(), values.max())
            self._now["output"] = Spread(values.numel(), *torch.stack(numbers).tolist())
        # `zero_grad` may still come, but not after this: the gradient of the loss is the first of the backward pass
        loss.register_hook(self._backward_begins)

    def _backward_begins(self, gradient: Tensor) -> None:
        grads = [p.grad.detach() for p in self._model.parameters() if p.grad is not None and not p.grad.is_sparse]
        norms = torch._foreach_norm(grads) if grads else []
        self._now.setdefault("carried", float(torch.stack([n.double().cpu() for n in norms]).norm()) if grads else 0.0)

    def _step_begins(self, *_: Any) -> None:
        if self._step >= self._steps:
            return
        missing = [name for name, p in self._model.named_parameters() if p.requires_grad and p.grad is None]
        self._now["unused"] = tuple(missing)

    def _step_ended(self, *_: Any) -> None:
        if self._step >= self._steps:
            return
        self.facts[self._step] = self._now
        self._now = {}
        self._step += 1
        if self._step == self._steps:  # the optimizer is going through its hooks: those stay until `close`
            for hook in self._hooks[2:]:
                hook.remove()
