"""Many operations in one call: a list of records that a compiled loop goes through.

A record is the address of a compiled function and its arguments in memory: tensors by their handles, which stay the
same wherever their memory is, and numbers. Two kinds of functions take such records: our CPU kernels, by the way in
that looks at tensors (`torch_bp.kernels.entry`), and torch's own operations. Of torch, the products are among the C
functions that it exports for compiled models. For others it exports the C++ functions that its own code calls; these
are taken by their mangled name, which spells out the types of the arguments, so that a torch with another signature
does not have them. How such arguments are passed is known for Linux on x86-64; elsewhere, and where a symbol is
missing, these operations are called from Python.

A C++ exception cannot pass through compiled code: only operations are here that fail for no other reason than the form
of their arguments, which has been seen to be right when a record is made. What looks at values (class labels) is not.
"""

from __future__ import annotations

import functools
import logging
import platform
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torch_bp.kernels import cpu, cpu_text, library, products

_aten = torch.ops.aten
_log = logging.getLogger(__name__)
# Kinds of arguments: t tensor, i integer or truth value, d double, s scalar, o optional scalar, v string, n nothing,
# a list of integers that is passed on the stack, behind six others.
_Signature = tuple[str, str]


def _ops(name: str, types: str, arguments: str) -> _Signature:
    """The mangled name of `at::_ops::name::call` for these types, and its arguments."""
    return f"_ZN2at4_ops{len(name)}{name}4callE{types}", arguments


_ONE, _IN_PLACE = "RKNS_6TensorERS2_", "RNS_6TensorE"
_SCALED = "RKNS_6TensorES4_RKN3c106ScalarERS2_"
# By operation: the symbol, and its arguments as kind:name, or kind:=number; `out` is the result.
_CALLS: dict[Any, _Signature] = {
    _aten.mm.default: ("aoti_torch_cpu_mm_out", "t:out t:self t:mat2"),
    _aten.addmm.default: ("aoti_torch_cpu_addmm_out", "t:out t:self t:mat1 t:mat2 d:beta d:alpha"),
    **{
        getattr(_aten, name).default: _ops(f"{name}_out", _ONE, "t:self t:out")
        for name in ("sigmoid", "tanh", "silu", "neg")
    },
    # Which is what it is; its own form for given memory makes a copy.
    _aten.relu.default: _ops("clamp_min_out", "RKNS_6TensorERKN3c106ScalarERS2_", "t:self s:=0 t:out"),
    **{
        getattr(_aten, f"{name}_").default: _ops(f"{name}_", _IN_PLACE, "t:self")
        for name in ("relu", "sigmoid", "tanh")
    },
    **{
        getattr(_aten, name).Tensor: _ops(f"{name}_out", "RKNS_6TensorES4_RS2_", "t:self t:other t:out")
        for name in ("mul", "div")
    },
    **{
        getattr(_aten, name).Tensor: _ops(f"{name}_out", _SCALED, "t:self t:other s:alpha t:out")
        for name in ("add", "sub")
    },
    _aten._log_softmax.default: _ops("_log_softmax_out", "RKNS_6TensorElbRS2_", "t:self i:dim i:half_to_float t:out"),
    _aten.gelu.default: _ops(
        "gelu_out", "RKNS_6TensorESt17basic_string_viewIcSt11char_traitsIcEERS2_", "t:self v:approximate t:out"
    ),
    _aten.leaky_relu.default: _ops(
        "leaky_relu_out", "RKNS_6TensorERKN3c106ScalarERS2_", "t:self s:negative_slope t:out"
    ),
    _aten.hardtanh.default: _ops(
        "hardtanh_out", "RKNS_6TensorERKN3c106ScalarES8_RS2_", "t:self s:min_val s:max_val t:out"
    ),
    _aten.softplus.default: _ops(
        "softplus_out", "RKNS_6TensorERKN3c106ScalarES8_RS2_", "t:self s:beta s:threshold t:out"
    ),
    _aten.elu.default: _ops(
        "elu_out", "RKNS_6TensorERKN3c106ScalarES8_S8_RS2_", "t:self s:alpha s:scale s:input_scale t:out"
    ),
    _aten.clamp.default: _ops(
        "clamp_out", "RKNS_6TensorERKSt8optionalIN3c106ScalarEESA_RS2_", "t:self o:min o:max t:out"
    ),
    _aten.sum.dim_IntList: _ops(
        "sum_IntList_out",
        "RKNS_6TensorEN3c1016OptionalArrayRefIlEEbSt8optionalINS5_10ScalarTypeEERS2_",
        "t:self i:keepdim n:dtype t:out a:dim",
    ),
    _aten.copy_.default: _ops("copy_", "RNS_6TensorERKS2_b", "t:self t:src i:non_blocking"),
}
_SET_THREADS = (products.SYMBOL, "i:threads")
_LOOP = '''"""Made by torch_bp: runs records one after the other."""
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

{pointer}
integers = pointer_to(types.int64)


@intrinsic
def called(typing_context, address, argument):
    def code(context, builder, signature, arguments):
        word = ir.IntType(64)
        function = builder.inttoptr(arguments[0], ir.FunctionType(word, [word]).as_pointer())
        return builder.call(function, [arguments[1]])

    return types.int64(types.int64, types.int64), code


@njit("int64(int64, int64)", cache=ON_DISK, nogil=True)
def run(place, count):
    """Run `count` records; the number of the one that failed, or -1."""
    for k in range(count):
        record = integers(place)
        if called(record[0], place + 16):
            return k
        place += 8 * record[1]
    return -1
'''
_CALL = '''"""Made by torch_bp: calls {symbol} with the arguments of a record."""
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

{pointer}
integers, doubles = map(pointer_to, (types.int64, types.float64))
function = types.ExternalFunction("{symbol}", types.{result}({types}))


@cfunc("int64(int64)", cache=ON_DISK)
def call(place):
    words, numbers = integers(place), doubles(place)
    answer = function({arguments})
    return {answer}
'''


