"""Paired measurement: ours and a peer in turn, in one process, and the ratio pair by pair."""

import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Result:
    """One line of the table: ours over a peer."""

    group: str
    what: str
    workload: str
    peer: str
    ratio: float
    low: float
    high: float
    ours_us: float
    peer_us: float
    target: float | None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.ratio <= self.target

    def as_dict(self) -> dict:
        return asdict(self) | {"met": self.met}


def paired(ours: Callable[[], object], peer: Callable[[], object], pairs: int = 40) -> tuple[float, ...]:
    """Return the median ratio of times ours / peer, its bootstrap 95 % interval, and both medians in microseconds.

    Each sample runs long enough to be read off the clock; the order is A B B A, so that a drift of the machine's speed
    falls on both.
    """
    repeats = [_repeats(ours), _repeats(peer)]
    ratios, times = [], ([], [])
    for number in range(pairs):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        sample = [0.0, 0.0]
        for which in order:
            sample[which] = _time((ours, peer)[which], repeats[which])
        ratios.append(sample[0] / sample[1])
        for record, value in zip(times, sample):
            record.append(value)
    low, high = interval(ratios)
    ours_us, peer_us = (statistics.median(t) * 1e6 for t in times)
    return statistics.median(ratios), low, high, ours_us, peer_us


def _time(function: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _repeats(function: Callable[[], object], seconds: float = 4e-3) -> int:
    for _ in range(3):
        function()
    return max(1, int(seconds / max(_time(function, 2), 1e-7)))


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    return medians[25], medians[974]


def machine() -> str:
    """One line: processor, threads, versions."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            processor = line.split(":")[1].strip()
            break
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{processor} ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
