"""The figure of sec. 3.2 for any network: values from left to right, error signals from right to left.

A column is an operation, in the order of the forward. Its box is as high as its output is wide, in powers of two.
Arrows between neighbours carry the norm of what they pass on; what goes further runs in lanes, values above and error
signals below. Longer networks are condensed: what follows a layer and belongs to nothing else (activation, dropout) is
drawn with it, and beyond that boxes are thin, names upright, and norms only in the curves below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch_bp.step.table import Summary, Trace, TraceLine, number

_APART, _THIN = 12, 18  # columns, beyond which the drawing is condensed
_FORWARD, _BACKWARD, _GRADIENT, _FROZEN = "#1f5fa8", "#c0392b", "#b8860b", "0.85"
_CHECKS = {None: "", True: "; gradients checked", False: "; CHECK FAILED"}
_LANE = 0.26
_HALF = 0.27  # of the width of a box


@dataclass
class Column:
    """One box: operations that are drawn together.

    Attributes:
        lines: the operations; none for the batch.
        shape: of the last output.
        norm: of it.
        error: norm of the error signal there, None if none arrives.
        gradients: symbol and norm.
        frozen: it has parameters, and none is trained.
        sources: by number of the column, the norm of the error signal that goes there, None if none does.
    """

    lines: list[TraceLine]
    shape: tuple[int, ...]
    norm: float
    error: float | None = None
    gradients: list[tuple[str, float]] = field(default_factory=list)
    frozen: bool = False
    sources: dict[int, float | None] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return next((line.path for line in self.lines if line.parameters), self.lines[0].path) if self.lines else "x"

    @property
    def names(self) -> list[str]:
        return [line.name for line in self.lines] or ["batch"]


def columns(trace: Trace) -> list[Column]:
    """Return the columns of a trace, the batch first."""
    takers: dict[int, list[TraceLine]] = {}
    for line in trace.lines:
        for n in dict.fromkeys(line.sources.values()):
            takers.setdefault(n, []).append(line)
    together = len(trace.lines) > _APART
    groups: list[list[TraceLine]] = []
    for line in trace.lines:
        before = groups[-1][-1] if groups else None
        follows = before is not None and set(line.sources.values()) == {before.number} and not line.parameters
        if together and follows and len(takers[before.number]) == 1 and line.path != "loss":  # type: ignore[union-attr]
            groups[-1].append(line)
        else:
            groups.append([line])
    place = {line.number: k for k, group in enumerate(groups, 1) for line in group} | {0: 0}
    first = Summary.of(trace.batch[0]) if trace.batch else Summary((), 0, 0, 0, 0, 0)
    return [Column([], first.shape, first.norm), *(_column(group, place, trace) for group in groups)]


def _column(group: list[TraceLine], place: dict[int, int], trace: Trace) -> Column:
    last = group[-1]
    size = Summary.of(last.output)
    names = [name for line in group for name in line.parameters.values()]
    gradients = [
        (symbol, Summary.of(line.gradients[symbol]).norm)
        for line in group
        for symbol in line.parameters
        if symbol in line.gradients
    ]
    sent: dict[int, Any] = {}
    for symbol, n in group[0].sources.items():
        signal = group[0].gradients.get(symbol)
        k = place[n]
        sent[k] = signal if sent.get(k) is None else sent[k] if signal is None else sent[k] + signal
    error = last.error
    return Column(
        group,
        size.shape,
        size.norm,
        None if error is None else Summary.of(error).norm,
        gradients,
        bool(names) and not any(name in trace.trained for name in names),
        {k: None if signal is None else Summary.of(signal).norm for k, signal in sent.items()},
    )


def draw(trace: Trace) -> Any:
    """Draw a trace."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a figure needs matplotlib. Remedy: pip install "torch_bp[recipes]"') from error
    parts = columns(trace)
    thin = len(parts) > _THIN
    width = min(max(7.0, (0.34 if thin else 1.12) * len(parts) + 1.2), 20.0)
    lanes = _lanes(parts)
    above = 1.25 + _LANE * (max(lanes.values(), default=-1) + 1)
    labels = _labels(parts, thin, width)
    depth = max(_extent(text, thin) for text in labels)
    heights = [0.75 * 2 * above, depth, 1.9]
    figure = Figure(figsize=(width, sum(heights) + 0.9), dpi=110)
    figure.set_layout_engine("constrained", hspace=0.0, h_pad=0.02)
    network, names, norms = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    network.set_xlim(-0.6, len(parts) - 0.4)
    network.set_ylim(-above, above)
    for axes in (network, names):
        axes.set_axis_off()
    for k, part in enumerate(parts):
        _box(network, k, part, parts, thin)
        for n, signal in part.sources.items():
            if n == k - 1:
                _neighbours(network, k, parts[n], part, signal, thin)
            else:
                _lane(network, n, k, lanes, parts, signal, thin)
    network.text(-0.6, above, "forward pass \u2192", color=_FORWARD, va="top", fontsize=9)
    network.text(len(parts) - 0.4, -above, "\u2190 backward pass", color=_BACKWARD, va="bottom", ha="right", fontsize=9)
    names.set_ylim(-depth, 0)
    for k, (part, text) in enumerate(zip(parts, labels)):
        _name(names, k, part, text, thin)
    _curves(norms, parts, thin)
    figure.suptitle(trace.headline() + _CHECKS[trace.passed], fontsize=11)
    return figure


