"""Curves as plain text, and several of them as one PNG."""

from collections.abc import Mapping, Sequence
from typing import Any


def text(values: Sequence[float], width: int = 64, height: int = 10, ends: tuple[str, str] = ("0", "")) -> str:
    """A chart of `values`, evenly spaced along the width, in ASCII characters.

    Each column shows the whole range of its values. `ends` are the labels below its first and last column.

    >>> print(text([0.0, 1.0, 2.0, 3.0], width=4, height=4))
             3 |   *
               |  *
               | *
             0 |*
               +----
                0
    """
    low, high = min(values), max(values)
    span, width = high - low or 1.0, min(width, len(values))
    rows = [[" "] * width for _ in range(height)]
    for column in range(width):
        begin, end = column * len(values) // width, (column + 1) * len(values) // width
        levels = [round((value - low) / span * (height - 1)) for value in values[begin:end]]
        for level in range(min(levels), max(levels) + 1):
            rows[height - 1 - level][column] = "*"
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    lines = [f"{label:>10} |{''.join(row)}".rstrip() for label, row in zip(labels, rows)]
    apart = max(width - len(ends[0]), len(ends[1]) + 2)
    below = ends[0] + (ends[1].rjust(apart) if width > 1 else "")
    return "\n".join([*lines, f"{'':>10} +{'-' * width}", f"{'':>10}  {below}".rstrip()])


def range_test(test: Any) -> str:
    """A chart of what a `torch_bp.optim.RangeTest` has found, and what it suggests."""
    if not test.lr:
        return str(test)
    drawn = text(test.smoothed, width=100, ends=(f"{test.lr[0]:.2g}", f"{test.lr[-1]:.2g}"))
    return f"smoothed loss over the learning rate, in equal ratios\n{drawn}\n{test}"


def png(curves: Mapping[str, Sequence[float]], path: str, xlabel: str = "step", ylabel: str = "learning rate") -> None:
    """Draw each curve into a panel of one picture.

    Raises:
        ImportError: matplotlib is missing, which `pip install "torch_bp[recipes]"` brings.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a picture needs matplotlib. Remedy: pip install "torch_bp[recipes]"') from error
    columns = min(len(curves), 4)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(max(3.2 * columns, 5.0), max(2.2 * rows, 3.0)), layout="constrained", dpi=100)
    panels: Any = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, values) in zip(panels.flat, curves.items()):
        axes.plot(range(len(values)), values)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.set_ylim(bottom=min(0.0, *values))
    for axes in panels.flat[len(curves) :]:
        axes.set_axis_off()
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    figure.savefig(path, format="png")
