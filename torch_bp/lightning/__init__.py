"""For Lightning, and alone to import it: a module, callbacks (range test, monitor, guard), the length of a schedule."""

from torch_bp.lightning.backprop_module import BackpropModule
from torch_bp.lightning.guard import DivergenceGuard
from torch_bp.lightning.lr_finder import LRFinder, find_by_config, total_steps
from torch_bp.lightning.monitor import BackpropMonitor

__all__ = ["BackpropModule", "BackpropMonitor", "DivergenceGuard", "LRFinder", "find_by_config", "total_steps"]
