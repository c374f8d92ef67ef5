"""A matrix as a picture: layers downwards with their names, steps to the right, and the scale of its colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Anchors of a scale that grows evenly in lightness, after matplotlib's viridis; read without colour too.
_ANCHORS = np.array(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]],
    dtype=np.float64,
)
MISSING, BROKEN = (230, 230, 230), (220, 20, 20)  # not measured, and not finite
WIDTH = 350  # pixels of a picture: a card of TensorBoard, which makes letters of a wider one illegible
_MOST, _ROWS = 500, (2, 20)  # pixels of all rows together, and of one, at least and at most
_TEXT, _GAP, _BAR = 11, 5, 10  # height of text, and of what lies between; width of the scale
_LONGEST = 16  # letters of a name


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Bytes (R, C, 3) of a matrix (R, C): dark at `low` and light at `high`.

    Args:
        values: NaN where nothing was measured, infinite where that was not finite.
    """
    finite = np.isfinite(values)
    share = (np.where(finite, values, low) - low) / (high - low or 1.0)
    places = np.linspace(0, 1, len(_ANCHORS))
    found = np.stack([np.interp(share, places, channel) for channel in _ANCHORS.T], axis=-1)
    found[np.isnan(values)] = MISSING
    found[np.isinf(values)] = BROKEN
    return found.round().astype(np.uint8)


def heat_map(values: np.ndarray, names: Sequence[str], steps: Sequence[int], title: str) -> np.ndarray:
    """The picture (H, `WIDTH`, 3) in bytes of a matrix (layers, steps); its scale ends at its least and largest value.

    Args:
        values: see `colours`; more steps than there are pixels are thinned out evenly.
        names: of the layers.
        steps: of the columns.
        title: what is shown.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_TEXT)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    shown = [name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}" for name in names]
    ends = [f"{value:.3g}" for value in (high, low)]
    left = _GAP + int(max(map(font.getlength, shown), default=0)) + _GAP
    right = WIDTH - 3 * _GAP - _BAR - int(max(map(font.getlength, ends)))
    top, row = 2 * _GAP + _TEXT, min(max(_MOST // max(len(values), 1), _ROWS[0]), _ROWS[1])
    bottom = top + row * len(values)
    image = Image.new("RGB", (WIDTH, bottom + 2 * _GAP + _TEXT), "white")
    at = np.linspace(0, values.shape[1] - 1, right - left).round().astype(int)
    _paste(image, colours(values, low, high)[:, at].repeat(row, axis=0), left, top)
    scale = np.linspace(high, low, max(bottom - top, 2 * _TEXT))[:, None]
    _paste(image, colours(scale, low, high).repeat(_BAR, axis=1)[: bottom - top], right + _GAP, top)
    draw = ImageDraw.Draw(image)
    draw.text((left, _GAP), title, "black", font)
    every = -(-(_TEXT + 1) // row)  # rows from one name to the next
    for number in range(0, len(shown), every):
        draw.text((left - _GAP, top + row * number + row / 2), shown[number], "black", font, anchor="rm")
    for value, place, anchor in zip(ends, (top, bottom), ("lt", "ls")):
        draw.text((right + 2 * _GAP + _BAR, place), value, "black", font, anchor=anchor)
    for step, place, anchor in ((steps[0], left, "lt"), (steps[-1], right, "rt")):
        draw.text((place, bottom + _GAP), f"step {step}", "black", font, anchor=anchor)
    return np.asarray(image)


def _paste(image: object, pixels: np.ndarray, left: int, top: int) -> None:
    from PIL import Image

    image.paste(Image.fromarray(np.ascontiguousarray(pixels)), (left, top))  # type: ignore[attr-defined]
