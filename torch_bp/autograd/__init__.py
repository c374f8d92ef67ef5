"""As `torch.autograd`: our `Function` and `gradcheck`, and torch's own for every other name."""

import torch.autograd

from torch_bp._mirror import mirror
from torch_bp.autograd._gradcheck import gradcheck
from torch_bp.autograd.function import Function

__getattr__, __dir__, __all__ = mirror(globals(), torch.autograd)
