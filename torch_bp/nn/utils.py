"""As `torch.nn.utils`: torch's own objects under our name."""

import torch.nn.utils

from torch_bp._mirror import mirror

__getattr__, __dir__, __all__ = mirror(globals(), torch.nn.utils)
