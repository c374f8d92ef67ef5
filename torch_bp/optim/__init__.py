"""As `torch.optim`: the optimizers that torch_bp writes by hand, and torch's own for every other name.

Loaded on first use only: a second `Optimizer` subclass named `SGD` in the process makes
`LightningCLI --optimizer SGD` ambiguous for everyone.
"""

import torch.optim

from torch_bp._mirror import mirror
from torch_bp.optim import lr_scheduler

__getattr__, __dir__, __all__ = mirror(globals(), torch.optim)
