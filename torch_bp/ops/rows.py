"""Any tensor seen as a matrix whose rows run along one of its dimensions, which is how formulas over rows see it."""

import math
from collections.abc import Sequence

import torch


def to_rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the matrix (R, C) of the rows of `tensor` along `dim`; a number is one row of one column."""
    if tensor.dim() == 2 and dim in (1, -1):
        return tensor
    if tensor.dim() == 0:
        return tensor.reshape(1, 1)
    columns = tensor.shape[dim]
    moved = tensor.movedim(dim, -1)
    return moved.reshape(math.prod(moved.shape[:-1]), columns)  # -1 cannot be told from no columns


def from_rows(rows: torch.Tensor, like: torch.Tensor, dim: int) -> torch.Tensor:
    """Undo `to_rows`: shape the matrix like the tensor it came from."""
    if like.dim() == 2 and dim in (1, -1):
        return rows
    if like.dim() == 0:
        return rows.reshape(())
    return rows.reshape(like.movedim(dim, -1).shape).movedim(-1, dim)


def shaped(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the tensor in this shape; itself if it has it: a view costs as much as a small tensor's arithmetic."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)