class _Words:
    """The arguments of one record, put together."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.kept: list[Any] = []

    def add(self, kind: str, value: Any) -> None:
        if kind == "t":
            self.words.append(value._cdata)
            self.kept.append(value)
        elif kind == "i":
            self.words.append(int(value))
        elif kind == "d":
            self.words.append(bits(value))
        elif kind in "so":
            self.words += [0] * (len(self.words) % 2)  # aligned to 16 bytes
            whole = isinstance(value, int) and not isinstance(value, bool)
            self.words += [int(whole), 0, value if whole else bits(value or 0.0), 0]
            if kind == "o":
                self.words += [int(value is not None), 0]
        elif kind in "va":
            data = np.frombuffer(value.encode() + bytes(8), np.uint8) if kind == "v" else np.array(value, np.int64)
            self.kept.append(data)
            length = len(value)
            self.words += [length, data.ctypes.data] if kind == "v" else [data.ctypes.data, length, 1]


def bits(value: float) -> int:
    """Return a double as a word."""
    return struct.unpack("<q", struct.pack("<d", float(value)))[0]


def _passed(arguments: str) -> tuple[list[str], list[str]]:
    """How the thunk passes the arguments of a record: their types and texts."""
    types, texts, at = [], [], 0
    for argument in arguments.split():
        kind = argument[0]
        if kind in "so":
            at += at % 2
        if kind in "tso":
            types.append("intp")
            texts.append(f"place + {8 * at}")
            at += {"t": 1, "s": 4, "o": 6}[kind]
        elif kind == "d":
            types.append("float64")
            texts.append(f"numbers[{at}]")
            at += 1
        elif kind == "n":
            types.append("int64")
            texts.append("0")
        elif kind == "a":
            fill = 6 - len(types)
            types += ["int64"] * (fill + 3)
            texts += ["0"] * fill + [f"words[{at + k}]" for k in range(3)]
            at += 3
        else:
            count = 2 if kind == "v" else 1
            types += ["int64"] * count
            texts += [f"words[{at + k}]" for k in range(count)]
            at += count
    return types, texts


def _thunk(operation: Any) -> int | None:
    """Return the address of what calls an operation with a record, None where there is none."""
    return _made(*_CALLS[operation]) if operation in _CALLS else None


@functools.cache
def _made(symbol: str, arguments: str) -> int | None:
    """Return the address of what calls a function of torch's with a record, None where there is none."""
    if not cpu.usable():
        return None
    mangled = symbol.startswith("_Z")
    if mangled and (sys.platform != "linux" or platform.machine() != "x86_64"):
        return None
    types, texts = _passed(arguments)
    text = _CALL.format(
        symbol=symbol,
        pointer=cpu_text.POINTER,
        result="int64" if mangled else "int32",
        types=", ".join(f"types.{t}" for t in types),
        arguments=", ".join(texts),
        answer="types.int64(answer)" if symbol.startswith("aoti_") else "types.int64(0)",
    )
    try:
        library.export([symbol])
        return cpu.compiled(f"call_{symbol}", text).call.address
    except Exception as error:
        _log.info("%s is called from Python (%s: %s)", symbol, type(error).__name__, error)
        return None


