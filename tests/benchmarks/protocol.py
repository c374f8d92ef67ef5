"""Paired measurement: ours and a peer in turn, in one process, and the ratio pair by pair."""

import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
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
    ours_value: float
    peer_value: float
    target: float | None = None
    unit: str = "us"  # of the two values: microseconds, seconds, bytes or units in the last place
    working_set: int | None = None  # bytes; small ones may stay in a cache
    most: float | None = None  # target of `high`, where that is the worst of many

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio <= self.target and (self.most is None or self.high <= self.most)

    def as_dict(self) -> dict:
        return asdict(self) | {"met": self.met}


def agree(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Raise unless both computed the same; `atol` is a share of the largest element of each of the peer's tensors."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape, f"ours is of shape {tuple(a.shape)}, the peer's {tuple(b.shape)}"
        largest = b.detach().norm(torch.inf).item()
        assert math.isfinite(largest), "the peer's values are not finite"
        for rows, expected in zip(a.reshape(-1).split(2**24), b.reshape(-1).split(2**24)):  # a comparison needs copies
            torch.testing.assert_close(rows, expected, rtol=rtol, atol=atol * largest)


def paired(
    ours: Callable[[], object], peer: Callable[[], object], pairs: int = 30, device: str = "cpu"
) -> tuple[float, ...]:
    """Return the median ratio of times ours / peer, its bootstrap 95 % interval, and both medians in microseconds.

    Each sample runs long enough to be read off the clock; the order is A B B A, so that a drift of the machine's speed
    falls on both.
    """
    seconds = _cuda_seconds if device == "cuda" else _seconds
    repeats = [_repeats(ours, seconds), _repeats(peer, seconds)]
    ratios, times = [], ([], [])
    for number in range(pairs):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        sample = [0.0, 0.0]
        for which in order:
            sample[which] = seconds((ours, peer)[which], repeats[which])
        ratios.append(sample[0] / sample[1])
        for record, value in zip(times, sample):
            record.append(value)
    low, high = interval(ratios)
    ours_us, peer_us = (statistics.median(t) * 1e6 for t in times)
    return statistics.median(ratios), low, high, ours_us, peer_us


def counted(ours: int, peer: int) -> tuple[float, ...]:
    """Return the ratio of two exact counts in the form of `paired`, with no spread."""
    return ours / peer, ours / peer, ours / peer, ours, peer


def _seconds(function: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _cuda_seconds(function: Callable[[], object], repeats: int) -> float:
    """On the device's clock, from an idle device on: launches that it must wait for are part of the time."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def _repeats(function: Callable[[], object], seconds: Callable[..., float], enough: float = 4e-3) -> int:
    for _ in range(3):
        function()
    return max(1, int(enough / max(seconds(function, 2), 1e-7)))


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    return medians[25], medians[974]


def few(pairs: int) -> int:
    """Return the number of pairs for work that takes long, and varies less for it."""
    return min(pairs, 10)


def size(count: float) -> str:
    """Return a number of bytes in words: "5.12 kB"."""
    power = min(3, int(math.log10(max(count, 1)) / 3))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def machine(device: str = "cpu") -> str:
    """One line: processor, threads, versions, and the GPU."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            processor = line.split(":")[1].strip()
            break
    capability = torch.backends.cpu.get_cpu_capability()
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, " if device == "cuda" else ""
    return (
        f"{gpu}{processor} ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
