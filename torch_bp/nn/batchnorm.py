"""Batch normalisation, sec. 9.3, as a module."""

import torch

from torch_bp.autograd.function import recomputing
from torch_bp.nn import functional as F


class BatchNorm1d(torch.nn.BatchNorm1d):
    """As `torch.nn.BatchNorm1d`, with a hand-written backward.

    A batch moves the running statistics once, also where activation checkpointing computes it again during backward;
    there torch's class counts it twice.

    Example:
        >>> layer = BatchNorm1d(1)
        >>> layer(torch.tensor([[10.0], [30.0]])).detach()
        tensor([[-1.0000],
                [ 1.0000]])
        >>> layer.running_mean
        tensor([2.])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        tracking = self.training and self.track_running_stats
        if tracking and self.num_batches_tracked is not None and not recomputing():
            self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            momentum = self.momentum
        elif tracking and self.num_batches_tracked is not None:  # the mean of all batches so far
            momentum = 1.0 / float(self.num_batches_tracked)
        else:
            momentum = 0.0
        kept = tracking or not self.training
        return F.batch_norm(
            input,
            self.running_mean if kept else None,
            self.running_var if kept else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
        )
