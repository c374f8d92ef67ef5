"""A matrix as a picture: layers downwards, steps to the right, a pixel block each."""

from __future__ import annotations

import numpy as np

# Anchors of a scale that grows evenly in lightness, after matplotlib's viridis; read without colour too.
_ANCHORS = np.array(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]],
    dtype=np.float64,
)
MISSING, BROKEN = (230, 230, 230), (220, 20, 20)  # not measured, and not finite


def heat_map(values: np.ndarray, block: tuple[int, int] = (12, 4), widest: int = 800) -> np.ndarray:
    """The picture (H, W, 3) in bytes of a matrix (layers, steps), from its least value, dark, to its largest.

    Args:
        values: NaN where nothing was measured, infinite where that was not finite.
        block: height and width of an entry in pixels.
        widest: pixels; earlier steps are thinned out evenly.
    """
    columns = values.shape[1]
    most = max(widest // block[1], 1)
    if columns > most:
        values = values[:, np.linspace(0, columns - 1, most).round().astype(int)]
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 1.0)
    share = (np.where(finite, values, low) - low) / (high - low or 1.0)
    places = np.linspace(0, 1, len(_ANCHORS))
    colours = np.stack([np.interp(share, places, channel) for channel in _ANCHORS.T], axis=-1)
    colours[np.isnan(values)] = MISSING
    colours[np.isinf(values)] = BROKEN
    return colours.round().astype(np.uint8).repeat(block[0], axis=0).repeat(block[1], axis=1)
