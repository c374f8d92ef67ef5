"""Distributed tensors (DTensor), of which a list kernel may update the part that lies on this rank.

An update rule works element by element. Where parameter, gradient and state are cut alike, the update of each rank's
part is therefore the whole update, with nothing to be sent. A `Partial` gradient, which is yet to be summed over ranks,
and tensors that are cut differently are for DTensor's own operations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def is_distributed(tensor: Any) -> bool:
    """True for a DTensor. Who has one has imported its module, which takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(tensor) is getattr(module, "DTensor", None)


def local(tensor: Any) -> Tensor:
    """The part on this rank: the memory itself, not a view that autograd knows of, as `to_local` gives."""
    return tensor._local_tensor


def locals_of(tensors: Iterable[Any]) -> list[Tensor]:
    return [tensor._local_tensor for tensor in tensors]


def alike(param: Any, others: Sequence[Any]) -> bool:
    """True if these are DTensors, of one mesh, shape and placements, none of them a sum that is yet to be made."""
    placements, mesh, shape = param.placements, param.device_mesh, param.shape
    if any(placement.is_partial() for placement in placements):
        return False
    return all(
        is_distributed(t) and t.placements == placements and t.device_mesh == mesh and t.shape == shape for t in others
    )
