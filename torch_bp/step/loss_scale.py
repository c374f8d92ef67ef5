"""Loss scaling for float16, whose smallest numbers are larger than many gradients (Micikevicius et al. 2017).

The error signal at the loss is multiplied by a power of two, and the gradients of the parameters, which are float32,
divided by it. Where they have overflowed, the update is left out and the scale halved; after enough steps without, it
is doubled. The numbers and the rule are those of `torch.amp.GradScaler`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_GROWTH, _BACKOFF, _INTERVAL = 2.0, 0.5, 2000


class LossScale:
    """A scale that finds its size, on the device where it is used.

    Attributes:
        value: the scale, float32.

    Example:
        >>> scale = LossScale()
        >>> gradient = torch.tensor([65536.0])
        >>> scale.unscale_([gradient])
        >>> gradient
        tensor([1.])
        >>> scale.update_(torch.ones(()))
        >>> float(scale.value)
        32768.0
    """

    def __init__(self) -> None:
        self.value = torch.full((), 2.0**16)
        self._healthy = torch.zeros((), dtype=torch.int32)  # steps since the scale has changed

    def to_(self, device: torch.device) -> None:
        """Move it."""
        if self.value.device != device:
            self.value, self._healthy = self.value.to(device), self._healthy.to(device)

    def unscale_(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, a power of two: exact but for what underflows."""
        torch._foreach_mul_(list(gradients), self.value.reciprocal())  # type: ignore[call-overload]

    def update_(self, overflowed: Tensor) -> None:
        """Take note of a step: `overflowed` () is not 0 where it was left out."""
        torch._amp_update_scale_(self.value, self._healthy, overflowed.to(self.value), _GROWTH, _BACKOFF, _INTERVAL)

    def state_dict(self) -> dict[str, Any]:
        """Return its numbers."""
        return {"scale": float(self.value), "healthy": int(self._healthy)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the numbers of `state_dict`."""
        self.value.fill_(state["scale"])
        self._healthy.fill_(state["healthy"])
