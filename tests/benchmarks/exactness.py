"""R5: errors against float64 over torch's own, of every operation's output and gradients, on hostile inputs too.

They are counts, and so a test: `test_no_less_exact_than_torch` in `tests/ops/test_numbers.py` holds every single ratio
to the worst that is allowed. Here are the numbers.
"""

import statistics
from collections.abc import Iterator

import torch

from tests import exactness
from tests.benchmarks.protocol import Result
from tests.hostile import HOSTILE
from tests.tables import ROWS as ORDINARY

MEDIAN = 1.0
ROWS = [row for row in [*ORDINARY, *HOSTILE] if not row.empty]


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield for each operation and dtype the least, the median and the worst ratio, and where the worst is.

    The errors beside them are those of the worst. Draws are always the same and as many: there are no pairs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors; sums of large ones depend on it
    try:
        for name in dict.fromkeys(row.name for row in ROWS):
            for dtype in exactness.DTYPES:
                yield _line(group, name, dtype)
    finally:
        torch.set_num_threads(threads)


def _line(group: str, name: str, dtype: torch.dtype) -> Result:
    found = [(result, row) for row in ROWS if row.name == name for result in exactness.measure(row, dtype)]
    ratios = [result.ratio for result, _ in found]
    worst, row = max(found, key=lambda pair: pair[0].ratio)
    where = f"{str(dtype).removeprefix('torch.')}, worst: {row.id.removeprefix(name + '-')}, {worst.result}"
    spread = statistics.median(ratios), min(ratios), max(ratios)
    ulps = (error / (2 * worst.half_ulp) for error in (worst.ours, worst.theirs))
    return Result(group, name, where, "torch", *spread, *ulps, MEDIAN, unit="ulp", most=exactness.WORST)
