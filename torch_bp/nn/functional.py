"""As `torch.nn.functional`: the functions that torch_bp writes by hand, and torch's own for every other name."""

import torch.nn.functional

from torch_bp._mirror import mirror

__getattr__, __dir__, __all__ = mirror(globals(), torch.nn.functional)