def record(operation: Any, args: Sequence[Any], keywords: Mapping[str, Any], out: Any) -> Record | None:
    """Return the record of one of torch's operations on tensors that stay, None where it cannot be one.

    Args:
        operation: of aten, with the arguments that it was called with.
        out: the tensor that takes its result; None where it writes to an argument.
    """
    address = _thunk(operation)
    if address is None:
        return None
    schema = operation._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given |= dict(zip((a.name for a in schema), args)) | dict(keywords) | {"out": out}
    words = _Words()
    for argument in _CALLS[operation][1].split():
        kind, name = argument.split(":")
        value = int(name[1:]) if name.startswith("=") else given[name]
        unfit = value is not None if kind == "n" else value is None and kind not in "o"
        if kind == "t":
            unfit = not (isinstance(value, torch.Tensor) and value.is_cpu and value.layout is torch.strided)
        if unfit:
            return None
        words.add(kind, value)
    return Record(address, words.words, words.kept, _on_one_thread(operation, args))


def _on_one_thread(operation: Any, args: Sequence[Any]) -> bool | None:
    """True or False for a product that is better done by one thread or by all, None for what is no product."""
    if operation not in products.OPERATIONS:
        return None
    left, right = products.operands(operation, args)
    return products.small(left.numel() * right.shape[-1])


class Record:
    """A compiled function and its arguments.

    Args:
        address: of the function.
        words: the arguments in memory.
        kept: the tensors and arrays that these point to.
        alone: True to let the caller's thread alone multiply, False for all threads; None where it makes no difference.
    """

    def __init__(self, address: int, words: Sequence[int], kept: Sequence[Any], alone: bool | None = None) -> None:
        self.address, self.words, self.kept, self.alone = address, list(words), list(kept), alone


def _with_threads(records: Sequence[Record]) -> list[Record]:
    """Put in what sets the number of threads before products that want another, and after the last."""
    address, done, alone = None, [], False
    if any(each.alone for each in records):
        address = _made(*_SET_THREADS)
    for each in [*records, Record(0, [], [], False)]:
        if address is not None and each.alone is not None and each.alone != alone:
            alone = each.alone
            done.append(Record(address, [int(alone)], []))
        done.append(each)
    return done[:-1]


class Chain:
    """Records that run in one call."""

    def __init__(self, records: Sequence[Record]) -> None:
        words: list[int] = []
        records = _with_threads(records)
        for each in records:
            arguments = each.words + [0] * (len(each.words) % 2)
            words += [each.address, 2 + len(arguments), *arguments]
        self.count, self._kept = len(records), [each.kept for each in records]
        room = np.zeros(len(words) + 2, np.int64)
        start = room.ctypes.data // 8 % 2  # numbers are read 16 bytes at a time
        self._words = room[start : start + len(words)]
        self._words[:] = np.array([w & (2**64 - 1) for w in words], np.uint64).view(np.int64)
        self._run = _loop()
        self._place = self._words.ctypes.data

    def __call__(self) -> None:
        failed = self._run(self._place, self.count)
        if failed >= 0:
            raise RuntimeError(f"operation {failed} of {self.count} that run in one call has failed.")


@functools.cache
def _loop() -> Any:
    return cpu.compiled("sequence", _LOOP.format(pointer=cpu_text.POINTER)).run
