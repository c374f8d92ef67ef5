"""As `torch.autograd`: our `Function` and gradient checks, and torch's own for every other name."""

import torch.autograd

from torch_bp._mirror import mirror
from torch_bp.autograd.function import Function
from torch_bp.autograd.gradient_check import GradcheckReport, directional_check, gradcheck, gradgradcheck

__getattr__, __dir__, __all__ = mirror(globals(), torch.autograd)
