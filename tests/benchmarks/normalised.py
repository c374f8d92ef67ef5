"""C8: blocks of Linear, BatchNorm1d and ReLU: the bytes that they keep for backward, and the time that it costs.

Torch keeps two tensors of the batch's size a block; `MLP` keeps one, and computes what lies between again in backward.
On both sides a `Linear` follows the last block, as it follows the others. Parameters and running statistics are there
anyway and not counted; the input is.
"""

from collections.abc import Callable, Iterator

import torch

import torch_bp
from tests.benchmarks.memory import kept
from tests.benchmarks.protocol import Result, agree, counted, few, paired

BLOCKS, WIDTH, BATCH = 8, 1024, 8192
KEPT, TIME = 0.53, 1.05
# Compiled code rounds differently, and what that moves across the kink of ReLU has another gradient.
COMPILED = {"rtol": 5e-2, "atol": 5e-2}


def networks(blocks: int, width: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return ours and torch's, of the same weights."""
    torch.manual_seed(0)
    mine = torch_bp.nn.MLP([width] * (blocks + 2), norm="batch")
    return mine, torch.nn.Sequential(*torch_bp.to_torch(mine).children())


def sides(blocks: int, width: int, batch: int) -> tuple[dict[str, Callable], set[int]]:
    """Return functions that run forward and backward, ours, torch's and compiled, and where parameters are in memory.

    They return output and gradients, but for biases before normalisation, which takes back what they do: their gradient
    is rounding and nothing else.
    """
    mine, theirs = networks(blocks, width)
    x, upstream = torch.randn(batch, width), torch.randn(batch, width)
    there = {t.data_ptr() for network in (mine, theirs) for t in network.state_dict().values()}

    def runner(network, call):
        names, parameters = zip(*network.named_parameters())
        taken_back = {f"{3 * block}.bias" for block in range(blocks)}

        def run():
            output = call(x)
            gradients = torch.autograd.grad(output, parameters, upstream)
            return output, *(g for name, g in zip(names, gradients) if name not in taken_back)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(theirs)
    return {"ours": runner(mine, mine), "torch": runner(theirs, theirs), "compiled": runner(theirs, compiled)}, there


def kept_bytes(run: Callable, there: set[int]) -> int:
    """Count what the graph keeps beside what is there anyway."""
    return sum(t.nbytes for t in kept(run)[1] if t.data_ptr() not in there)


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield the ratios of what is kept and of time, to torch's default and to the same compiled."""
    runs, there = sides(BLOCKS, WIDTH, BATCH)
    mine, workload = runs.pop("ours"), f"{BLOCKS} blocks of {WIDTH}, batch {BATCH}"
    for peer, run in runs.items():
        default = peer == "torch"
        agree(mine(), run(), **({} if default else COMPILED))
        found = counted(kept_bytes(mine, there), kept_bytes(run, there))
        yield Result(group, "kept for backward", workload, peer, *found, KEPT if default else None, unit="bytes")
        found = paired(mine, run, few(pairs))
        yield Result(group, "forward, backward", workload, peer, *found, TIME if default else None)
