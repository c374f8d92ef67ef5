"""Files of readings, a line each."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch_bp.diagnostics.reading import Reading

READINGS = "readings.jsonl"  # in the folder of a run
_logger = logging.getLogger(__name__)


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


class JsonLines:
    """Appends readings to a file, a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end: int | None = None  # of the last line
        self._whole = False  # the file does not end within a line, as where a process was killed, or the disk was full
        self._shared = False  # something else writes to the file

    def write(self, reading: Reading) -> None:
        line = f"{reading.to_json()}\n".encode()
        try:
            file = self.path.open("ab")
        except FileNotFoundError:  # a folder is asked for only where there is none: to ask takes milliseconds
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab")
        with file:
            start = file.seek(0, os.SEEK_END)
            if not self._whole:
                start = _whole_lines(self.path, start)
                file.truncate(start)
            if self._end is not None and start > self._end and not self._shared:
                self._shared = True
                _logger.warning(
                    "watch: something else writes to %s, too, and readings of several runs cannot be told apart. Give "
                    "each a folder of its own.",
                    self.path,
                )
            self._whole = False
            file.write(line)
            file.flush()
            self._whole, self._end = True, start + len(line)

    def close(self) -> None:
        pass


def _whole_lines(path: Path, size: int) -> int:
    """How long a file of this size is up to its last line break."""
    with path.open("rb") as file:
        while size:
            start = max(size - 65536, 0)
            file.seek(start)
            if found := file.read(size - start).rfind(b"\n") + 1:
                return start + found
            size = start
    return 0
