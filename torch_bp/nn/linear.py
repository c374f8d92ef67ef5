"""The affine layer, eq. 1."""

import torch

from torch_bp.nn.functional import linear


class Linear(torch.nn.Linear):
    """As `torch.nn.Linear`, with the hand-written backward of eq. 1.

    Example:
        >>> layer = Linear(3, 2)
        >>> layer(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)
