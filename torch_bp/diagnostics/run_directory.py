"""The readings of a run, found in the folder that it wrote."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from torch_bp.diagnostics.event_file import PATTERN, read_events
from torch_bp.diagnostics.reading import Reading
from torch_bp.diagnostics.reading_file import read_readings

SUFFIX = ".jsonl"


def read_run(path: str | Path) -> list[Reading]:
    """Readings of a folder, of its `.jsonl` file or else of its event files; or of such a file itself.

    Args:
        path: a folder that `watch` or a TensorBoard writer wrote to.

    Returns:
        At least one reading, in the order of steps.

    Raises:
        ValueError: there is no run, or more than one, or a file holds something else.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"run: {path} must be a folder or a file, got none of that name. Name what watch wrote to.")
    if path.is_file():
        return _of_files(path, [path])
    if lines := sorted(path.glob(f"*{SUFFIX}")):
        return _of_files(path, lines)
    if any(path.glob(PATTERN)):
        return _not_empty(path, read_events(path), "event files hold no scalar that is known")
    runs = sorted({found.parent for kind in (f"*{SUFFIX}", PATTERN) for found in path.rglob(kind)})
    if len(runs) == 1:
        return read_run(runs[0])
    if runs:
        shown = ", ".join(str(run.relative_to(path)) for run in runs[:8])
        raise ValueError(f"run: {path} must hold one run, got {len(runs)}: {shown}. Name one of them.")
    content = ", ".join(sorted(found.name for found in path.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"run: {path} must hold {SUFFIX} readings or TensorBoard events, got {content}. "
        "Write them by torch_bp.watch(model, optimizer, folder)."
    )


def _of_files(path: Path, files: list[Path]) -> list[Reading]:
    if len(files) > 1:
        raise ValueError(
            f"run: {path} must hold one {SUFFIX} file, got {', '.join(file.name for file in files[:8])}. Name one."
        )
    try:
        readings = list(read_readings(files[0]))
    except UnicodeDecodeError as error:
        raise ValueError(f"run: {files[0]} must be text, a reading a line, got bytes that are none.") from error
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error
    taken = [reading for reading in readings if not reading.refused]
    back = sum(after.step <= before.step for before, after in itertools.pairwise(taken))
    if back * 4 > len(readings) > 4:
        raise ValueError(
            f"run: {files[0]} must hold one run, got lines of several at once, as steps go back {back} times in "
            f"{len(readings)} readings. Give each monitor a folder of its own."
        )
    return _not_empty(files[0], readings, "it holds no whole line")


def _not_empty(path: Path, readings: list[Reading], why: str) -> list[Reading]:
    if not readings:
        raise ValueError(f"run: {path} must hold a reading, got none: {why}. The run may have ended before its first.")
    return in_order(readings)


def in_order(readings: Iterable[Reading]) -> list[Reading]:
    """Without the steps that a resumed run has taken again: what came last counts, beside what was refused.

    Example:
        >>> [r.step for r in in_order([Reading(0), Reading(10), Reading(20), Reading(10), Reading(15)])]
        [0, 10, 15]
    """
    kept: list[Reading] = []
    for reading in readings:
        while kept and kept[-1].step >= reading.step and not (kept[-1].refused and kept[-1].step == reading.step):
            kept.pop()
        kept.append(reading)
    return kept
