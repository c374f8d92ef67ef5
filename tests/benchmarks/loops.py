"""C4: training loops as users write them, through autograd, where nothing but the imports is changed.

A step: forward through linear layers with ReLU between, cross-entropy, backward, Adam. Torch's best is the same with
`fused=True`.
"""

from collections.abc import Iterator

from tests.benchmarks import honesty
from tests.benchmarks.protocol import Result, few, paired

WORKLOADS = {
    "64-32-10, batch 32": ((64, 32, 10), 32),
    "40-100-100-10, batch 100": ((40, 100, 100, 10), 100),
    "784-1000-500-100-10, batch 128": ((784, 1000, 500, 100, 10), 128),
    "50 layers of 64, batch 64": ((64,) * 51, 64),
}
TARGETS = dict(zip(honesty.SETTINGS, (0.75, 1.05)))


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the ratio of our step to torch's, for each network and setting."""
    for workload, (widths, count) in WORKLOADS.items():
        runs = honesty.steps(widths, count, loss="CrossEntropyLoss")
        honesty.check(runs, {})
        mine, large = runs.pop("torch_bp"), max(widths) >= 1000
        for name, run in runs.items():
            found = paired(mine, run, few(pairs) if large else pairs)
            yield Result(group, "step", workload, name, *found, TARGETS[name])
