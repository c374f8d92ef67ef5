"""A ledger of dead units: which ones, since when, and why."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_bp.diagnostics.reading import DeadUnit

MOST = 32  # units of a layer that are named one by one


class Ledger:
    """Since which step each unit of each layer has been dead at every record; -1 for those that live."""

    def __init__(self) -> None:
        self.since: dict[str, Tensor] = {}

    def update(self, name: str, step: int, counts: Tensor) -> Tensor:
        """Enter for how many examples each unit was active in a step (O); return `since` (O)."""
        before = self.since.get(name)
        if before is None or before.shape != counts.shape:
            before = torch.full(counts.shape, -1, dtype=torch.int64)
        started = torch.where(before < 0, step, before)
        self.since[name] = torch.where(counts == 0, started, -1)
        return self.since[name]

    def state_dict(self) -> dict[str, list[int]]:
        return {name: since.tolist() for name, since in self.since.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self.since = {name: torch.tensor(since, dtype=torch.int64) for name, since in state.items()}


def describe(since: Tensor, causes: Tensor, bias: Tensor | None) -> tuple[DeadUnit, ...]:
    """Why units are dead.

    Args:
        since: of each unit, -1 for those that live (O).
        causes: largest z, largest |z - b|, for how many examples the unit would be active with bias 0, and the norm of
            its row of weights, which may be missing (4 or 3, O).
        bias: (O), or None.
    """
    dead = (since >= 0).nonzero().reshape(-1).tolist()
    found = []
    for unit in sorted(dead, key=lambda unit: (int(since[unit]), unit))[:MOST]:
        largest, alone, free = causes[:3, unit].tolist()
        norm = float(causes[3, unit]) if len(causes) > 3 else float("nan")
        if alone == 0:
            cause = "weights" if norm == 0 else "input"
        else:
            cause = "bias" if bias is not None and free > 0 else "weights"
        found.append(
            DeadUnit(unit, int(since[unit]), cause, norm, largest, None if bias is None else float(bias[unit]))
        )
    return tuple(found)
