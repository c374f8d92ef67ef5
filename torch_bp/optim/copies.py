"""Copies of parameters in half precision, written by the update in the pass in which it writes the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from torch_bp.kernels import Table
from torch_bp.kernels.plain import dense


class Copies:
    """Parameters in half precision, for products that read them so; an optimizer may keep them up to date.

    Whatever else writes to a parameter is copied by `refresh`. Where nobody but the optimizer can have written since
    the last one, it goes by the versions of parameters. Anywhere else there may have been a `p.data.clamp_()`, of which
    versions tell nothing, and it copies all.

    Args:
        dtype: `torch.bfloat16` or `torch.float16`.

    Example:
        >>> import torch
        >>> from torch_bp import optim
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer, copies = optim.SGD([weight], lr=0.5), Copies(torch.bfloat16)
        >>> half = copies.of(weight)
        >>> copies.attach(optimizer)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> half
        tensor([0.5000, 0.5000], dtype=torch.bfloat16)
        >>> copies.stale()
        []
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generation = 0  # grows with each copy that is made or forgotten: addresses are then told anew
        self._of: dict[int, Tensor] = {}
        self._params: list[Tensor] = []
        self._versions: dict[int, int] = {}

    def find(self, p: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the copy in this dtype of a parameter that a list kernel can write one of, None for another tensor."""
        if dtype is not self.dtype or type(p) is not torch.nn.Parameter or p.dtype is not torch.float32:
            return None
        return self.of(p) if dense(p) else None

    def of(self, p: Tensor) -> Tensor:
        """Return the copy of a parameter, which stays where it is."""
        copy = self._of.get(id(p))
        if copy is None or copy.shape != p.shape or copy.stride() != p.stride():
            self._params += [p] * (copy is None)
            with _disable_current_modes():  # whoever notes operations is to find the copy there
                self._of[id(p)] = p.detach().to(self.dtype, memory_format=torch.preserve_format)
            self._versions[id(p)] = p._version
            self.generation += 1
        return self._of[id(p)]

    def clear(self) -> None:
        """Forget all copies."""
        self._of.clear()
        self._params.clear()
        self._versions.clear()
        self.generation += 1

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer of torch_bp write the copies; others leave that to `refresh`."""
        if hasattr(optimizer, "rule"):
            optimizer._copies = self  # type: ignore[attr-defined]

    def stale(self) -> list[Tensor]:
        """Return the parameters that somebody else has written to."""
        return [p for p in self._params if p._version != self._versions[id(p)]]

    def refresh(self, trusting: bool = False) -> None:
        """Copy all, or, `trusting` that nobody else was at it, what is stale."""
        stale = self.stale() if trusting else self._params
        if stale:
            with torch.no_grad():
                torch._foreach_copy_([self._of[id(p)] for p in stale], stale)
            self.written(stale)

    def written(self, params: Iterable[Tensor]) -> None:
        """Note that these copies are up to date."""
        for p in params:
            if id(p) in self._versions:
                self._versions[id(p)] = p._version

    def tell(self, table: Table, params: Sequence[Tensor]) -> bool:
        """Write into a table where the copies of its parameters are; False if it has none."""
        found = [self._of.get(id(p)) for p in params]
        if all(t is None for t in found) or params[0].dtype is not torch.float32:
            table.copies = None
            return False
        addresses = np.array([0 if t is None else t.data_ptr() for t in found], np.int64)
        if table.copies is None or not np.array_equal(addresses, table.copies):
            table.copies, table.copied = addresses, self.dtype
        return True


def copies_of(optimizer: Any) -> Copies | None:
    """Return what an optimizer was told to write besides."""
    return optimizer.__dict__.get("_copies")
