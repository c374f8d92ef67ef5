"""C7 and G7: cross-entropy, forward and backward, in float32: the time, and the memory beyond the logits."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as theirs

import torch_bp.nn.functional as ours
from tests.benchmarks.memory import peak
from tests.benchmarks.protocol import Result, agree, counted, few, paired

# (rows, classes): targets against torch's default, of time and of memory. In ten classes the few numbers that are kept
# for each row are no longer few.
WORKLOADS: dict[str, dict[tuple[int, int], tuple[float, float | None]]] = {
    "C7": {(128, 10): (1.4, None), (1024, 1000): (0.8, 0.35), (8192, 32768): (0.5, 0.35)},
    "G7": {(128, 10): (1.0, None)} | {(16384, classes): (0.40, 0.35) for classes in (4096, 16384, 65536, 131072)},
}
DEVICES = {"C7": "cpu", "G7": "cuda"}
LONG = 10**8  # bytes of logits from which a few pairs must do on the CPU


def sides(rows: int, classes: int, device: str = "cpu") -> dict[str, Callable]:
    """Return functions that run forward and backward and return loss and gradient: ours, torch's and compiled."""
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, device=device, requires_grad=True)
    target = torch.randint(classes, (rows,), device=device)

    def run(function):
        loss = function(logits, target)
        return loss, *torch.autograd.grad(loss, logits)

    torch._dynamo.reset()  # or it takes a new size for a size that varies
    compiled = torch.compile(lambda logits, target: theirs.cross_entropy(logits, target))
    return {
        "ours": lambda: run(ours.cross_entropy),
        "torch": lambda: run(theirs.cross_entropy),
        "compiled": lambda: run(compiled),
    }


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the ratios of time and of memory for each size, to torch's default and to the same compiled.

    The working set is the logits and their gradient.
    """
    device = DEVICES[group]
    for (rows, classes), (time_target, memory_target) in WORKLOADS[group].items():
        runs = sides(rows, classes, device)
        mine, logits = runs.pop("ours"), 4 * rows * classes
        count = few(pairs) if device == "cpu" and logits >= LONG else pairs
        for peer, run in runs.items():
            agree(mine(), run(), atol=1e-7)  # of the gradient's largest element, beside which most are tiny
            default, workload = peer == "torch", f"{rows}x{classes}"
            found = paired(mine, run, count, device)
            target = time_target if default else None
            yield Result(group, "cross_entropy", workload, peer, *found, target, working_set=2 * logits)
            found = counted(peak(mine, device), peak(run, device))
            target = memory_target if default else None
            yield Result(group, "memory", workload, peer, *found, target, unit="bytes", working_set=2 * logits)
