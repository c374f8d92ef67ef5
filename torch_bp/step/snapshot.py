"""What a pass may change in a model besides gradients, and how it is taken back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from torch_bp.step.memory import stretch


class Snapshot:
    """Buffers, attributes such as counters, and torch's random numbers, as they are now.

    Args:
        modules: with all that is inside them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        everything = list(dict.fromkeys(m for module in modules for m in module.modules()))
        self._kept = [(m, dict(m.__dict__), dict(m._buffers)) for m in everything]
        self._values = {b: _flat(b).clone() for _, _, kept in self._kept for b in kept.values() if b is not None}
        self._random = torch.get_rng_state()
        devices = {t.device for m in everything for t in m._parameters.values() if t is not None and t.is_cuda}
        self._random_on = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self, *, random: bool = True) -> None:
        """Bring everything back, the random numbers only if asked."""
        for module, attributes, buffers in self._kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in self._values.items():
                if not buffer.is_inference() or torch.is_inference_mode_enabled():
                    _flat(buffer).copy_(value)
        if random:
            torch.set_rng_state(self._random)
            for device, state in self._random_on.items():
                torch.cuda.set_rng_state(state, device)


def _flat(buffer: Tensor) -> Tensor:
    """An expanded buffer is nothing that torch writes to as it is."""
    return stretch(buffer) if buffer.layout is torch.strided and 0 in buffer.stride() else buffer
