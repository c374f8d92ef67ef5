"""bfloat16 and float16 in Numba's text, which knows neither: 16 bits in memory, float32 in the kernel.

A value is rounded once, to nearest even, when it is stored, as torch's own kernels do. bfloat16 is the upper half of a
float32. float16 has instructions of its own, without which LLVM would call a function that nobody provides.
"""

from __future__ import annotations

import functools

import torch

_HEAD = """

@intrinsic
def widened(typing_context, stored):
    def code(context, builder, signature, arguments):
        bits, word, single = arguments[0], ir.IntType(32), ir.FloatType()
        {widen}

    return types.float32(types.uint16), code


@intrinsic
def rounded(typing_context, value):
    def code(context, builder, signature, arguments):
        value, word, short = arguments[0], ir.IntType(32), ir.IntType(16)
        {narrow}

    return types.uint16(types.float32), code

"""

# Half of the last place is added, less one bit where the result is even already; a NaN would be carried to infinity.
_BFLOAT16 = (
    """return builder.bitcast(builder.shl(builder.zext(bits, word), word(16)), single)""",
    """bits = builder.bitcast(value, word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        nearest = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
        nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(nan, word(0x7FC0), nearest), short)""",
)
_FLOAT16 = (
    """return builder.fpext(builder.bitcast(bits, ir.HalfType()), single)""",
    """return builder.bitcast(builder.fptrunc(value, ir.HalfType()), short)""",
)


def is_half(dtype: torch.dtype) -> bool:
    """True for the dtypes that are stored in 16 bits."""
    return dtype in (torch.bfloat16, torch.float16)


@functools.cache
def usable(dtype: torch.dtype) -> bool:
    """True unless it is float16 on a processor that cannot convert it."""
    if dtype is not torch.float16:
        return True
    import llvmlite.binding
    from numba import config

    if config.CPU_NAME or config.CPU_FEATURES:  # type: ignore[attr-defined]  # code for another processor than this
        return False
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("f16c") or features.get("fullfp16"))


def definitions(dtype: torch.dtype) -> str:
    """Return the text of `widened` and `rounded`, which a kernel over this dtype loads and stores with."""
    if not is_half(dtype):
        return ""
    widen, narrow = _BFLOAT16 if dtype is torch.bfloat16 else _FLOAT16
    return _HEAD.format(widen=widen, narrow=narrow)
