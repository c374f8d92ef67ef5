"""A model that can be run without a trace of it left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def isolated(
    modules: Iterable[nn.Module], *, apart: bool = False, dtype: torch.dtype | None = None
) -> Iterator[dict[Tensor, Tensor]]:
    """Give modules buffers of their own, for as long as the context lasts, and take back what they set meanwhile.

    Buffers, whether written to or replaced, attributes of modules such as counters, and torch's random numbers are
    afterwards as before. What modules keep elsewhere, or hooks append to lists, is not seen.

    Args:
        modules: with all that is inside them.
        apart: parameters are stand-ins in the same memory, on which no hook is.
        dtype: floating-point parameters, buffers and plain tensors of modules are copies in this precision.

    Yields:
        By a parameter, what stands in its place.
    """
    everything = list(dict.fromkeys(m for module in modules for m in module.modules()))
    kept = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in everything]
    tensors = [t for _, _, parameters, buffers in kept for t in (*parameters.values(), *buffers.values())]
    devices = {t.device for t in tensors if t is not None and t.is_cuda}
    stand_ins: dict[Tensor, Tensor] = {}
    with torch.random.fork_rng(devices):
        try:
            for m, attributes, parameters, buffers in kept:
                for name, p in parameters.items():
                    if p is not None and (apart or dtype is not None):
                        if p not in stand_ins:
                            stand_ins[p] = nn.Parameter(_in(p.detach(), dtype), p.requires_grad)
                        setattr(m, name, stand_ins[p])  # not in the dict: some modules keep a list as well
                for name, buffer in buffers.items():
                    if buffer is not None:
                        copy = _in(buffer.detach(), dtype)
                        setattr(m, name, copy.clone() if copy is buffer or dtype is None else copy)
                for name, value in attributes.items():
                    if dtype is not None and isinstance(value, Tensor):
                        m.__dict__[name] = _in(value.detach(), dtype)
            yield stand_ins
        finally:
            for m, attributes, parameters, buffers in kept:
                for name, t in (parameters | buffers).items():
                    if m._parameters.get(name, m._buffers.get(name)) is not t:
                        setattr(m, name, t)
                m.__dict__.clear()
                m.__dict__.update(attributes)
                m._parameters.clear()
                m._parameters.update(parameters)
                m._buffers.clear()
                m._buffers.update(buffers)


def _in(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a copy in `dtype` if there is one to take and the tensor is of real numbers, else the tensor."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype, copy=True)
