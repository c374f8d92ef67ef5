"""TrainStep: the report's Algorithm 1 as one straight line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.autograd.tape import Tape
from torch_bp.step.capture import NotCapturable, Program, Recorder
from torch_bp.step.trace import Explicit, Paths, trained


class Line:
    """One captured pass for tensors of one kind."""

    def __init__(self, program: Program, inputs: Sequence[Tensor], loss: Tensor, gradients: list[Any]) -> None:
        self.program, self.inputs, self.loss, self.gradients = program, inputs, loss, gradients


class TrainStep:
    def __init__(self, model: Any, loss_fn: Callable[..., Tensor], optimizer: Any, *, capture: Any = "auto",
                 fallback: str = "error") -> None:
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.capture = capture
        self.fallback = fallback == "autograd"
        self.parameters = trained(model.parameters())
        self.path = Paths({"": model, "loss": loss_fn})
        self.lines: dict[Any, Line] = {}

    def explicit(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        with torch.no_grad(), Tape(self.parameters, self.path) as tape:
            with Explicit(tape, self.fallback, self.path):
                loss = self.loss_fn(self.model(x), y)
            return loss, tape.backward(loss, torch.ones_like(loss))

    def _captured(self, x: Tensor, y: Tensor) -> Line:
        x, y = x.clone(), y.clone()
        with Recorder() as recorder:
            loss, gradients = self.explicit(x, y)
        placed, homes, taken = {}, [], set()
        for p, g in zip(self.parameters, gradients):
            if g is None:
                homes.append(None)
                continue
            home = torch.empty_like(p)
            key = Recorder._key(g)
            memory = recorder.memories[key]
            direct = memory.made and key not in taken and g.numel() * g.element_size() == memory.storage.nbytes() \
                and g.stride() == home.stride()
            if direct:
                taken.add(key)
                placed[key] = home
            homes.append((home, None if direct else g))
        program = Program(recorder, placed, [loss, *(g for g in gradients if g is not None)])
        for h in homes:
            if h is not None and h[1] is not None:
                import functools
                program.calls.append(functools.partial(torch.Tensor.copy_, h[0], program.tensor(h[1])))
        return Line(program, (x, y), program.tensor(loss), [None if h is None else h[0] for h in homes])

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.capture:
            loss, gradients = self.explicit(x, y)
            for p, g in zip(self.parameters, gradients):
                p.grad = g
            return loss
        key = (x.shape, x.dtype, y.shape, y.dtype)
        line = self.lines.get(key)
        if line is None:
            line = self.lines[key] = self._captured(x, y)
        with torch.no_grad():
            line.inputs[0].copy_(x)
            line.inputs[1].copy_(y)
            for call in line.program.calls:
                call()
            for p, g in zip(self.parameters, line.gradients):
                p.grad = g
            return line.loss.clone()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.backward(x, y)
        self.optimizer.step()
        return loss
