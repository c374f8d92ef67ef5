"""start: the first call of a kernel in a fresh process that finds it on disk, Numba's own start included."""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

from tests.benchmarks.protocol import Result, interval

LIMIT = 0.7  # seconds
PROGRAMS = {
    "first optimizer step": """
        weight = torch.nn.Parameter(torch.randn(512, 784))
        weight.grad = torch.randn(512, 784)
        call = torch_bp.optim.Adam([weight]).step
    """,
    "first activation's backward": """
        dy = y = torch.rand(128, 512)
        call = lambda: tanh_backward(dy, y)
    """,
}
_BEFORE = "import time, torch, torch_bp, torch_bp.optim\nfrom torch_bp.ops.pointwise import tanh_backward\n"
_AFTER = "start = time.perf_counter()\ncall()\nprint(time.perf_counter() - start)\n"


def _seconds(program: str) -> float:
    text = _BEFORE + "\n".join(line.strip() for line in program.splitlines()) + "\n" + _AFTER
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, env=os.environ)
    return float(done.stdout)


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the time of each over the limit, from so many processes as there would be pairs, up to 15."""
    for what, program in PROGRAMS.items():
        _seconds(program)  # leaves the kernels on disk
        times = [_seconds(program) for _ in range(min(pairs, 15))]
        median = statistics.median(times)
        low, high = interval(times)
        limits = low / LIMIT, high / LIMIT
        yield Result(
            group, what, "fresh process", f"{LIMIT} s", median / LIMIT, *limits, median * 1e6, LIMIT * 1e6, 1.0
        )
