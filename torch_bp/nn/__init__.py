"""As `torch.nn`: the classes that torch_bp writes by hand, and torch's own for every other name."""

import torch.nn

from torch_bp._mirror import mirror
from torch_bp.nn import functional, init, utils
from torch_bp.nn.activation import (
    ELU,
    GELU,
    Hardtanh,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from torch_bp.nn.batchnorm import BatchNorm1d, BatchNormActivation
from torch_bp.nn.dropout import Dropout
from torch_bp.nn.linear import Linear
from torch_bp.nn.linear_activation import LinearActivation
from torch_bp.nn.loss import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    HalfMSELoss,
    MSELoss,
    NLLLoss,
)
from torch_bp.nn.mlp import MLP
from torch_bp.nn.normalization import LayerNorm
from torch_bp.nn.residual import Residual
from torch_bp.ops import pairing

__getattr__, __dir__, __all__ = mirror(globals(), torch.nn)
