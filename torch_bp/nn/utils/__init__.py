"""As `torch.nn.utils`: gradient clipping written here, and torch's own objects for every other name."""

import torch.nn.utils
import torch.nn.utils.prune  # the one public sub-module that torch itself does not load

from torch_bp._mirror import mirror
from torch_bp.nn.utils import clip_grad
from torch_bp.nn.utils.clip_grad import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

__getattr__, __dir__, __all__ = mirror(globals(), torch.nn.utils)
