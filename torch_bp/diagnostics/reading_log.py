"""From the records of a monitor to readings: waited for, kept, written, and looked at by the rules, in their order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from torch_bp.diagnostics.assembly import Assembly
from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.reading import Reading
from torch_bp.diagnostics.record import Record
from torch_bp.diagnostics.verdicts import Verdicts
from torch_bp.diagnostics.watch_options import WatchOptions
from torch_bp.diagnostics.writers import Output

_logger = logging.getLogger(__name__)


class ReadingLog:
    """Takes records of steps, which may be on their way from a device, and makes readings of them.

    Args:
        output: all that readings are written to.
        options: `keep`, `write_every`, `on_reading`, `diagnose` and `silent` of `watch`.
        safely: makes a call, and survives it.

    Attributes:
        assembly: makes readings of records; set it before the first comes, and where layers change.
    """

    assembly: Assembly

    def __init__(self, output: Output, options: WatchOptions, safely: Callable[..., Any]) -> None:
        self._output, self._safely = output, safely
        self._write_every, self._on_reading = options.write_every, options.on_reading
        self._verdicts = Verdicts(output.text, silent=options.silent) if options.diagnose else None
        self._waiting: deque[Record] = deque()
        self._kept: deque[Record | Reading] = deque(maxlen=options.keep)
        self._deaf = False  # nothing is heard

    @property
    def counts(self) -> tuple[int, int]:
        """How many readings are kept or on their way, and how many findings there are so far; it waits for nothing."""
        findings = 0 if self._verdicts is None else len(self._verdicts.findings)
        return len(self._kept) + len(self._waiting), findings

    def add(self, record: Record) -> None:
        """Take the next one."""
        self._waiting.append(record)

    def note(self, step: int, facts: Mapping[str, Any]) -> None:
        """Put facts to the latest record, if it is of this step."""
        if self._waiting and self._waiting[-1].step == step:
            self._waiting[-1].facts |= facts

    def all(self) -> list[Reading]:
        """All readings that are kept, the latest last."""
        self.arrived(wait=True)
        found = [self._assembled(kept) if isinstance(kept, Record) else kept for kept in self._kept]
        self._kept.clear()
        self._kept += [reading for reading in found if reading is not None]
        return list(self._kept)  # type: ignore[arg-type]

    def last(self) -> Reading | None:
        """The latest reading."""
        self.arrived(wait=True)
        while self._kept:
            kept = self._kept.pop()
            reading = self._assembled(kept) if isinstance(kept, Record) else kept
            if reading is not None:
                self._kept.append(reading)
                return reading
        return None

    def findings(self) -> list[Finding]:
        """What is wrong, by the readings that were written so far."""
        self.arrived(wait=True)
        return [] if self._verdicts is None else self._verdicts.findings

    def close(self) -> None:
        """Write what is left."""
        self.arrived(wait=True)
        if self._verdicts is not None:
            self._safely(self._verdicts.close)

    def arrived(self, wait: bool) -> None:
        """Read the records that have come to the host, and write those whose turn it is."""
        while self._waiting and (wait or self._waiting[0].ready):
            record = self._waiting.popleft()
            if not self._deaf and not record.heard and record.facts["compiled"]:
                self._deaf = True
                _logger.warning(
                    "watch: nothing is heard of the layers of the compiled model, as it ran before it was watched. "
                    "Call watch before the first run, or torch.compiler.reset() after it."
                )
            due = self._write_every is None or record.step % self._write_every == 0
            if due or record.nonfinite or record.facts["refused"]:
                self._write(record)
            else:
                self._kept.append(record)

    def _write(self, record: Record) -> None:
        reading = self._safely(self.assembly.reading, record)
        if reading is None:
            return
        self._kept.append(reading)
        self._output.write(reading)
        if self._verdicts is not None:
            self._safely(self._verdicts, reading)
        if self._on_reading is not None:
            self._safely(self._on_reading, reading, what="on_reading has failed")

    def _assembled(self, record: Record) -> Reading | None:
        return self._safely(self.assembly.reading, record, remember=False)
