"""As `torch.optim`: the optimizers that torch_bp writes by hand, and torch's own for every other name.

Loaded on first use only: a second `Optimizer` subclass named `SGD` in the process makes
`LightningCLI --optimizer SGD` ambiguous for everyone.

What torch refuses at the first step, and these take: `capturable=True` on the CPU, where nothing can be captured, and
`fused=True` with complex parameters or sparse gradients (where the optimizer takes sparse ones at all).
"""

import torch.optim

from torch_bp._mirror import mirror
from torch_bp.optim import lr_scheduler
from torch_bp.optim.adadelta import Adadelta
from torch_bp.optim.adagrad import Adagrad
from torch_bp.optim.adam import Adam
from torch_bp.optim.adamax import Adamax
from torch_bp.optim.adamw import AdamW
from torch_bp.optim.fused import FusedStep, fused_step
from torch_bp.optim.in_backward import apply_in_backward
from torch_bp.optim.lion import Lion
from torch_bp.optim.loading import load_state_dict_by_name
from torch_bp.optim.nadam import NAdam
from torch_bp.optim.optimizer import RuleOptimizer
from torch_bp.optim.param_groups import param_groups
from torch_bp.optim.radam import RAdam
from torch_bp.optim.range_test import RangeTest, lr_find
from torch_bp.optim.rmsprop import RMSprop
from torch_bp.optim.sgd import SGD

__getattr__, __dir__, __all__ = mirror(globals(), torch.optim)
