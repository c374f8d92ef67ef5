"""The memory that a call takes at its peak, and that it keeps for backward, counted and not sampled."""

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch


def peak(function: Callable[[], object], device: str = "cpu") -> int:
    """Return the most bytes that `function` holds at once beyond what was there before, its result included.

    On CUDA the allocator keeps the count. On the CPU the profiler tells of every allocation of a tensor and of its end:
    unlike a dispatch mode it does not watch operations, so that kernels serve as they always do.
    """
    function()  # the first call compiles
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    changes = sorted(
        (event for event in _events(profile) if event["name"] == "[memory]"), key=lambda event: event["ts"]
    )
    return max(accumulate((event["args"]["Bytes"] for event in changes), initial=0))


def kept(function: Callable[[], object]) -> tuple[object, list[torch.Tensor]]:
    """Return the result of `function`, and the tensors that its graph keeps for backward, each memory once."""
    found: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t), lambda t: t):
        output = function()
    return output, list(found.values())


def _events(profile: torch.autograd.profiler.profile) -> list[dict]:
    """The trace in the published format: an allocation has a positive number of bytes, its end the negative one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
