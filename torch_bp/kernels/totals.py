"""Totals of a formula over the same sizes of tensors again and again, on the CPU, with little but the kernel.

`foreach_` gives the same for any tensors on any device, as tensors; here, where it is done at every step of a training,
the answer is the host's, in an array that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torch_bp.kernels.plain import grad_enabled, recording, unwatched
from torch_bp.kernels.table import Table

if TYPE_CHECKING:
    from torch_bp.kernels.formula import Formula


class Totals:
    """What the totals of a formula of one tensor are, for each tensor of a list.

    Args:
        formula: with one tensor, no scalars, and totals alone.

    Example:
        >>> from torch_bp.kernels.norm import sum_of_squares
        >>> totals = Totals(sum_of_squares)
        >>> totals((torch.ones(3), torch.full((2,), 2.0)))
        array([[3.],
               [8.]])
    """

    def __init__(self, formula: Any) -> None:
        self._formula: Formula = formula.formula
        self._table, self._built = Table(), 0
        self._partial = self._found = np.empty((0, 0))
        self._first = np.empty(0, np.int64)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> np.ndarray | None:
        """Return the totals (n, T) in float64, which the next call overwrites; None where no kernel of the CPU serves.

        Args:
            tensors: of one dtype; the same tuple as last time is looked at faster, and kept until another comes.
        """
        first = tensors[0]
        if not first.is_cpu or not unwatched() or (grad_enabled() and recording(tensors)):
            return None
        program, table = self._formula.prepare(first, 1, {}), self._table
        if program is None or not program.numba or not table.refresh([tensors], program.writes, program.chunk):
            return None
        if table.built != self._built:
            if not table.counts.all():  # a tensor without elements
                self._table = Table()
                return None
            self._built = table.built
            self._partial = np.empty((len(table.tensor), program.totals))
            self._found = np.empty((len(table.counts), program.totals))
            self._first = np.cumsum(table.counts) - table.counts
        program.list.run(table.elements, table.addresses, table.tensor, table.start, table.length, self._partial)
        with np.errstate(all="ignore"):  # sums of what is not finite are no news here
            return np.add.reduceat(self._partial, self._first, axis=0, out=self._found)
