"""Names of a torch module that ours does not define resolve to torch's own objects."""

import sys
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any


def mirror(
    namespace: MutableMapping[str, Any], theirs: ModuleType
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `(__getattr__, __dir__, __all__)` for the module whose globals are `namespace`.

    What the module defines wins; every other public name is looked up in `theirs`. Sub-modules of `theirs` that we do
    not have are entered in `sys.modules` under our name, as the same objects, so that
    `from torch_bp.nn.utils.rnn import pad_sequence` works and no class exists twice.
    """
    ours = namespace["__name__"]
    own = {name for name in namespace if not name.startswith("_")}
    names = own | {name for name in dir(theirs) if not name.startswith("_")}
    prefix = theirs.__name__ + "."
    for path, module in list(sys.modules.items()):
        if path.startswith(prefix) and module is not None and path[len(prefix) :].split(".")[0] not in own:
            sys.modules.setdefault(f"{ours}.{path[len(prefix) :]}", module)

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name.startswith("__"):  # import machinery and doctest look for these: they are the module's own matter
            raise AttributeError(f"module {ours!r} has no attribute {name!r}")
        try:
            return getattr(theirs, name)
        except AttributeError:
            raise AttributeError(f"module {ours!r} has no attribute {name!r}") from None

    def __dir__() -> list[str]:  # noqa: N807
        return sorted(set(namespace) | {name for name in dir(theirs) if not name.startswith("_")})

    return __getattr__, __dir__, sorted(names)
