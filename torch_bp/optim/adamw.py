"""AdamW: Adam whose weight decay shrinks the weight directly instead of entering the moments.

W <- (1 - lr weight_decay) W, then Adam's update. Source: Loshchilov and Hutter 2019.
"""

import torch

from torch_bp.optim.adam import Adam, adam
from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.optimizer import RuleOptimizer
from torch_bp.optim.step import step


class AdamW(torch.optim.AdamW):
    """As `torch.optim.AdamW`: the rule of `Adam` with `decoupled_weight_decay`.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = AdamW([weight], lr=0.5, weight_decay=0.5)
        >>> (2 * weight).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.2500])
    """

    rule = staticmethod(adam)
    counts_steps = True
    state_layout = Adam.state_layout
    scalars = Adam.scalars
    sparse = Adam.sparse
    initial = RuleOptimizer.initial
    step = step
    load_state_dict = load_state_dict
