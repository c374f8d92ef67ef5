"""Activations, eq. 12 to 16, as modules."""

import torch

from torch_bp.nn import functional as F


class Sigmoid(torch.nn.Sigmoid):
    """As `torch.nn.Sigmoid`; eq. 12."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """As `torch.nn.Tanh`; eq. 13."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.tanh(input)


class ReLU(torch.nn.ReLU):
    """As `torch.nn.ReLU`; eq. 14, with relu'(0) = 0."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """As `torch.nn.LeakyReLU`; eq. 15, with the slope as the derivative at 0."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class Softmax(torch.nn.Softmax):
    """As `torch.nn.Softmax`; eq. 16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """As `torch.nn.LogSoftmax`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)
