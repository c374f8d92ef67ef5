"""A pass that runs as it is, with the model's Python: where nothing can be captured, or nothing shall be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_bp.step.arguments import Inputs
from torch_bp.step.line import Passes
from torch_bp.step.memory import Overwritten, memory_of, number
from torch_bp.step.plan import Plan
from torch_bp.step.snapshot import Snapshot
from torch_bp.step.unchanged import refuse_backward_hooks
from torch_bp.step.update import Norm
from torch_bp.step.watched import Monitor


class Uncaptured:
    """A pass that ran as it is, with the model's Python.

    Args:
        passes, modules, inputs, leaves, scale, add: as of `Line`.
        before: brings back what a pass changes besides.
        monitor: that records it, if any.
    """

    replayed = updates = False

    def __init__(
        self,
        passes: Passes,
        modules: Sequence[torch.nn.Module],
        inputs: Inputs,
        leaves: Sequence[Tensor],
        scale: float,
        add: bool,
        before: Snapshot,
        monitor: Monitor | None,
    ) -> None:
        refuse_backward_hooks(modules)
        self._before, self._overwritten = before, Overwritten()
        own = set(map(number, memory_of(modules)))

        def writing(tensor: Tensor) -> None:
            if tensor.layout is torch.strided and number(tensor) in own:
                self._overwritten.keep(tensor)

        self.plan = Plan()
        hearing = None if monitor is None else monitor.hearing()
        try:
            noted = self.plan.noting(passes.path.of)
            self.loss, found = passes.run(inputs, leaves, scale, noted, hearing=hearing, writing=writing)
        except BaseException:
            self._overwritten.restore()
            raise
        self.output, passes.output = passes.output, None
        self.heard = () if hearing is None else hearing.heard
        if not add:
            for p in [*leaves, *(p for module in modules for p in module.parameters())]:
                p.grad = None
        given: set[int] = set()
        for p, gradient in zip(leaves, found):
            if gradient is not None:
                shared = gradient.layout is torch.strided and (
                    gradient.stride() != p.stride() or gradient.untyped_storage()._cdata in given
                )
                gradient = torch.empty_like(p).copy_(gradient) if shared else gradient
                if gradient.layout is torch.strided:
                    given.add(gradient.untyped_storage()._cdata)
                _accumulate(p, gradient, add)
        names = {id(p): name for module in modules for name, p in module.named_parameters()}
        self.plan.parameters = [names.get(id(p), "?") for p, gradient in zip(leaves, found) if gradient is not None]
        self.gradients = [p.grad for p in leaves if p.grad is not None]
        self.norm = Norm(self.gradients)

    def restore(self) -> None:
        """Take back what the pass wrote to parameters, buffers and other tensors of the model."""
        self._overwritten.restore()
        self._before.restore(random=False)


def _accumulate(p: Tensor, gradient: Tensor, add: bool) -> None:
    """Do what autograd does with the gradient of a leaf: its hooks, `p.grad`, and the hooks after that."""
    for hook in (p._backward_hooks or {}).values():
        replaced = hook(gradient)
        gradient = gradient if replaced is None else replaced
    p.grad = p.grad + gradient if add and p.grad is not None else gradient
    for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(p)
