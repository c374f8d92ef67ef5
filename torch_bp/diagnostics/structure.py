"""What a model consists of, to see that some of it was added, removed or replaced while it trains."""

from __future__ import annotations

from torch import nn


class Structure:
    """The modules of a model and their parameters, as they were when they were last noted.

    Args:
        model: is noted at once.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> structure = Structure(model)
        >>> before = structure.changed()
        >>> model[0] = nn.Linear(2, 3)
        >>> before, structure.changed()
        (False, True)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.note()

    def note(self) -> None:
        """What there is now is what it is compared with later."""
        self._noted = self._now()

    def changed(self) -> bool:
        """Whether there are other objects than were noted, or in another order."""
        now = self._now()
        return len(now) != len(self._noted) or any(a is not b for a, b in zip(now, self._noted))

    def _now(self) -> list[object]:
        return [part for module in self._model.modules() for part in (module, *module._parameters.values())]
