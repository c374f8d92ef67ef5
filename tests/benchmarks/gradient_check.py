"""C11: one gradient check of a layer, by a random direction of each tensor, against torch's checks."""

from collections.abc import Callable, Iterator

import torch

from tests.benchmarks.protocol import Result, few, paired
from torch_bp.autograd import gradcheck
from torch_bp.nn import functional as F

BATCH = 32
SIZES = {"784x512": ((784, 512), True, 0.5), "32x32": ((32, 32), False, 0.02)}  # torch's fast mode, or its full one


def sides(sizes: tuple[int, int], fast: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return both checks of an affine map of ours in double precision."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(*sizes, dtype=torch.float64)
    x = torch.randn(BATCH, sizes[0], dtype=torch.float64, requires_grad=True)
    tensors = (x, layer.weight, layer.bias)
    return (
        lambda: gradcheck(F.linear, tensors),
        lambda: torch.autograd.gradcheck(F.linear, tensors, fast_mode=fast),
    )


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the ratio for each size."""
    for workload, (sizes, fast, target) in SIZES.items():
        mine, peer = sides(sizes, fast)
        assert mine()
        assert peer()
        found = paired(mine, peer, few(pairs))
        what = "fast_mode=True" if fast else "every entry"
        yield Result(group, "gradcheck of linear", f"{workload}, batch {BATCH}", f"torch, {what}", *found, target)
