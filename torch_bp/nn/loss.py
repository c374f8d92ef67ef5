"""Losses, eq. 3 to 5, as modules."""

import torch

from torch_bp.nn import functional as F


class MSELoss(torch.nn.MSELoss):
    """As `torch.nn.MSELoss`: "mean" divides by the number of elements. See `HalfMSELoss` for the report's eq. 3."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class HalfMSELoss(torch.nn.Module):
    """The report's squared error, eq. 3: 1/(2n) times the sum over the n examples and their outputs.

    As a training loss its gradient is (prediction - target) / n, whatever the number of outputs; `MSELoss` with
    reduction "mean" is 2 / (number of outputs) of it.

    Shapes:
        input (n, *), target like it; the loss is a number. Different shapes raise ValueError.

    Example:
        >>> HalfMSELoss()(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.zeros(2, 2))
        tensor(0.5000)
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.half_mse_loss(input, target)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """As `torch.nn.CrossEntropyLoss`; eq. 4 on logits."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(torch.nn.NLLLoss):
    """As `torch.nn.NLLLoss`, on log-probabilities."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.nll_loss(input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


class BCELoss(torch.nn.BCELoss):
    """As `torch.nn.BCELoss`; eq. 5 on probabilities. Its equal weight of both classes holds for balanced data."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """As `torch.nn.BCEWithLogitsLoss`; eq. 5 on logits, exact where `BCELoss` after `Sigmoid` underflows."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )
