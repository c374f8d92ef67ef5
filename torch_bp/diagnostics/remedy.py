"""Remedies that several rules name."""

from __future__ import annotations

from torch_bp.diagnostics.history import History

INIT = "torch_bp.nn.init.auto_(model)"
EARLIER_CHECKPOINT = "go back to a checkpoint before it, with a learning rate 10 times lower"


def lower_rate(history: History) -> str:
    """The cure for steps that are too large."""
    rate = max(history.now.lr, default=0.0)
    return f"a learning rate 10 times lower: lr={rate / 10:g}" if rate else "a learning rate 10 times lower"
