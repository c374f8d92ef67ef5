"""Where a kernel is told that operations are being noted, to be run again over the same memory."""

from __future__ import annotations

from typing import Any

recorder: Any = None  # of the step that is being captured (`torch_bp.step.capture`)


def capturing() -> bool:
    """True while operations are being noted: what depends on values on the host would be frozen."""
    return recorder is not None and recorder.here()
