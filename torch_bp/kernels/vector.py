"""exp, log, tanh and erf over whole vector registers, in Numba's text.

Numba calls the C library for these, one element at a time: six times slower than torch. Torch is built with SLEEF and
exports its vector functions, so a kernel calls the same ones: each call of the C function carries the name of its
vector version, which LLVM takes when it vectorises the loop. Both are exact to one unit in the last place. Where this
cannot be had, the C library serves.
"""

from __future__ import annotations

import functools
import logging
import platform
import sys
from collections.abc import Iterable

import torch

from torch_bp.kernels import library

FUNCTIONS = ("exp", "log", "tanh", "erf")

_LANES = {torch.float32: {"AVX2": (8,), "AVX512": (8, 16)}, torch.float64: {"AVX2": (4,), "AVX512": (4, 8)}}
_LETTER = {torch.float32: "f", torch.float64: "d"}
_log = logging.getLogger(__name__)

_FACTORY = '''
from numba.core.cgutils import get_or_insert_function


def vectorised(name, lanes, letter):
    """Make the intrinsic that calls a C function of this name or, in a vectorised loop, its vector version."""
    c_name = name + "f" * (letter == "f")

    @intrinsic
    def function(typing_context, value):
        def code(context, builder, signature, arguments):
            kind, module = context.get_value_type(real), builder.module
            scalar = get_or_insert_function(module, ir.FunctionType(kind, [kind]), c_name)
            for attribute in ("readnone", "nounwind", "willreturn"):  # without them no loop is vectorised
                set.add(scalar.attributes, attribute)
            versions, variants = [], []
            for width in lanes:
                vector = ir.VectorType(kind, width)
                version = f"Sleef_{name}{letter}{width}_u10"
                versions.append(get_or_insert_function(module, ir.FunctionType(vector, [vector]), version))
                variants.append(f"_ZGV_LLVM_N{width}v_{c_name}({version})")
            keep(module, versions)
            call = builder.call(scalar, arguments)
            set.add(call.attributes, '"vector-function-abi-variant"="' + ",".join(variants) + '"')
            return call

        return real(real), code

    return function


def keep(module, functions):
    """Let LLVM keep declarations that nothing calls until loops are vectorised."""
    address, used = ir.IntType(8).as_pointer(), module.globals.get("llvm.compiler.used")
    kept = {f.name: f for f in (*(used.kept if used else ()), *functions)}.values()
    array = ir.ArrayType(address, len(kept))
    if not used:
        used = ir.GlobalVariable(module, array, "llvm.compiler.used")
        used.linkage, used.section = "appending", "llvm.metadata"
    used.kept, used.value_type, used.type = kept, array, array.as_pointer()
    used.initializer = ir.Constant(array, [f.bitcast(address) for f in kept])


'''


@functools.cache
def _lanes(dtype: torch.dtype) -> tuple[int, ...]:
    """How many elements the vector functions take that this machine can run and torch exports; () for none."""
    # Elsewhere vectors are passed in other ways, which nobody has tried.
    if sys.platform == "win32" or platform.machine() not in ("x86_64", "AMD64"):
        return ()
    try:
        from numba import config

        # Code for another processor than this one would pass vectors in other registers.
        if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:  # type: ignore[attr-defined]
            return ()
        lanes = _LANES[dtype].get(torch.backends.cpu.get_cpu_capability(), ())
        library.export(f"Sleef_{name}{_LETTER[dtype]}{width}_u10" for name in FUNCTIONS for width in lanes)
    except (AttributeError, OSError) as error:
        _log.info("exp, log, tanh and erf run one element at a time (%s: %s)", type(error).__name__, error)
        return ()
    return lanes


def definitions(operations: Iterable[str], dtype: torch.dtype) -> str:
    """Return the text that defines those of `operations` which are functions here; it needs `real` and `intrinsic`."""
    operations = {"exp" if operation == "sigmoid" else operation for operation in operations}
    names = sorted(operations & set(FUNCTIONS))
    lanes = _lanes(dtype) if names else ()
    if not lanes:
        return "".join(f"{name} = math.{name}\n" for name in names)
    lines = (f'{name} = vectorised("{name}", {lanes}, "{_LETTER[dtype]}")\n' for name in names)
    return _FACTORY + "".join(lines)
