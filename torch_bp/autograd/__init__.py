"""As `torch.autograd`: our `Function`, `gradcheck` and `gradgradcheck`, and torch's own for every other name."""

import torch.autograd

from torch_bp._mirror import mirror
from torch_bp.autograd.function import Function
from torch_bp.autograd.gradient_check import GradcheckReport, gradcheck, gradgradcheck

__getattr__, __dir__, __all__ = mirror(globals(), torch.autograd)
