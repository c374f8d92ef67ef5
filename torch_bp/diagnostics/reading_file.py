"""Files of readings, a line each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch_bp.diagnostics.reading import Reading


def write_readings(path: str | Path, readings: Iterable[Reading]) -> None:
    """Append readings to a `.jsonl` file, a line each."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.writelines(f"{reading.to_json()}\n" for reading in readings)


def read_readings(path: str | Path) -> Iterator[Reading]:
    """The readings of a `.jsonl` file, in order. A last line that was cut off, as by a kill, is left out.

    Raises:
        ValueError: another line holds no reading.
        OSError: the file cannot be read.
    """
    lines: Sequence[str] = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            return
        if line.strip():
            yield Reading.from_json(line)
