"""When a kernel may serve: which tensors are nothing but memory, and when nobody is watching the operations.

A kernel reads and writes memory and knows nothing else. Whatever gives an operation a meaning beyond that (a graph
being recorded, a tangent, a transform, a mode, a subclass) or a layout that pairs elements differently is served by
torch running the formula itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from torch_bp.kernels.capture import capturing

PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})

_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_tracing = torch._C._get_tracing_state
grad_enabled = torch.is_grad_enabled
_strided = torch.strided
_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")
# True in the backward of `is_grads_batched`, whose tensors have no memory to ask for
_inside_vmap = functools.partial(torch._C._dispatch_tls_is_dispatch_key_included, _VMAP_MODE)


def unwatched() -> bool:
    """True unless a transform, a tangent level, a dispatch mode or a tracer would miss what a kernel does."""
    return not (
        _transforms_active()
        or _dispatch_modes()
        or forward_ad._current_level >= 0
        or _jit_tracing() is not None
        or _inside_vmap()
    )


def eager() -> bool:
    """True unless a transform, a tangent level or a tracer is at work; dispatch modes, which may come and go between a
    forward and its recomputation, do not count."""
    return not (
        torch.compiler.is_dynamo_compiling()
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _jit_tracing() is not None
    )


def reusable() -> bool:
    """True where a backward may write to a temporary of its own: vmap lacks a rule for some in-place operations."""
    return not torch.compiler.is_dynamo_compiling() and (unwatched() or capturing())


def recording(tensors: Iterable[torch.Tensor | None]) -> bool:
    """True if autograd would record an operation on these tensors."""
    return grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def dense(tensor: torch.Tensor) -> bool:
    """True if the elements fill one stretch of memory, each in a place of its own."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def addresses(tensors: Sequence[torch.Tensor | None]) -> list[int] | None:
    """Return where the tensors begin in memory, or None if they are not all plain and alike.

    Plain and alike: strided memory of one device, dtype, shape and strides, no two elements of a tensor in one place.
    None in the place of a tensor is passed over. Empty tensors, zero tensors and freed storages have no address.
    """
    found: list[int] = []
    first = stride = None
    try:
        for tensor in tensors:
            if tensor is None:
                continue
            if type(tensor) not in PLAIN_TYPES or tensor.layout is not _strided or tensor.is_neg():
                return None
            if first is None:
                first, on_cpu, dtype, shape = tensor, tensor.is_cpu, tensor.dtype, tensor.shape
                if not tensor.is_contiguous():
                    if not dense(tensor):
                        return None
                    stride = tensor.stride()
            elif (
                tensor.dtype is not dtype
                or tensor.shape != shape
                or not (tensor.is_contiguous() if stride is None else tensor.stride() == stride)
                or not (tensor.is_cpu if on_cpu else tensor.device == first.device)
            ):
                return None
            address = tensor.data_ptr()
            if not address:
                return None
            found.append(address)
    except RuntimeError:  # a tensor inside `is_grads_batched` has no address to ask for
        return None
    return found or None


def disjoint(stretches: Iterable[tuple[int, int, int, bool]]) -> bool:
    """True if no stretch of memory that is written overlaps another one.

    A stretch is (start, size, index, written), in bytes. Stretches that coincide and have the same index are paired
    element by element, which is safe; so are overlapping ones that are only read.
    """
    groups: dict[tuple[int, int], tuple[int, bool]] = {}
    for start, size, index, written in stretches:
        if size:
            other, was_written = groups.setdefault((start, size), (index, written))
            if other != index and (written or was_written):
                return False
            groups[start, size] = (index, written or was_written)
    reach = reach_written = -1
    for (start, size), (_, written) in sorted(groups.items()):
        if start < reach_written or (written and start < reach):
            return False
        reach = max(reach, start + size)
        if written:
            reach_written = max(reach_written, start + size)
    return True
