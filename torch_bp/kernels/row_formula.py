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

from torch_bp.kernels import cpu, cpu_row_text, cuda, cuda_row_text
from torch_bp.kernels.entry import Packed, entry
from torch_bp.kernels.expression import Expression, trace
from torch_bp.kernels.formula import Formula
from torch_bp.kernels.native import UNFIT, handle_of
from torch_bp.kernels.program import as_returned, host_values
from torch_bp.kernels.symbol import FormulaError

_address_of = torch.Tensor.data_ptr


class RowProgram:
    """The kernel of a row formula for one engine, dtype and choice of absent arguments."""

    totals, created = 0, True

    def __init__(self, expression: Expression, engine: str, dtype: torch.dtype) -> None:
        self.expression = expression
        self.numba = engine == "numba"
        module, text = (cpu, cpu_row_text) if self.numba else (cuda, cuda_row_text)
        targets = [f"_result{i}" for i in range(len(expression.outputs))]
        self.by_columns = not self.numba and cuda_row_text.by_columns(expression)
        form: Any = cuda_row_text.text_columns if self.by_columns else text.text_rows  # type: ignore[attr-defined]
        self.kernel: Any = module.Kernel(form, expression, targets, dtype)  # type: ignore[attr-defined]
        self.sums = torch.float32 if self.by_columns and dtype is not torch.float64 else torch.float64
        self.kinds = [output.kind for output in expression.outputs]
        self.scalars = bool(expression.scalars)
        self._matrix = next(i for i, kind in enumerate(expression.kinds.values()) if kind == "tensor")
        self.entry = self.packed = None
        if self.numba and self._matrix == 0:
            self.entry = entry(expression, targets, dtype, by_rows=True)
            self.packed = Packed(expression, targets, dtype, by_rows=True)

    def at_once(self, first: torch.Tensor, handles: list[int], keywords: Mapping[str, Any]) -> Any:
        """Run over tensors that are looked at on the way; NotImplemented, and nothing done, if they are not for it."""
        if first.dim() != 2:
            return NotImplemented
        values = self.expression.host(**keywords) if keywords or self.scalars else ()
        results = self._results(first)
        answer = self.entry.run(first.numel(), *handles, *map(handle_of, results), *values)  # type: ignore[union-attr]
        if answer == UNFIT:
            return NotImplemented
        return as_returned(results, self.expression)

    def __call__(self, tensors: Sequence[Any], addresses: list[int], keywords: Mapping[str, Any]) -> Any:
        """Run over tensors that a kernel may serve; `addresses` are theirs."""
        given = [t for t in tensors if t is not None]
        first = given[self._matrix]
        count, columns = first.shape
        values = host_values(self.expression, keywords, self.numba) if keywords or self.scalars else ()
        results = self._results(first)
        if self.numba:
            self.kernel.run(count * columns, count, columns, *addresses, *map(_address_of, results), *values)
            return as_returned(results, self.expression)
        rows = 1
        if "column sum" in self.kinds:
            rows = cuda.ROWS if self.by_columns else -(-count // cpu_row_text.BLOCKS)
            parts = -(-count // rows), columns
            results = [
                first.new_zeros(parts, dtype=self.sums) if kind == "column sum" else result
                for kind, result in zip(self.kinds, results)
            ]
        run = self.kernel.run_columns if self.by_columns else self.kernel.run_rows
        run(count, columns, rows, [*given, *results], values)
        results = [r.sum(0).to(first.dtype) if kind == "column sum" else r for kind, r in zip(self.kinds, results)]
        return as_returned(results, self.expression)

    def _results(self, first: torch.Tensor) -> list[torch.Tensor]:
        """Return room for the results."""
        count, columns = first.shape
        return [
            torch.empty_like(first)
            if kind == "tensor"
            else first.new_empty((count, 1))
            if kind == "row"
            else first.new_empty(columns)
            for kind in self.kinds
        ]


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

    def _check(self, tensors: Sequence[Any]) -> None:
        for name, tensor in zip(self.tensors, tensors):
            column = self.kinds[name] in ("row", "label") and isinstance(tensor, torch.Tensor)
            if column and (tensor.dim() < 2 or tensor.shape[-1] != 1):
                raise ValueError(
                    f"formula {self.name}: {name} must be (R, 1), one value per row, got {tuple(tensor.shape)}; "
                    f"{name}.unsqueeze(1) makes a column of a vector."
                )

    def _addresses(self, tensors: Sequence[torch.Tensor | None]) -> list[int] | None:
        first: Any = next((t for t, k in zip(tensors, self._kinds) if k == "tensor" and t is not None), None)
        if first is None or first.dim() != 2:
            return None
        shape, dtype, device = first.shape, first.dtype, first.device
        shapes = {"tensor": shape, "row": (shape[0], 1), "label": (shape[0], 1), "column": shape[1:]}
        addresses = []
        try:
            for tensor, kind in zip(tensors, self._kinds):
                if tensor is None:
                    continue
                if (
                    tensor.layout is not torch.strided
                    or tensor.shape != shapes[kind]
                    or tensor.dtype is not (torch.int64 if kind == "label" else dtype)
                    or not tensor.is_contiguous()
                    or tensor.device != device
                ):
                    return None
                addresses.append(tensor.data_ptr())
        except RuntimeError:  # a tensor inside `is_grads_batched` has no address to ask for
            return None
        return addresses if all(addresses) else None  # empty tensors, zero tensors and freed storages have none

    def _program(self, serving: str, dtype: torch.dtype, absent: tuple[str, ...], keywords: Mapping[str, Any]) -> Any:
        static = self.static_values(keywords)
        defaults = {n: v for n, v in self.defaults.items() if n in self.scalars}
        expression = trace(self.function, self.name, self.kinds, absent, self.scalars, static, defaults)
        if expression.totals:
            raise FormulaError(f"formula {self.name}: a total has no kernel in a formula over rows; use row_sum.")
        return RowProgram(expression, serving, dtype)