def _label(shape: tuple[int, ...]) -> str:
    return "\u00d7".join(map(str, shape[1:] or shape)) or "1"


def _height(part: Column, parts: list[Column]) -> float:
    """Half the height of a box."""

    def wide(other: Column) -> float:
        return math.log2(1 + max(1, math.prod(other.shape[1:])))

    return 0.3 + 0.6 * wide(part) / max(map(wide, parts))


def _box(axes: Any, k: int, part: Column, parts: list[Column], thin: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    half = _height(part, parts)
    face = "#f4f6f8" if part.lines else "#e3edf7"
    face = _FROZEN if part.frozen else "#fbf1dc" if part.gradients else face
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(
        FancyBboxPatch(
            (k - _HALF, -half), 2 * _HALF, 2 * half, boxstyle=style, facecolor=face, edgecolor="0.35", linewidth=0.8
        )
    )
    if not thin:
        text = number(part.norm) if part.path == "loss" and not part.shape else _label(part.shape)
        axes.text(k, 0, text, ha="center", va="center", fontsize=8, rotation=90 if len(text) > 6 else 0)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str, thin: bool) -> None:
    size = {"mutation_scale": 5 if thin else 9, "linewidth": 0.8 if thin else 1.3}
    arrow = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0} | size
    axes.annotate("", end, start, arrowprops=arrow)


def _neighbours(axes: Any, k: int, before: Column, part: Column, signal: float | None, thin: bool) -> None:
    left, right = k - 1 + _HALF, k - _HALF
    _arrow(axes, (left, 0.1), (right, 0.1), _FORWARD, thin)
    if signal is not None:
        _arrow(axes, (right, -0.1), (left, -0.1), _BACKWARD, thin)
    if not thin:
        around = {"ha": "center", "fontsize": 7.5}
        axes.text(k - 0.5, 0.15, _short(before.norm), va="bottom", color=_FORWARD, **around)
        if signal is not None:
            axes.text(k - 0.5, -0.16, _short(signal), va="top", color=_BACKWARD, **around)


def _lanes(parts: list[Column]) -> dict[tuple[int, int], int]:
    """Give each connection that is not between neighbours a lane of its own over its stretch, short ones inside."""
    found: dict[tuple[int, int], int] = {}
    wanted = [(n, k) for k, part in enumerate(parts) for n in part.sources if n != k - 1]
    for n, k in sorted(wanted, key=lambda pair: pair[1] - pair[0]):
        taken = {lane for (a, b), lane in found.items() if a < k and n < b}
        found[n, k] = next(lane for lane in range(len(wanted)) if lane not in taken)
    return found


