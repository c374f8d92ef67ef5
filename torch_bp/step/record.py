"""Algorithm 1 for one batch, written down while it runs: every operation, what it gave, and its error signals.

The pass is the step's own (`Passes.run`), on a model whose buffers and random numbers are lent (`isolated`). Frozen
parameters and the batch are taken onto its tape as well where that can be done, so that what runs before the first
trained parameter is seen too; error signals that the step does not compute are left out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_bp.autograd.entry import Entry
from torch_bp.step.agreement import against_autograd, against_differences
from torch_bp.step.isolated import isolated
from torch_bp.step.line import Passes
from torch_bp.step.plan import equations
from torch_bp.step.table import Trace, TraceLine

_SYMBOLS = {"weight": "W", "bias": "b"}
_LEFT = re.compile(r"(\w+) = ")


def record(passes: Passes, modules: Sequence[torch.nn.Module], inputs: Any, check: bool) -> Trace:
    """Run one pass and return what it did.

    Args:
        passes: of the step.
        modules: the model, and the loss if it is one.
        inputs: the arguments of the model, and the targets.
        check: compare the gradients.
    """
    names: dict[Tensor, str] = {p: name for name, p in modules[0].named_parameters()}
    trained = [p for p in names if p.requires_grad]
    batch = [t for t in tree_leaves(inputs[0]) if isinstance(t, Tensor)]
    found = None
    with contextlib.suppress(Exception):  # of any kind: what matters is whether the step's own pass has it
        found = _run(passes, modules, inputs, names, trained, True)
    notes, loss, output, gradients = found or _run(passes, modules, inputs, names, trained, False)
    result = Trace(
        type(modules[0]).__name__,
        modules[0].training,
        notes.lines,
        [t.detach().clone() for t in batch],
        output,
        loss,
        {names[p]: p.detach().clone() for p in names},
        {names[p]: g for p, g in zip(trained, gradients) if g is not None},
        [names[p] for p in trained],
    )
    if check:
        by_name = {names[p]: p for p in trained}
        result.against_autograd = against_autograd(passes, modules, inputs, by_name, result.gradients)
        result.against_differences, result.remark = against_differences(passes, modules, inputs, by_name)
    return result


def _run(
    passes: Passes,
    modules: Sequence[torch.nn.Module],
    inputs: Any,
    names: Mapping[Tensor, str],
    trained: Sequence[Tensor],
    wide: bool,
) -> tuple[_Notes, Tensor, Any, list[Tensor | None]]:
    """Run the pass; `wide` takes everything onto the tape that depends on the batch or on any parameter."""
    inputs = tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)
    batch = [t for t in tree_leaves(inputs[0]) if isinstance(t, Tensor) and t.is_floating_point()]
    leaves = [*trained, *(p for p in names if not p.requires_grad), *batch] if wide else list(trained)
    notes = _Notes(passes.path, names, trained, batch)
    output: list[Any] = []

    def model(*args: Any) -> Any:
        output.append(passes.model(*args))
        notes.in_loss = True
        return output[0]

    own = Passes(model, passes.loss_fn, passes.fallback, precision=passes.precision)
    own.path = passes.path
    with isolated(modules):
        loss, gradients = own.run(inputs, leaves, 1.0, noted=notes.noted, seen=notes.seen)
    notes.finish(loss)
    return notes, loss.detach().clone(), _detached(output[0]), gradients[: len(trained)]


def _detached(values: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().clone(), values)


class _Notes:
    """What a tape tells while it runs."""

    def __init__(
        self,
        path: Callable[[], str],
        names: Mapping[Tensor, str],
        trained: Sequence[Tensor],
        batch: Sequence[Tensor],
    ) -> None:
        self.lines: list[TraceLine] = []
        self.in_loss = False
        self._path, self._names = path, names
        self._trained = set(trained)
        self._batch = {id(t) for t in batch}
        self._noted: dict[int, tuple[Entry, TraceLine, list[str]]] = {}
        self._makers: dict[int, int] = {}  # by the number of a tensor on the tape, of the line that made it
        self._signalled: set[int] = set()  # numbers of tensors that the step has an error signal for
        self._seen: list[tuple[Entry, Sequence[Any]]] = []

    def noted(self, entry: Entry) -> None:
        wanted = [
            n is not None and (n in self._signalled or (isinstance(t, Tensor) and t in self._trained))
            for t, n in zip(entry.inputs, entry.sources)
        ]
        if any(wanted):
            self._signalled.update(n for n in entry.targets if n is not None)
        parameters = {k: self._names[t] for k, t in enumerate(entry.inputs) if t is not None and t in self._names}
        forward, _ = equations(entry)
        names, parts = _gradients(entry, parameters)
        sources = {
            names[k]: self._makers.get(n, 0)
            for k, n in enumerate(entry.sources)
            if n is not None and k not in parameters and (n in self._makers or id(entry.inputs[k]) in self._batch)
        }
        if not sources and not self.lines:
            sources = {names[0] if names else "dx": 0}
        made = [t for t, n in zip(entry.outputs, entry.targets) if n is not None]
        left = _LEFT.match(forward)
        symbol = left.group(1) if left else "y"
        symbols = [symbol] if len(made) == 1 else [f"{symbol}{k}" for k in range(1, len(made) + 1)]
        with torch._C.DisableTorchFunction():  # the tape is not to note this
            values = {name: t.detach().clone() for name, t in zip(symbols, made)}
        line = TraceLine(
            number=len(self.lines) + 1,
            path=_module(self._path() or ("loss" if self.in_loss else ""), list(parameters.values())),
            name=entry.name,
            forward=forward,
            backward={names[k]: parts[k] for k in range(len(names)) if wanted[k]},
            outputs=values,
            sources=sources,
            parameters={names[k]: name for k, name in parameters.items()},
            trained=any(wanted),
        )
        self._makers.update((n, line.number) for n in entry.targets if n is not None)
        self._noted[id(entry)] = entry, line, names
        self.lines.append(line)

    def seen(self, entry: Entry, gradients: Sequence[Any]) -> None:
        self._seen.append((entry, gradients))

    def finish(self, loss: Tensor) -> None:
        """Hand out the error signals: the sum of what those who take a tensor send back to it."""
        signals: dict[int, Tensor] = {}
        for entry, _, _ in self._noted.values():
            signals.update({n: torch.ones_like(loss) for t, n in zip(entry.outputs, entry.targets) if t is loss and n})
        if not any(n in self._signalled for n in signals):
            raise RuntimeError("the loss depends on no parameter that is trained")
        signals = dict([*signals.items()][-1:])  # a tensor that was written to has several numbers
        for entry, gradients in self._seen:
            _, line, names = self._noted[id(entry)]
            if not line.trained:
                continue
            targets = [n for n in entry.targets if n is not None]
            line.errors = {f"d{symbol}": signals.pop(n) for symbol, n in zip(line.outputs, targets) if n in signals}
            for k, (n, gradient) in enumerate(zip(entry.sources, gradients)):
                if n is None or gradient is None:
                    continue
                signals[n] = signals[n] + gradient if n in signals else gradient
                if names[k] in line.backward:
                    line.gradients[names[k]] = gradient


def _gradients(entry: Entry, parameters: Mapping[int, str]) -> tuple[list[str], list[str]]:
    """Return for each argument the symbol of the gradient there, and its equation, "" where none is written."""
    backward = getattr(entry.function, "equations", ("", ""))[1]
    parts = list(backward) if isinstance(backward, tuple) else [backward]
    if first := getattr(entry.function, "needed_first", ""):
        parts[0] = f"{parts[0]}, {first}"
    others = [k for k, n in enumerate(entry.sources) if n is not None and k not in parameters]
    names: list[str] = []
    texts: list[str] = []
    for k in range(len(entry.sources)):
        text = parts[k] if k < len(parts) else ""
        last = parameters[k].rpartition(".")[2] if k in parameters else ""
        if left := _LEFT.match(text):
            name = left.group(1)
        elif last:
            name = f"d{_SYMBOLS.get(last, last)}"
        else:
            name = "dx" if len(others) < 2 or k not in others else f"dx{others.index(k) + 1}"
        while name in names:
            name += "'"
        names.append(name)
        texts.append(text if parts[0] else f"{entry.name}, by autograd")
    return names, texts


def _module(path: str, parameters: Sequence[str]) -> str:
    """Return the module of an operation: where it runs, or inside of that the owner of its parameters."""
    owner = parameters[0].rpartition(".")[0] if parameters else ""
    return owner if owner.startswith(f"{path}." if path else "") else path
