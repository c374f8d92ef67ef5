"""Names of parameters that a pattern means: a glob of the name or of a module above it, or a regular expression."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TypeVar

COMPILED = "_orig_mod."  # what `torch.compile` puts before the names of the parts of a module that it wraps
Pattern = str | re.Pattern
Value = TypeVar("Value")


def _paths(name: str) -> list[str]:
    """A name and those of the modules above it, the outermost first."""
    return list(accumulate(name.split("."), "{}.{}".format))


def plain(name: str) -> str:
    """A name as it is without `torch.compile`.

    >>> plain("_orig_mod.encoder._orig_mod.weight")
    'encoder.weight'
    """
    return name.replace(COMPILED, "")


def matches(pattern: Pattern, names: Iterable[str]) -> bool:
    """True if the pattern means one of these names.

    >>> [matches(p, ["encoder.0.weight"]) for p in ("encoder", "*.weight", "0", re.compile(r"\\.\\d+\\."))]
    [True, True, False, True]
    """
    if isinstance(pattern, re.Pattern):
        return any(pattern.search(name) for name in names)
    return any(fnmatchcase(path, pattern) for name in names for path in _paths(name))


def find(values: Mapping[Pattern, Value], names: Sequence[str]) -> Value | None:
    """Return the value of the first pattern that means one of these names, None without any.

    >>> find({"head": 1, "*": 2}, ["head.weight"])
    1
    """
    return next((value for pattern, value in values.items() if matches(pattern, names)), None)


def check_patterns(
    what: str,
    patterns: Sequence[Pattern],
    names: Sequence[str],
    by_turns: Sequence[Sequence[str]] = (),
    words: Sequence[str] = (),
) -> None:
    """Refuse a pattern that means none of the names.

    Args:
        what: the function and argument that the patterns were given for, as the message begins.
        patterns: what to check.
        names: of all parameters.
        by_turns: the names of each parameter, if the first pattern that matches takes it: then a pattern to which the
            earlier ones leave nothing is refused as well.
        words: what may stand instead of a pattern, for the message.

    Raises:
        ValueError: such a pattern, with the nearest names.
    """
    left = list(by_turns)
    for pattern in patterns if names else ():
        if not isinstance(pattern, (str, re.Pattern)):
            raise TypeError(f"{what} must have strings or compiled regular expressions, got {pattern!r}.")
        text = pattern if isinstance(pattern, str) else pattern.pattern
        if not matches(pattern, names):
            known = dict.fromkeys([*words, *(path for name in names for path in _paths(name))])
            named = [path for path in known if not path.replace(".", "").isdigit()]  # a number is near to nothing
            near = difflib.get_close_matches(text, named, n=3, cutoff=0.3)
            hint = f"the nearest names are {', '.join(near)}" if near else f"names are like {', '.join(names[:3])}"
            hint += f"; the words are {', '.join(words)}" if words else ""
            raise ValueError(f"{what} must have patterns that match a parameter, got {text!r}; {hint}.")
        rest = [each for each in left if not matches(pattern, each)]
        if by_turns and len(rest) == len(left):
            raise ValueError(
                f"{what} must have patterns that are reached, got {text!r} after patterns that match all it does; "
                "put it before them."
            )
        left = rest
