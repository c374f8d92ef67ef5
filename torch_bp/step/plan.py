"""The plan of a step: Algorithm 1 of the report, line by line, for one model and one kind of batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torch_bp.autograd.entry import Entry


@dataclass
class PlanLine:
    """One operation, forward and backward.

    Attributes:
        path: the module that runs it, "" for the model's own forward.
        name: of the operation.
        forward, backward: its equations.
        inputs, outputs: shapes of tensors among arguments and results.
        gradients: shapes of the gradients that it gives.
        bytes: of the results.
    """

    path: str
    name: str
    forward: str
    backward: str
    inputs: list[tuple[int, ...]]
    gradients: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    bytes: int


@dataclass
class Plan:
    """What a step does with one kind of batch; `print` it.

    Attributes:
        lines: in the order of the forward; the backward goes through them from last to first.
        parameters: names of the parameters that get a gradient.
        bytes: of buffers, with memory used again as soon as it is free; None where nothing was captured.
        apart: what the buffers would be without that.
    """

    lines: list[PlanLine] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    bytes: int | None = None
    apart: int | None = None

    def noting(self, path: Callable[[Sequence[Any]], str]) -> Callable[[Entry], None]:
        """Return a function that takes down each entry of a tape as it runs; `path` names the module, by its inputs."""

        def note(entry: Entry) -> None:
            outputs = [t for t in entry.outputs if isinstance(t, Tensor)]
            forward, backward = equations(entry)
            self.lines.append(
                PlanLine(
                    path(entry.inputs),
                    entry.name,
                    forward,
                    backward,
                    [tuple(t.shape) for t in entry.inputs if isinstance(t, Tensor)],
                    [tuple(t.shape) for t, n in zip(entry.inputs, entry.sources) if n is not None],  # type: ignore[union-attr]
                    [tuple(t.shape) for t in outputs],
                    sum(t.numel() * t.element_size() for t in outputs),
                )
            )

        return note

    def __str__(self) -> str:
        rows = [("", "forward", "", "", "")]
        rows += [
            (str(n), line.forward, _shapes(line.inputs, line.outputs), _size(line.bytes), line.path)
            for n, line in enumerate(self.lines, 1)
        ]
        rows.append(("", "backward", "", "", ""))
        rows += [
            (str(n), line.backward, _shapes(line.outputs[:1], line.gradients), "", line.path)
            for n, line in reversed([*enumerate(self.lines, 1)])
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        if self.bytes is not None:
            text.append(f"buffers: {_size(self.bytes)}, for {_size(self.apart or 0)} of results")
        text.append(f"gradients: {', '.join(self.parameters)}")
        return "\n".join(text)


def equations(entry: Entry) -> tuple[str, str]:
    """Return the equations of an operation, forward and backward, of gradients those that it gives."""
    forward, backward = getattr(entry.function, "equations", ("", ""))
    if isinstance(backward, tuple):
        wanted = [text for text, source in zip(backward, entry.sources) if source is not None]
        backward = ", ".join(filter(None, (getattr(entry.function, "needed_first", ""), *wanted)))
    return forward or entry.name, backward or f"{entry.name}, by autograd"


def _shapes(before: Sequence[tuple[int, ...]], after: Sequence[tuple[int, ...]]) -> str:
    return f"{' '.join(map(_shape, before))} -> {' '.join(map(_shape, after))}"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
