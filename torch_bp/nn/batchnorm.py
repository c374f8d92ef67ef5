"""Batch normalisation, sec. 9.3, as a module."""

from typing import Any

import torch

from torch_bp import ops
from torch_bp.autograd.function import recomputing
from torch_bp.nn import functional as F
from torch_bp.nn.activation import activation_module, parts


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
        return F.batch_norm(input, *self.arguments(input))

    def arguments(self, input: torch.Tensor) -> tuple[Any, ...]:
        """Return what `batch_norm` takes after the input, checked and counted as one batch."""
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
        return (
            self.running_mean if kept else None,
            self.running_var if kept else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
        )


class BatchNormActivation(BatchNorm1d):
    """`BatchNorm1d` and the activation after it, which keep one tensor of the batch's size for backward, not two.

    Parameters, buffers and `state_dict` are those of `BatchNorm1d`. What is computed is what the two modules compute.
    Tools that put another class in the place of a `BatchNorm1d`, as `SyncBatchNorm.convert_sync_batchnorm` does, lose
    the activation: give them the two modules.

    Args:
        num_features: C of an input (N, C) or (N, C, L).
        activation: a module, or its name in lower case: see `torch_bp.nn.LinearActivation`.
        device, dtype, **options: as of `BatchNorm1d`: eps, momentum, affine, track_running_stats, bias.

    Raises:
        TypeError, ValueError: the activation is none that can be joined.

    Example:
        >>> BatchNormActivation(3, "relu")(torch.randn(5, 3)).min()
        tensor(0., grad_fn=<MinBackward1>)
    """

    def __init__(
        self,
        num_features: int,
        activation: str | torch.nn.Module = "relu",
        *,
        device: Any = None,  # by name, for `torch.nn.utils.skip_init`
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options, device=device, dtype=dtype)
        self.activation = activation_module(activation)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        function, values = parts(self.activation)
        return ops.batch_norm_activation(function, values, input, *self.arguments(input))
