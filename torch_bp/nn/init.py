"""As `torch.nn.init`: torch's own objects under our name."""

import torch.nn.init

from torch_bp._mirror import mirror

__getattr__, __dir__, __all__ = mirror(globals(), torch.nn.init)
