"""As `torch.nn.init`, torch's own objects under our name, with two functions more: `auto_` and `report`."""

import torch.nn.init

from torch_bp._mirror import mirror
from torch_bp.nn.auto_init import Initialization, LayerInit, auto_
from torch_bp.nn.signal_report import SignalReport, SignalRow, report

__getattr__, __dir__, __all__ = mirror(globals(), torch.nn.init)
