"""Training without an autograd graph: the report's Algorithm 1 as one line of operations."""

from torch_bp.step.plan import Plan
from torch_bp.step.table import Trace
from torch_bp.step.train_step import TrainStep

__all__ = ["Plan", "Trace", "TrainStep"]
