"""Where in a user's function something went wrong, for messages of `FormulaError`."""

from __future__ import annotations

import builtins
import linecache
import math
import re
from itertools import islice
from types import CodeType, FrameType, TracebackType
from typing import Any

_ABSENT = object()
_CALLED = re.compile(r"([A-Za-z_][\w.]*)\s*\(")


def place(traceback: TracebackType | None, code: CodeType) -> str:
    """Return "file:line", the innermost place in the file of `code` that a traceback goes through, else its first line.

    The innermost one, as a formula may call functions that stand beside it.
    """
    line = code.co_firstlineno
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == code.co_filename:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f"{code.co_filename}:{line}"


def converter(frame: FrameType) -> str:
    """Return what is called in `frame` right now, where it asks a symbol for a Python number: "math.sqrt", or "float".

    Only the source tells; "float" where there is none.
    """
    positions = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4)
    line, last, start, end = positions
    if line is None or start is None or end is None:
        return "float"
    text = linecache.getline(frame.f_code.co_filename, line).encode()
    called = _CALLED.match(text[start : end if line == last else None].decode(errors="replace"))
    if called is None:
        return "float"
    first, *rest = called[1].split(".")
    function: Any = _ABSENT
    for names in (vars(builtins), frame.f_globals, frame.f_locals):
        function = names.get(first, function)
    for name in rest:
        function = getattr(function, name, _ABSENT)
    name = getattr(function, "__name__", "")
    return f"math.{name}" if name and getattr(math, name, _ABSENT) is function else "float"
