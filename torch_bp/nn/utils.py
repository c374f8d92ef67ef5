"""As `torch.nn.utils`: torch's own objects under our name."""

import torch.nn.utils
import torch.nn.utils.prune  # the one public sub-module that torch itself does not load

from torch_bp._mirror import mirror

__getattr__, __dir__, __all__ = mirror(globals(), torch.nn.utils)
