"""Numbers that JSON does not know."""

import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """NaN and infinities, in any nesting of dicts, lists and tuples, as the text that `float` reads.

    Example:
        >>> plain({"error": float("inf"), "shape": (2, 3)})
        {'error': 'inf', 'shape': [2, 3]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
