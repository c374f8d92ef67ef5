"""Kernel modules on disk, so that the second process compiles nothing.

A kernel is a small Python module, named by a hash of its text: a changed formula gets another file and never meets a
stale kernel, and several processes may write at once. Numba keeps the machine code beside it, Triton in a folder of its
own; both key it by processor, version and this file.

The folder is `$TORCH_BP_CACHE`, else `torch_bp` in the user's cache folder. Where it cannot be written, kernels live in
memory for the length of the process.
"""

import contextlib
import hashlib
import importlib.util
import linecache
import os
import stat
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def folder() -> Path | None:
    """Return the folder of kernels, made if needed, or None where nothing can be written or trusted."""
    base = os.environ.get("TORCH_BP_CACHE")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_bp")
    path = Path(base).absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError:
        return None
    # What lies there is executed: a folder that others own or may write to is not ours to run.
    foreign = hasattr(os, "getuid") and status.st_uid != os.getuid()
    if foreign or status.st_mode & stat.S_IWOTH or not os.access(path, os.W_OK | os.X_OK):
        return None
    return path


def load(name: str, text: str, *, on_disk: bool = True) -> ModuleType:
    """Return the module with this `text`, from the cache folder if possible.

    The module's global `ON_DISK` says whether its file may be relied on.
    """
    key = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    loaded = sys.modules.get(f"torch_bp_kernel_{key}")
    if loaded is not None and loaded.__dict__["ON_DISK"] is on_disk:
        return loaded
    path = _written(key, text) if on_disk else None
    filename = str(path) if path else f"<torch_bp kernel {key}>"
    module = ModuleType(f"torch_bp_kernel_{key}")
    module.__file__ = filename
    module.__dict__["ON_DISK"] = path is not None
    if path:
        module.__spec__ = importlib.util.spec_from_file_location(module.__name__, path)
    else:  # inspect.getsource, which Triton calls, reads from here
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, filename, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _written(key: str, text: str) -> Path | None:
    """Write the module unless it stands there already, whole; return its path, or None if that is impossible."""
    directory = folder()
    if directory is None:
        return None
    path = directory / f"{key}.py"
    try:
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return path
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{key}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            # Numba stamps its machine code with this file's time: a fixed time keeps the code valid when two
            # processes write the same text at once.
            os.utime(temporary, (0, 0))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError:
        return None
    return path