def _lane(
    axes: Any,
    n: int,
    k: int,
    lanes: dict[tuple[int, int], int],
    parts: list[Column],
    signal: float | None,
    thin: bool,
) -> None:
    lane = lanes[n, k]
    level = 1.0 + _LANE * (lane + 0.5)
    width = 0.8 if thin else 1.3
    start, end = n + 0.12, k - 0.12
    for sign, color, passed in ((1, _FORWARD, parts[n].norm), (-1, _BACKWARD, signal)):
        if passed is None:
            continue
        tops = sign * _height(parts[n], parts), sign * _height(parts[k], parts)
        begin, finish = (start, end) if sign > 0 else (end, start)
        bottom, top = tops if sign > 0 else tops[::-1]
        axes.plot([begin, begin, finish], [bottom, sign * level, sign * level], color=color, linewidth=width)
        _arrow(axes, (finish, sign * level), (finish, top), color, thin)
        if not thin:
            background = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            around = {"ha": "center", "va": "center", "fontsize": 7.5, "color": color, "bbox": background}
            axes.text(_free(n, k, lane, lanes), sign * level, _short(passed), **around)


def _free(n: int, k: int, lane: int, lanes: dict[tuple[int, int], int]) -> float:
    """Return where on a lane there is room for a number: away from where others pass on their way out."""
    crossing = [at for (a, b), other in lanes.items() if other > lane for at in (a + 0.12, b - 0.12)]
    places = [n + share * (k - n) for share in (0.5, 0.38, 0.62, 0.27, 0.73)]
    return next((at for at in places if all(abs(at - other) > 0.25 for other in crossing)), places[0])


def _labels(parts: list[Column], thin: bool, width: float) -> list[list[tuple[str, dict[str, Any]]]]:
    """Return for each column what stands below its box, with the style of each line."""
    every = max(1, math.ceil(len(parts) * 0.17 / width)) if thin else 1
    found: list[list[tuple[str, dict[str, Any]]]] = []
    for k, part in enumerate(parts):
        names = " ".join(part.names)
        if thin:
            text = f"{_last(part.path, 18)}  {_first(names, 20)}" if part.path else _first(names, 30)
            found.append([(text if k % every == 0 else "", {"fontsize": 7, "rotation": 90})])
            continue
        lines: list[tuple[str, dict[str, Any]]] = [(_last(part.path, 14), {"fontsize": 9, "fontweight": "bold"})]
        lines += [(_first(name, 19), {"fontsize": 7.5, "color": "0.3"}) for name in part.names]
        if part.frozen:
            lines.append(("frozen", {"fontsize": 7.5, "color": "0.3", "fontstyle": "italic"}))
        lines += [(f"{s}  {_short(norm)}", {"fontsize": 7.5, "color": _GRADIENT}) for s, norm in part.gradients]
        found.append(lines)
    return found


def _extent(lines: list[tuple[str, dict[str, Any]]], thin: bool) -> float:
    """Inches that the text of a column takes."""
    return max(0.057 * len(lines[0][0]) + 0.1, 0.2) if thin else 0.165 * len(lines) + 0.1


def _name(axes: Any, k: int, part: Column, lines: list[tuple[str, dict[str, Any]]], thin: bool) -> None:
    for row, (text, style) in enumerate(lines):
        axes.text(k, -0.03 - 0.165 * row, text, ha="center", va="top", **style)


def _curves(axes: Any, parts: list[Column], thin: bool) -> None:
    """Draw the norms over the columns."""
    size = 2.5 if thin else 4.5
    gradients = [max((norm for _, norm in part.gradients), default=None) for part in parts]
    for label, values, color, mark in (
        ("value, forward", [part.norm for part in parts], _FORWARD, "o-"),
        ("error signal, backward", [part.error for part in parts], _BACKWARD, "o-"),
        ("largest gradient of its parameters", gradients, _GRADIENT, "D"),
    ):
        shown = [v if v is not None and v > 0 and math.isfinite(v) else math.nan for v in values]
        if not all(map(math.isnan, shown)):
            axes.plot(range(len(parts)), shown, mark, color=color, label=label, markersize=size, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylabel("norm", fontsize=9)
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.tick_params(labelsize=8, labelbottom=False, bottom=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.lines:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=3, frameon=False, fontsize=8.5)


def _short(value: float) -> str:
    return f"{value:.0f}" if 99.5 <= value < 9999.5 else f"{value:.2g}"


def _first(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def _last(text: str, length: int) -> str:
    return text if len(text) <= length else f"\u2026{text[1 - length :]}"
