"""Hooks that stay with the modules that they were put on.

`copy.deepcopy` and `pickle` take the hooks of a module along, with all that these refer to: a monitor, its writers and
their threads. A copy, such as that of an average of weights, or a model that is saved while it is watched, gets a
function in their place that does nothing, and takes itself away when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Hook:
    """Calls a function; a copy of it is `forgotten`.

    Example:
        >>> import copy
        >>> model = nn.Linear(2, 2)
        >>> _ = model.register_forward_hook(Hook(print))
        >>> list(copy.deepcopy(model)._forward_hooks.values()) == [forgotten]
        True
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return forgotten

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _forgotten, ()


def forgotten(module: nn.Module, *_: Any) -> None:
    """What stands in a copy where a hook was."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook is forgotten]:
            del hooks[key]


def _forgotten() -> Callable[..., None]:
    return forgotten
