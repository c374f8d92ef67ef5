"""A formula ready to run: as torch operations, or as the kernels of one engine, dtype and choice of flags."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torch_bp.kernels import cpu, cpu_text, cuda, cuda_text
from torch_bp.kernels.entry import Packed, entry
from torch_bp.kernels.expression import Expression
from torch_bp.kernels.native import UNFIT, handle_of
from torch_bp.kernels.table import LENT, Table

_address_of = torch.Tensor.data_ptr
_is_compiling = torch.compiler.is_dynamo_compiling
HALF = {torch.float16, torch.bfloat16}
PLAIN_NUMBERS = frozenset({float, int, bool, str, type(None)})


def as_torch(
    function: Callable[..., Any],
    updates: Sequence[str],
    names: Sequence[str],
    tensors: Sequence[Any],
    keywords: Mapping[str, Any],
) -> Any:
    """Run a formula's function on tensors as it is, and write the results where `updates` says.

    Half precision is computed in float32 and rounded once, as torch's own kernels do. What would lose its fraction is
    not written: torch's in-place operations refuse it as well.
    """
    for tensor in tensors:
        if not (tensor is None or isinstance(tensor, torch.Tensor)):
            raise TypeError(
                f"formula {function.__name__}: positional arguments ({', '.join(names)}) must be tensors, got "
                f"{type(tensor).__name__}; numbers are keyword-only arguments, after a * in the signature."
            )
    dtypes = {t.dtype for t in tensors if t is not None and t.dtype is not torch.int64}  # class indices stay
    given = tensors
    if updates and torch.is_grad_enabled():  # what is written must not be what autograd saved
        tensors = [t.clone() if n in updates and t is not None else t for n, t in zip(names, given)]
        tensors += given[len(names) :]
    half = dtypes and dtypes <= HALF
    if half:
        results = function(*[t.float() if t is not None and t.dtype in HALF else t for t in tensors], **keywords)
    else:
        results = function(*tensors, **keywords)
    if not half and not updates:
        return results
    several = isinstance(results, tuple)
    if half:
        dtype = functools.reduce(torch.promote_types, dtypes)
        rounded = [r.to(dtype) if r is not None and r.dtype is torch.float32 else r for r in as_tuple(results)]
        results = tuple(rounded) if several else rounded[0]
    if not updates:
        return results
    if len(as_tuple(results)) < len(updates):
        raise TypeError(
            f"formula {function.__name__}: it must return one result for each of updates={tuple(updates)}, None for "
            f"one that is None, got {len(as_tuple(results))}."
        )
    by_name = dict(zip(names, given))
    targets = [by_name[name] for name in updates]
    writes = [(t, r) for t, r in zip(targets, as_tuple(results)) if r is not None and r is not t]
    # A result that is itself a target (the previous value, kept) would be overwritten before it is read.
    writes = [(t, r.clone() if any(r is other for other in targets) else r) for t, r in writes]
    for target, result in writes:
        if not (target.is_floating_point() or torch.can_cast(result.dtype, target.dtype)):
            raise RuntimeError(f"result type {result.dtype} can't be cast to the desired output type {target.dtype}")
    for target, result in writes:
        write(target, result)
    return alone(as_tuple(results)[len(updates) :])


def write(target: torch.Tensor, result: torch.Tensor) -> None:
    """Write a result to its place."""
    if _is_compiling() and target.dtype is torch.float64 and not target.dim():
        torch._foreach_copy_([target], [result])  # torch.compile loses what `copy_` writes to such a tensor on the CPU
    else:
        target.copy_(result)


def as_tuple(results: Any) -> tuple[Any, ...]:
    """Return the results of a formula as a tuple, one alone too."""
    return results if isinstance(results, tuple) else (results,)


def presence(arguments: Sequence[Any]) -> int:
    """A bit for each positional argument that is not None, the last one's the lowest."""
    return int("".join("01"[a is not None] for a in arguments), 2)


def alone(results: Sequence[Any]) -> Any:
    """Return nothing, one result, or a tuple of several."""
    return tuple(results) if len(results) > 1 else results[0] if results else None


def host_values(expression: Expression, keywords: Mapping[str, Any], on_cpu: bool) -> Sequence[Any]:
    """Compute the scalars of a kernel from the keyword arguments."""
    if on_cpu and not PLAIN_NUMBERS.issuperset(map(type, keywords.values())):
        keywords = {n: v.item() if hasattr(v, "item") else v for n, v in keywords.items()}
    return expression.host(**keywords)


def as_returned(results: Sequence[torch.Tensor], expression: Expression) -> Any:
    """Return results as the function returns them: one alone, or a tuple with its Nones."""
    if len(expression.given) == 1:
        return results[0]
    left = iter(results)
    return tuple(next(left) if given else None for given in expression.given)


