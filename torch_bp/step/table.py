"""The table of Algorithm 1 for one batch: every operation, its values, its error signals, its gradients.

Symbols are the report's: z before an activation, y (or z) the result of an operation, dz and dy the gradients of the
loss there, which are the error signals, dW and db those of the parameters, da or dx what is sent back to the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_bp.step.agreement import DIFFERENCES, tolerance

_COLUMNS = ("shape", "norm", "mean", "min", "max", "zeros")


@dataclass(frozen=True)
class Summary:
    """A tensor in five numbers: its norm, mean, least and greatest entry, and the share of entries that are 0."""

    shape: tuple[int, ...]
    norm: float
    mean: float
    min: float
    max: float
    zeros: float

    @classmethod
    def of(cls, tensor: Tensor) -> Summary:
        """Summarise; numbers of an empty tensor are 0, a complex one has those of its absolute values but the norm."""
        shape, t = tuple(tensor.shape), tensor.detach().to_dense()
        if not t.numel():
            return cls(shape, 0.0, 0.0, 0.0, 0.0, 0.0)
        wide = t.abs().double() if t.is_complex() else t.double()
        norm = float(torch.linalg.vector_norm(wide))
        return cls(shape, norm, *map(float, (wide.mean(), wide.min(), wide.max(), (wide == 0).double().mean())))

    def cells(self) -> tuple[str, ...]:
        """The numbers as text, as of the columns shape, norm, mean, min, max and zeros."""
        zeros = f"{100 * self.zeros:.0f} %" if self.zeros else ""
        return _shape(self.shape), *map(number, (self.norm, self.mean, self.min, self.max)), zeros


@dataclass
class TraceLine:
    """One operation, forward and backward. Its tensors are attributes too, by their symbols: `line.z`, `line.dW`.

    A linear layer with its activation in one operation has y and dy; z and dz are never there by themselves. Build the
    model of separate modules (`nn.MLP(..., fused=False)`) to see them.

    Attributes:
        number: its place in the forward, from 1; 0 is the batch.
        path: the module, "" for the model's own forward.
        name: of the operation.
        forward: its equation.
        backward: by the symbol of a gradient, the equation.
        outputs: by symbol, the values: `z` or `y`.
        errors: by symbol, the error signals there, `dz` or `dy`; empty if none arrives.
        gradients: by symbol, what its backward gives: `da` or `dx`, `dW`, `db`.
        sources: by the symbol of the gradient for it, the number of the line that made an argument.
        parameters: by the symbol of the gradient, the name of a parameter.
        trained: False if no trained parameter is in it or before it: it gets no error signal.
    """

    number: int
    path: str
    name: str
    forward: str
    backward: dict[str, str]
    outputs: dict[str, Tensor]
    sources: dict[str, int]
    parameters: dict[str, str]
    trained: bool
    errors: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, symbol: str) -> Tensor:
        if not symbol.startswith("__"):
            parts = [self.__dict__.get(part, {}) for part in ("outputs", "gradients", "errors")]
            for part in parts:
                if symbol in part:
                    return part[symbol]
            there = ", ".join(name for part in parts for name in part)
            raise AttributeError(f"line {self.__dict__.get('number')} has no {symbol!r}; it has {there}.")
        raise AttributeError(symbol)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.outputs, *self.errors, *self.gradients]

    @property
    def output(self) -> Tensor:
        """The first result, by whatever symbol."""
        return next(iter(self.outputs.values()))

    @property
    def error(self) -> Tensor | None:
        """The error signal at `output`, None if none arrives."""
        return self.errors.get(f"d{next(iter(self.outputs))}")

    def summary(self, symbol: str) -> Summary:
        """Norm, mean, least and greatest entry of one of its tensors."""
        return Summary.of(getattr(self, symbol))

    def __repr__(self) -> str:
        tensors = {**self.outputs, **self.errors, **self.gradients}
        shapes = ", ".join(f"{name} {_shape(tuple(t.shape))}" for name, t in tensors.items())
        return f"<line {self.number} {self.path or '(model)'}: {self.forward}; {shapes}>"


@dataclass
class Trace:
    """What one pass did, as `TrainStep.trace` gives it; `print` it.

    A line is had by its number, as in the table, or by its module: `trace[3]`, `trace["0"]`. Of a module that ran
    more than once, or did several operations, `trace.of(path)` gives all.

    Attributes:
        model: name of the class.
        training: the mode of the model.
        lines: operations in the order of the forward; `lines[0]` is number 1.
        batch: the tensors that the model was called with.
        output: what the model returned.
        loss: ().
        values: by name, the parameters at that time.
        gradients: by name, the gradients of parameters that the loss depends on.
        trained: names of the parameters that are trained.
        against_autograd, against_differences: by name, the relative error; empty if not checked.
        remark: why there are no central differences, or not for all.
    """

    model: str
    training: bool
    lines: list[TraceLine]
    batch: list[Tensor]
    output: Any
    loss: Tensor
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    trained: list[str]
    against_autograd: dict[str, float] = field(default_factory=dict)
    against_differences: dict[str, float] = field(default_factory=dict)
    remark: str = ""

    def of(self, path: str) -> list[TraceLine]:
        """Lines of a module; KeyError if there are none."""
        found = [line for line in self.lines if line.path == path]
        if not found:
            there = ", ".join(repr(p) for p in dict.fromkeys(line.path for line in self.lines))
            raise KeyError(f"trace: no operation ran in module {path!r}; there are {there}.")
        return found

    def __getitem__(self, key: int | str) -> TraceLine:
        if isinstance(key, str):
            found = self.of(key)
            if len(found) > 1:
                numbers = ", ".join(str(line.number) for line in found)
                raise KeyError(f"trace: module {key!r} has several lines, {numbers}; take one by its number.")
            return found[0]
        if not 1 <= key <= len(self.lines):
            raise IndexError(f"trace: a line must be of number 1 to {len(self.lines)}, got {key}.")
        return self.lines[key - 1]

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[TraceLine]:
        return iter(self.lines)

    @property
    def passed(self) -> bool | None:
        """True if all gradients agree, with autograd and with central differences; None if not checked."""
        if not self.against_autograd:
            return None
        return not any(self._fails(name) for name in self.trained)

    def _fails(self, name: str) -> bool:
        by_autograd = self.against_autograd.get(name, 0.0)
        agrees = by_autograd <= tolerance(self.values[name].dtype)  # NaN does not
        return not (agrees and self.against_differences.get(name, 0.0) <= DIFFERENCES)

    def __str__(self) -> str:
        text = [self.headline(), ""]
        for title, header, rows in self.tables():
            text += [title, *_aligned([header, *rows]), ""]
        return "\n".join([*text, self.verdict()]).strip()

    def markdown(self) -> str:
        """The table in Markdown, symbols in plain text."""
        text = [f"**{self.headline()}**", ""]
        for title, header, rows in self.tables():
            text += [f"### {title}", "", _pipes(header)]
            text.append(_pipes(["---:" if n in _right(header) else "---" for n in range(len(header))]))
            text += [_pipes([f"`{c}`" if c and n in (1, 2, 3) else c for n, c in enumerate(row)]) for row in rows]
            text.append("")
        return "\n".join([*text, self.verdict()]).strip() + "\n"

    def write(self, writer: Any, tag: str = "trace", global_step: int | None = None) -> None:
        """Put the table into TensorBoard, under "Text".

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_text`.
            tag: the name there.
            global_step: the step there.

        Raises:
            TypeError: the writer has no `add_text`.
        """
        if not callable(getattr(writer, "add_text", None)):
            raise TypeError(f"trace: writer must be a SummaryWriter with add_text, got {type(writer).__name__}.")
        writer.add_text(tag, self.markdown(), global_step)

    def figure(self) -> Any:
        """Draw sec. 3.2's figure for this network, as a `matplotlib.figure.Figure`.

        Values go from left to right, error signals from right to left; below, the norms of both and of the gradients.

        Raises:
            ImportError: matplotlib is missing, which `pip install "torch_bp[recipes]"` brings.
        """
        from torch_bp.step.figure import draw

        return draw(self)

    def headline(self) -> str:
        """What, on what, and the loss."""
        shapes = ", ".join(_shape(tuple(t.shape)) for t in self.batch)
        mode = "training" if self.training else "evaluation"
        return f"Algorithm 1 of {self.model}, in {mode}, for a batch of {shapes}: loss {float(self.loss.real):.6g}"

    def verdict(self) -> str:
        """What the check found, in a sentence."""
        if self.passed is None:
            return "not checked: trace(x, y, check=True) compares with autograd and with central differences"
        bad = [name for name in self.trained if self._fails(name)]
        worst = f"the largest relative error is {_error(max(self.against_autograd.values(), default=0.0))}"
        if self.against_differences:
            by_differences = _error(max(self.against_differences.values()))
            worst += f" against autograd, {by_differences} against central differences in float64"
        else:
            worst += " against autograd"
        remark = f"; {self.remark}" if self.remark else ""
        return f"check {'FAILED for ' + ', '.join(bad) if bad else 'passed'}: {worst}{remark}"

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows of the forward, the backward and the parameters."""
        first = ["", "module", "operation", "", *_COLUMNS]
        back = ["", "module", "gradient", "", *_COLUMNS]
        names = ["", "parameter", "", "", "shape", "norm", "gradient", "ratio"]
        if self.passed is not None:
            names += ["autograd", "differences"]
        return [
            ("Forward pass", first, self._forward()),
            ("Backward pass", back, self._backward()),
            ("Parameters", names, [self._parameter(name) for name in self.values]),
        ]

    def _forward(self) -> list[list[str]]:
        rows = [["0", "", "the batch", "x", *Summary.of(t).cells()] for t in self.batch]
        for line in self.lines:
            for n, (symbol, t) in enumerate(line.outputs.items()):
                start = ["", "", ""] if n else [str(line.number), line.path, line.forward]
                rows.append([*start, symbol, *Summary.of(t).cells()])
        return rows

    def _backward(self) -> list[list[str]]:
        rows: list[list[str]] = []
        for line in reversed(self.lines):
            start = [str(line.number), line.path]
            if not line.trained or not line.errors:
                why = "no error signal arrives" if line.trained else "nothing to train up to here"
                rows.append([*start, why, "", *[""] * len(_COLUMNS)])
                continue
            takers = [(other.number, s) for other in self.lines for s, n in other.sources.items() if n == line.number]
            takers = [(number, s) for number, s in takers if s in self.lines[number - 1].gradients]
            if len(takers) > 1 and len(line.errors) == 1:
                ((symbol, t),) = line.errors.items()
                sent = " + ".join(f"{s} of {number}" for number, s in reversed(takers))
                rows.append([*start, f"{symbol} = {sent}", symbol, *Summary.of(t).cells()])
                start = ["", ""]
            for symbol, t in line.gradients.items():
                rows.append([*start, line.backward[symbol], symbol, *Summary.of(t).cells()])
                start = ["", ""]
        return rows

    def _parameter(self, name: str) -> list[str]:
        size = Summary.of(self.values[name])
        row = ["", name, "" if name in self.trained else "frozen", "", _shape(size.shape), number(size.norm)]
        gradient = self.gradients.get(name)
        if gradient is None:
            row += ["none" if name in self.trained else "", ""]
        else:
            norm = Summary.of(gradient).norm
            row += [number(norm), number(norm / size.norm) if size.norm else ""]
        if self.passed is not None:
            checks = (self.against_autograd, self.against_differences)
            row += [_error(errors[name]) if name in errors else "" for errors in checks]
            row[2] = "WRONG" if name in self.trained and self._fails(name) else row[2]
        return row


def number(value: float) -> str:
    """Three digits, in the shorter way.

    >>> number(0.012345), number(-123456.0), number(1e-7), number(0.0), number(0.009999)
    ('0.0123', '-1.23e+05', '1.00e-07', '0', '0.0100')
    """
    if not value:
        return "0"
    if not math.isfinite(value):
        return str(value)
    value = float(f"{value:.2e}")  # 0.009999 is 0.0100, and not 0.01000
    if not 1e-3 <= abs(value) < 1e4:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def _right(header: Sequence[str]) -> list[int]:
    """Columns of numbers."""
    return [0, *range(4, len(header))]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    right = _right(rows[0])
    lines = []
    for row in rows:
        cells = [c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths)) if w]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:]]


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
