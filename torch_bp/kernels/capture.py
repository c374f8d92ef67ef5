"""Where a kernel is told that operations are being noted, to be run again over the same memory."""

from __future__ import annotations

import threading
from typing import Any

recorders: dict[int, Any] = {}  # of the steps that are being captured, by thread (`torch_bp.step.recorder`)
_thread = threading.get_ident


def capturing() -> bool:
    """True while operations are being noted: what depends on values on the host would be frozen."""
    return bool(recorders) and _thread() in recorders


def recorder() -> Any:
    """Return what notes the operations of this thread, None where nothing does."""
    return recorders.get(_thread()) if recorders else None