class Program:
    """The kernels of one formula for one engine, one dtype and one choice of static and absent arguments.

    Args:
        expression: what it computes.
        names: the formula's positional arguments.
        updates: those of them that it writes to.
        engine: "numba" or "triton".
        dtype: of all tensors.
        lent: those of `updates` that a table must not keep alive. Default: none.
    """

    def __init__(
        self,
        expression: Expression,
        names: Sequence[str],
        updates: Sequence[str],
        engine: str,
        dtype: torch.dtype,
        lent: Sequence[str] = (),
    ) -> None:
        self.expression = expression
        self.updates = bool(updates)
        if self.updates:
            targets = [n for n in updates if n in expression.inputs]
            given = expression.given[: len(expression.given) - len(expression.totals)]
            if given != tuple(n in expression.inputs for n in updates):
                raise TypeError(
                    f"formula {expression.name}: it must return one result for each of updates={tuple(updates)}, "
                    f"None for one that is None, got {sum(given)} for {', '.join(targets)}."
                )
        else:
            targets = [f"_result{i}" for i in range(len(expression.outputs) - len(expression.totals))]
        self._first = names[0]
        self.targets, self.totals = targets, len(expression.totals)
        self.numba = engine == "numba"
        module: Any = cpu if self.numba else cuda
        text: Any = cpu_text if self.numba else cuda_text
        self.chunk = text.CHUNK
        if not self.totals:  # which are had from lists alone
            self.single = module.Kernel(text.text_single, expression, targets, dtype)
        self.list = module.Kernel(text.text_list, expression, targets, dtype)
        self._copying: dict[Any, Any] = {}  # the list kernel that copies what it writes, by the dtype of the copy
        self._list_of = lambda copied: module.Kernel(
            functools.partial(text.text_list, copied=copied), expression, targets, dtype, "run"
        )
        self.writes = [LENT if n in lent else int(n in targets) for n in expression.inputs]
        self.written = [i for i, write in enumerate(self.writes) if write]
        self.scalars = bool(expression.scalars)
        self.created = 0 if self.updates else len(targets)
        self.alone = len(expression.given) == 1
        self.entry = self.packed = None
        if self.numba and self.created:
            self.entry = entry(expression, targets, dtype, by_rows=False)
            self.packed = Packed(expression, targets, dtype, by_rows=False)

    def at_once(self, first: torch.Tensor, handles: list[int], keywords: Mapping[str, Any]) -> Any:
        """Run over tensors that are looked at on the way; NotImplemented, and nothing done, if they are not for it."""
        values = self.expression.host(**keywords) if keywords or self.scalars else ()
        if self.alone:
            result = torch.empty_like(first)
            answer = self.entry.run(first.numel(), *handles, handle_of(result), *values)  # type: ignore[union-attr]
            return NotImplemented if answer == UNFIT else result
        results = [torch.empty_like(first) for _ in range(self.created)]
        answer = self.entry.run(first.numel(), *handles, *map(handle_of, results), *values)  # type: ignore[union-attr]
        if answer == UNFIT:
            return NotImplemented
        return as_returned(results, self.expression)

    def __call__(self, tensors: Sequence[Any], addresses: list[int], keywords: Mapping[str, Any]) -> Any:
        """Run over tensors that a kernel may serve; `addresses` are theirs."""
        present = [t for t in tensors if t is not None]
        first = present[0]
        values = host_values(self.expression, keywords, self.numba) if keywords or self.scalars else ()
        results = [torch.empty_like(first) for _ in range(self.created)]
        if self.numba:
            addresses += map(_address_of, results)
            count = first.numel()
            self.single.run(count, count, *addresses, *values)
        else:
            self.single.run_single([*present, *results], values)
        if self.updates:
            torch._C._increment_version([present[i] for i in self.written])
            return None
        return as_returned(results, self.expression)

    def copied(self, table: Table) -> tuple[str, torch.dtype] | None:
        """What a list kernel writes twice, where the table says so: the first argument, in another dtype."""
        return None if table.copies is None else (self._first, table.copied)  # type: ignore[return-value]

    def run_list(self, table: Table, values: Sequence[Any], partial: Any = None) -> None:
        """Run the list kernel of the CPU; totals of each chunk go to `partial`."""
        kernel, more = self.list, () if partial is None else (partial,)
        if table.copies is not None:
            more = (table.copies, *more)
            kernel = self._copying.get(table.copied)
            if kernel is None:
                kernel = self._copying[table.copied] = self._list_of(self.copied(table))
        kernel.run(table.elements, table.addresses, table.tensor, table.start, table.length, *more, *values)

    def foreach(
        self, lists: Sequence[Sequence[torch.Tensor]], table: Table, keywords: Mapping[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        """Run over lists of tensors, which a table has looked at; return the totals, one value per tensor each."""
        device = lists[0][0].device
        values = host_values(self.expression, keywords, self.numba)
        torch._C._increment_version(table.written)  # first: the tensors were just looked at
        for row, write in zip(lists, self.writes):
            if write == LENT:
                torch._C._increment_version(row)
        if not table.elements:
            return tuple(torch.zeros(self.totals, table.counts.size, dtype=torch.float64, device=device))
        if not self.numba:
            partial: Any = self.list.run_list(table, device, values, copied=self.copied(table))
        else:
            partial = np.empty((len(table.tensor), self.totals)) if self.totals else None
            self.run_list(table, values, partial)
            if partial is None:
                return ()
            partial = torch.from_numpy(partial)
        if not self.totals:
            return ()
        # in an order of its own each time, which an addition by atomic operations would not have
        counts = table.on_device(device)[2] if device.type == "cuda" else torch.from_numpy(table.counts)
        return torch.segment_reduce(partial, "sum", lengths=counts, axis=0, unsafe=True).unbind(1)
