"""What is computed: the forward and the hand-written backward of each operation, side by side."""

from torch_bp.ops.binary_cross_entropy import binary_cross_entropy, binary_cross_entropy_with_logits
from torch_bp.ops.cross_entropy import cross_entropy
from torch_bp.ops.linear import linear
from torch_bp.ops.linear_activation import linear_activation
from torch_bp.ops.nll_loss import nll_loss
from torch_bp.ops.pointwise import activation, leaky_relu, relu, saves_input, saves_output, sigmoid, tanh
from torch_bp.ops.softmax import log_softmax, softmax
from torch_bp.ops.squared_error import half_mse_loss, mse_loss

__all__ = [
    "activation",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "half_mse_loss",
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
    "softmax",
    "tanh",
]
