"""What is computed: the forward and the hand-written backward of each operation, side by side."""

from torch_bp.ops.batch_norm import batch_norm
from torch_bp.ops.batch_norm_activation import batch_norm_activation
from torch_bp.ops.binary_cross_entropy import binary_cross_entropy, binary_cross_entropy_with_logits
from torch_bp.ops.cross_entropy import cross_entropy
from torch_bp.ops.dropout import dropout
from torch_bp.ops.layer_norm import layer_norm
from torch_bp.ops.linear import linear
from torch_bp.ops.linear_activation import linear_activation
from torch_bp.ops.nll_loss import nll_loss
from torch_bp.ops.pointwise import (
    activation,
    elu,
    gelu,
    gelu_tanh,
    hardtanh,
    leaky_relu,
    relu,
    saves_input,
    saves_output,
    sigmoid,
    silu,
    softplus,
    tanh,
)
from torch_bp.ops.softmax import log_softmax, softmax
from torch_bp.ops.squared_error import half_mse_loss, mse_loss

__all__ = [
    "activation",
    "batch_norm",
    "batch_norm_activation",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "dropout",
    "elu",
    "gelu",
    "gelu_tanh",
    "half_mse_loss",
    "hardtanh",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_activation",
    "log_softmax",
    "mse_loss",
    "nll_loss",
    "relu",
    "saves_input",
    "saves_output",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]
