"""A formula bound to tensors that stay where they are: what is to be asked of them is asked once, and a call runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torch_bp.kernels import cpu, native
from torch_bp.kernels.program import PLAIN_NUMBERS, as_tuple, presence
from torch_bp.kernels.sequence import Record
from torch_bp.kernels.table import Table

if TYPE_CHECKING:
    from torch_bp.kernels.formula import Formula


def bound(
    formula: Formula, tensors: Sequence[Any], results: Sequence[Any], keywords: Mapping[str, Any]
) -> Callable[[], Any] | Record:
    """Return a function, or a record, that computes a formula of these tensors again, into `results`.

    Numbers are read now, one-element tensors at every call.
    """
    tensors = formula.padded(tensors) if len(tensors) < len(formula.tensors) else tensors
    keywords = formula.defaults | dict(keywords)
    present = [t for t in tensors if t is not None]
    program = formula.prepare(present[0], presence(tensors), keywords)
    targets = [t for t in results if t is not None]
    if program is None or program.entry is None:
        return functools.partial(_into, formula, tensors, targets, keywords)
    run, elements = program.entry.run, present[0].numel()
    if program.packed is not None and elements < cpu.PARALLEL_FROM:
        record = program.packed.record([*present, *targets], keywords)
        if record is not None:
            return record
    handles = [*map(native.handle_of, present), *map(native.handle_of, targets)]
    if PLAIN_NUMBERS.issuperset(map(type, keywords.values())):
        return functools.partial(_must_run, run, elements, *handles, *program.expression.host(**keywords))
    expression = program.expression

    def call() -> None:
        read = {n: v.item() if hasattr(v, "item") else v for n, v in keywords.items()}
        _must_run(run, elements, *handles, *expression.host(**read))

    return call


def bound_total(formula: Formula, *lists: Sequence[torch.Tensor]) -> Callable[[], float] | None:
    """Return a function that gives the one total of a formula over lists of tensors that stay where they are.

    None where no kernel on the CPU serves.
    """
    table, program = Table(), None
    if lists[0] and lists[0][0].is_cpu and len(lists) == len(formula.tensors):
        program = formula.prepare(lists[0][0], 2 ** len(lists) - 1, {})
    if program is None or program.totals != 1 or not program.numba:
        return None
    if not table.refresh(lists, program.writes, program.chunk) or not table.elements:
        return None
    partial = np.empty((len(table.tensor), 1))
    arguments = table.elements, table.addresses, table.tensor, table.start, table.length, partial
    run, add = program.list.run, partial.sum

    def total() -> float:
        run(*arguments)
        return float(add())

    return total


def _into(
    formula: Formula, tensors: Sequence[Any], targets: Sequence[torch.Tensor], keywords: Mapping[str, Any]
) -> None:
    results = formula(*tensors, **keywords)
    for target, result in zip(targets, (r for r in as_tuple(results) if r is not None)):
        target.copy_(result)


def _must_run(run: Callable[..., int], *arguments: Any) -> None:
    if run(*arguments) == native.UNFIT:
        raise RuntimeError("a kernel was bound to tensors that have since become unfit for it.")
