"""One operation on a tape: what ran, what it left for its backward, whose gradients it takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Context:
    """What `setup_context` and `backward` of a Function see, as of autograd's."""

    explicit = True

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.materialize = True
        self.constant: tuple[Tensor, ...] = ()
        self._saved: tuple[Tensor | None, ...] = ()
        self._versions: tuple[int, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self._saved = tensors
        self._versions = tuple(-1 if t is None else version(t) for t in tensors)

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        pass  # nobody asks for tangents here

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        for tensor, before in zip(self._saved, self._versions):
            if tensor is not None and version(tensor) != before:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"[{tensor.type()} {list(tensor.shape)}] is at version {version(tensor)}; expected version "
                    f"{before} instead."
                )
        return self._saved


def version(tensor: Tensor) -> int:
    """How often the tensor has been written to, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version


class Entry:
    """One operation that has run: what it was, what it left for backward, whose gradients it takes and gives.

    Attributes:
        function: the Function, or the callable that went through autograd.
        inputs, outputs: tensors among the arguments and results, None in other places.
        sources, targets: their numbers on the tape, None for what no gradient is for.
    """

    def __init__(self, function: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.function = function
        self.inputs, self.outputs = inputs, outputs
        self.sources: list[int | None] = []
        self.targets: list[int | None] = []
        self.backward: Callable[..., Any] = lambda *_: None
        self.materialize = True

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)
