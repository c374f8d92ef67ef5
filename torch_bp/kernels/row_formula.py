"""A formula over the rows of matrices: what `@formula(per_row=...)` makes of a function.

Arguments are matrices (R, C), columns (R, 1) that hold one value per row, rows (C) that hold one per column, and
columns of class indices. `row_sum` and `row_max` turn one value per element into one per row; `column_sum` makes one
per column, which is a result. As torch operations these are sums and broadcasting; as a kernel each row is read as
often as there are sums that wait for another, and stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch_bp.kernels import cpu, cpu_text, cuda, cuda_text, plain
from torch_bp.kernels.expression import Expression, trace
from torch_bp.kernels.formula import Formula, numbers
from torch_bp.kernels.program import as_returned, as_torch, host_values
from torch_bp.kernels.symbol import FormulaError

_BLOCKS = 32  # into which the rows are cut, at the most, where columns are added up: each has sums of its own
_address_of = torch.Tensor.data_ptr


class RowProgram:
    """The kernel of a row formula for one engine, dtype and choice of absent arguments."""

    def __init__(self, expression: Expression, engine: str, dtype: torch.dtype) -> None:
        self.expression = expression
        self.numba = engine == "numba"
        module, text = (cpu, cpu_text) if self.numba else (cuda, cuda_text)
        targets = [f"_result{i}" for i in range(len(expression.outputs))]
        self.kernel: Any = module.Kernel(text.text_rows, expression, targets, dtype)  # type: ignore[attr-defined]
        self.kinds = [output.kind for output in expression.outputs]

    def __call__(
        self, tensors: Sequence[Any], first: torch.Tensor, addresses: list[int], keywords: Mapping[str, Any]
    ) -> Any:
        """Run over tensors that a kernel may serve; `first` is a matrix, `addresses` are theirs."""
        count, columns = first.shape
        block = max(1, cpu_text.CHUNK // columns)
        if "column sum" in self.kinds:
            block = max(block, -(-count // _BLOCKS))
        values = host_values(self.expression, keywords, self.numba) if keywords or self.expression.scalars else ()
        sums = -(-count // block), columns
        results = [
            torch.empty_like(first)
            if kind == "tensor"
            else first.new_empty((count, 1))
            if kind == "row"
            else first.new_zeros(sums, dtype=torch.float64)
            for kind in self.kinds
        ]
        if self.numba:
            self.kernel.run(count * columns, count, columns, block, *addresses, *map(_address_of, results), *values)
        else:
            given = [*(t for t in tensors if t is not None), *results]
            self.kernel.run_rows(count, columns, block if "column sum" in self.kinds else 1, given, values)
        for position, kind in enumerate(self.kinds):
            if kind == "column sum":
                results[position] = results[position].sum(0).to(first.dtype)
        return as_returned(results, self.expression)


class RowFormula(Formula):
    """As `Formula`, over rows.

    Attributes:
        kinds: for each positional argument "tensor" (R, C), "row" (R, 1), "column" (C) or "label", class indices
            (R, 1) of int64.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        per_row: Sequence[str],
        per_column: Sequence[str],
        labels: Sequence[str],
        static: Sequence[str] = (),
    ) -> None:
        super().__init__(function, (), static)
        self.check_names("per_row", per_row, self.tensors)
        self.check_names("per_column", per_column, self.tensors)
        self.check_names("labels", labels, self.tensors)
        twice = {*per_row} & {*labels} | {*per_row} & {*per_column} | {*per_column} & {*labels}
        if twice:
            raise TypeError(
                f"formula {self.name}: {', '.join(sorted(twice))} must be in one of per_row, per_column and labels."
            )
        named = {"row": per_row, "column": per_column, "label": labels}
        self.kinds = {n: next((k for k, names in named.items() if n in names), "tensor") for n in self.tensors}
        self._kinds = tuple(self.kinds.values())
        if "tensor" not in self._kinds:
            raise TypeError(
                f"formula {self.name}: an argument must be a matrix, but per_row, per_column and labels name them all."
            )

    def __call__(self, *tensors: Any, **keywords: Any) -> Any:
        """Compute the formula on matrices and columns; return its results."""
        if len(tensors) < len(self.tensors):
            tensors = self.padded(tensors)
        served = self._matrices(tensors, keywords)
        if served is None:
            return as_torch(self.function, (), self.tensors, tensors, keywords)
        program, first, addresses = served
        return program(tensors, first, addresses, keywords)

    def _matrices(
        self, tensors: Sequence[Any], keywords: Mapping[str, Any]
    ) -> tuple[RowProgram, torch.Tensor, list[int]] | None:
        """Decide whether a kernel serves: it, the first matrix and all addresses; None for torch."""
        if not plain.unwatched() or len(tensors) != len(self._kinds) or plain.recording(tensors):
            return None
        if keywords and not numbers(keywords.values()):
            return None
        first: Any = next((t for t, k in zip(tensors, self._kinds) if k == "tensor" and t is not None), None)
        if type(first) not in plain.PLAIN_TYPES or first.dim() != 2:
            return None
        shape, dtype, device = first.shape, first.dtype, first.device
        shapes = {"tensor": shape, "row": (shape[0], 1), "label": (shape[0], 1), "column": shape[1:]}
        addresses = []
        try:
            for tensor, kind in zip(tensors, self._kinds):
                if tensor is None:
                    continue
                if (
                    type(tensor) not in plain.PLAIN_TYPES
                    or tensor.layout is not torch.strided
                    or tensor.shape != shapes[kind]
                    or tensor.dtype is not (torch.int64 if kind == "label" else dtype)
                    or not tensor.is_contiguous()
                    or tensor.is_neg()
                    or tensor.device != device
                ):
                    return None
                addresses.append(tensor.data_ptr())
        except RuntimeError:  # a tensor inside `is_grads_batched` has no address to ask for
            return None
        if not all(addresses):  # empty tensors, zero tensors and freed storages
            return None
        absent: tuple[str, ...] = ()
        if len(addresses) != len(tensors):
            absent = tuple(n for n, t in zip(self.tensors, tensors) if t is None)
        program: Any = self._prepare(first, absent, keywords)
        return None if program is None else (program, first, addresses)

    def _program(self, serving: str, dtype: torch.dtype, absent: tuple[str, ...], keywords: Mapping[str, Any]) -> Any:
        static = self.static_values(keywords)
        defaults = {n: v for n, v in self._defaults.items() if n in self.scalars}
        expression = trace(self.function, self.name, self.kinds, absent, self.scalars, static, defaults)
        if expression.totals:
            raise FormulaError(f"formula {self.name}: a total has no kernel in a formula over rows; use row_sum.")
        return RowProgram(expression, serving, dtype)
