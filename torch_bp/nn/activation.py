"""Activations, eq. 12 to 16 and the smooth and bounded ones that came after, as modules."""

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


class Hardtanh(torch.nn.Hardtanh):
    """As `torch.nn.Hardtanh`, with 0 as the derivative at both bounds."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ELU(torch.nn.ELU):
    """As `torch.nn.ELU`, with `alpha` as the derivative at 0."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.elu(input, self.alpha, self.inplace)


class Softplus(torch.nn.Softplus):
    """As `torch.nn.Softplus`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softplus(input, self.beta, self.threshold)


class SiLU(torch.nn.SiLU):
    """As `torch.nn.SiLU`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.silu(input, self.inplace)


class GELU(torch.nn.GELU):
    """As `torch.nn.GELU`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.gelu(input, approximate=self.approximate)


class Softmax(torch.nn.Softmax):
    """As `torch.nn.Softmax`; eq. 16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """As `torch.nn.LogSoftmax`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)
