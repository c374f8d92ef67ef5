"""As `torch.optim.lr_scheduler`."""

import torch.optim.lr_scheduler

from torch_bp._mirror import mirror

__getattr__, __dir__, __all__ = mirror(globals(), torch.optim.lr_scheduler)
