"""Dropout as a module."""

import torch

from torch_bp.nn import functional as F


class Dropout(torch.nn.Dropout):
    """As `torch.nn.Dropout`, dropping the same elements on the CPU; backward keeps one bit for each.

    Example:
        >>> layer = Dropout(0.5).eval()
        >>> layer(torch.ones(2))
        tensor([1., 1.])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)
