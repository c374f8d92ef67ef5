"""Look at many tensors in one call, through the C functions that torch exports for compiled models.

Asking a thousand tensors from Python where their memory is and what it holds takes longer than an optimizer's
arithmetic on them: each answer is a Python object, made while the caches hold the weights. A compiled loop over
`aoti_torch_get_*` asks the same in a few microseconds. A tensor goes in by its handle, the address of torch's own
object behind it (`Tensor._cdata`); an array of handles is an array of what those functions take.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from types import ModuleType

import numpy as np
import torch

from torch_bp.kernels import cpu, cpu_text, library

CHANGED, SAME, MOVED = range(3)  # what `check` answers
UNFIT = -1  # what `describe`, `alike` and `fitting` answer of tensors that are not for one kernel

_ANSWERS = ("layout", "dtype", "device_type", "device_index", "data_ptr", "dim", "sizes", "strides")
ROOM = 4  # words that `alike` and `fitting` need beside the handles
KINDS = ("tensor", "row", "column", "label")  # of arguments of a formula over rows, as `fitting` numbers them
handle_of = torch.Tensor._cdata.__get__  # type: ignore[attr-defined]
_log = logging.getLogger(__name__)

_COMMON = '''"""Made by torch_bp: what torch says of many tensors."""
from numba import cfunc, njit, types
from numba.extending import intrinsic

ask = types.int32(types.intp, types.intp)
{functions}
CHANGED, SAME, MOVED = range(3)
UNFIT = -1
INT64 = 4  # by the number that torch gives it
TENSOR, ROW, COLUMN, LABEL = range(4)


{pointer}
integers, singles, doubles = map(pointer_to, (types.int64, types.float32, types.float64))


@njit
def is_dense(sizes, strides, dimensions, elements):
    """True if the elements fill one stretch of memory, each in a place of its own."""
    expected = 1
    while expected < elements:
        before = expected
        for d in range(dimensions - 1, -1, -1):
            if sizes[d] != 1 and strides[d] == expected:
                expected *= sizes[d]
        if expected == before:
            return False
    return True
'''

_TABLES = '''

@njit
def is_of_kind(handle, kinds, answer):
    """True if layout, dtype and device of a tensor are `kinds`; they are left in answer[:4]."""
    place = answer.ctypes.data
    answer[:4] = 0
    if get_layout(handle, place) or get_dtype(handle, place + 8):
        return False
    if get_device_type(handle, place + 16) or get_device_index(handle, place + 24):
        return False
    return answer[0] == kinds[0] and answer[1] == kinds[1] and answer[2] == kinds[2] and answer[3] == kinds[3]


@njit
def elements_of_form(handle, forms, at, answer):
    """The number of elements of a tensor whose sizes and strides are those at forms[at:], else UNFIT.

    Its address is left in answer[2].
    """
    place = answer.ctypes.data
    answer[0] = 0
    if get_dim(handle, place) or answer[0] != forms[at]:
        return UNFIT
    dimensions = forms[at]
    if get_sizes(handle, place) or get_strides(handle, place + 8) or get_data_ptr(handle, place + 16):
        return UNFIT
    sizes, strides = integers(answer[0]), integers(answer[1])
    elements = 1
    for d in range(dimensions):
        if sizes[d] != forms[at + 1 + d] or strides[d] != forms[at + 1 + dimensions + d]:
            return UNFIT
        elements *= sizes[d]
    return elements


@njit("int64(int64[:, ::1], int64[::1], int64[::1], int64[::1], int64[:, ::1], int64[::1])", cache=ON_DISK)
def describe(handles, kinds, forms, sizes, addresses, answer):
    """Write what `check` compares later of tensors that are alike; the room that `forms` needs, or UNFIT.

    Alike: of one layout, dtype and device, and in each column of one shape and dense strides.
    """
    first = handles.ctypes.data
    place = answer.ctypes.data
    answer[:4] = 0
    if get_layout(first, place) or get_dtype(first, place + 8):
        return UNFIT
    if get_device_type(first, place + 16) or get_device_index(first, place + 24):
        return UNFIT
    for k in range(4):  # assigning a slice makes Numba compile its text of an error for three seconds
        kinds[k] = answer[k]
    needed = 0
    for column in range(handles.shape[1]):
        answer[0] = 0
        if get_dim(first + 8 * column, place):
            return UNFIT
        needed += 1 + 2 * answer[0]
    if needed > forms.shape[0]:
        return needed
    at = 0
    for column in range(handles.shape[1]):
        handle = first + 8 * column
        answer[0] = 0
        if get_dim(handle, place) or get_sizes(handle, place + 8) or get_strides(handle, place + 16):
            return UNFIT
        dimensions, shape, strides = answer[0], integers(answer[1]), integers(answer[2])
        forms[at] = dimensions
        for d in range(dimensions):
            forms[at + 1 + d], forms[at + 1 + dimensions + d] = shape[d], strides[d]
        for row in range(handles.shape[0]):
            handle = first + 8 * (row * handles.shape[1] + column)
            if not is_of_kind(handle, kinds, answer):
                return UNFIT
            sizes[column] = elements_of_form(handle, forms, at, answer)
            if sizes[column] == UNFIT or (answer[2] == 0 and sizes[column]):
                return UNFIT
            addresses[row, column] = answer[2]
        form = forms.ctypes.data + 8 * (at + 1)
        if not is_dense(integers(form), integers(form + 8 * dimensions), dimensions, sizes[column]):
            return UNFIT
        at += 1 + 2 * dimensions
    return needed


@njit
def touches(written, start, end):
    """True if a stretch of memory overlaps one of `written`: starts in ascending order, and their ends."""
    low, high = 0, written.shape[1]
    while low < high:
        middle = (low + high) // 2
        if written[1, middle] <= start:
            low = middle + 1
        else:
            high = middle
    return low < written.shape[1] and written[0, low] < end


@njit("int64(int64[:, ::1], int64[:, ::1], int64[::1], int64[::1], int64[::1], int64[:, ::1], int64[:, ::1],"
      "int64[::1])", cache=ON_DISK)
def check(handles, known, kept, kinds, forms, written, addresses, answer):
    """Compare tensors with what a table knows; write new addresses of lists that are not kept.

    kept: 1 for each row whose tensors and addresses must be the known ones; the last is the size of an element.
    forms: for each column, one after the other: number of dimensions, sizes, strides.
    written: see `touches`; a new address must not reach there.
    """
    first = handles.ctypes.data
    verdict = SAME
    for row in range(handles.shape[0]):
        at = 0
        for column in range(handles.shape[1]):
            if kept[row] and handles[row, column] != known[row, column]:
                return CHANGED
            handle = first + 8 * (row * handles.shape[1] + column)
            if not is_of_kind(handle, kinds, answer):
                return CHANGED
            elements = elements_of_form(handle, forms, at, answer)
            if elements == UNFIT:
                return CHANGED
            if answer[2] != addresses[row, column]:
                if kept[row] or (answer[2] == 0 and elements):
                    return CHANGED
                if touches(written, answer[2], answer[2] + elements * kept[handles.shape[0]]):
                    return CHANGED
                addresses[row, column] = answer[2]
                verdict = MOVED
            at += 1 + 2 * forms[at]
    return verdict


@njit("boolean(int64[::1], float64, boolean)", cache=ON_DISK)
def holds(addresses, value, double):
    """True if the number at each address is `value`."""
    for address in addresses:
        if (doubles(address)[0] if double else singles(address)[0]) != value:
            return False
    return True


@njit("void(int64[::1], float64, boolean)", cache=ON_DISK)
def write(addresses, value, double):
    """Write a number to each address."""
    for address in addresses:
        if double:
            doubles(address)[0] = value
        else:
            singles(address)[0] = value
'''

_ENTRIES = '''

@njit
def is_plain(handle, at, dtype):
    """True if a tensor is strided, of this dtype and on the CPU; dimensions, sizes and strides are left at `at`."""
    answer = integers(at)
    answer[0] = answer[1] = answer[2] = 0
    if get_layout(handle, at) or answer[0] or get_dtype(handle, at + 8) or answer[1] != dtype:
        return False
    if get_device_type(handle, at + 16) or answer[2]:
        return False
    return not (get_dim(handle, at) or get_sizes(handle, at + 8) or get_strides(handle, at + 16))


@njit
def have_addresses(place, count):
    """Put addresses in the place of `count` handles; False if a tensor has none."""
    for k in range(count):
        if get_data_ptr(place + 8 * k, place + 8 * k) or integers(place)[k] == 0:
            return False
    return True


@cfunc("int64(int64, int64)", cache=ON_DISK)
def alike(place, count):
    """Put addresses in the place of `count` handles; the number of elements, or UNFIT.

    Fit are tensors on the CPU, alike in dtype, shape and strides, with no two elements in one place. Beside the handles
    there is room for ROOM words.
    """
    at = place + 8 * count
    answer = integers(at)
    answer[3] = 0
    if get_dtype(place, at + 24) or not is_plain(place, at, answer[3]):
        return UNFIT
    dimensions, sizes, strides = answer[0], integers(answer[1]), integers(answer[2])
    elements = 1
    for d in range(dimensions):
        elements *= sizes[d]
    if elements == 0 or not is_dense(sizes, strides, dimensions, elements):
        return UNFIT
    for k in range(1, count):
        if not is_plain(place + 8 * k, at, answer[3]) or answer[0] != dimensions:
            return UNFIT
        its_sizes, its_strides = integers(answer[1]), integers(answer[2])
        for d in range(dimensions):
            if its_sizes[d] != sizes[d] or (its_strides[d] != strides[d] and sizes[d] != 1):
                return UNFIT
    return elements if have_addresses(place, count) else UNFIT


@cfunc("int64(int64, int64, int64)", cache=ON_DISK)
def fitting(place, count, kinds):
    """As `alike`, for a formula over rows; the matrices' rows and columns are left behind the addresses.

    The last two bits of `kinds` say what the first tensor is, which must be a matrix, the next two the second, and so
    on: TENSOR, ROW, COLUMN or LABEL.
    """
    at = place + 8 * count
    answer = integers(at)
    answer[3] = 0
    if get_dtype(place, at + 24) or not is_plain(place, at, answer[3]) or answer[0] != 2:
        return UNFIT
    rows, columns = integers(answer[1])[0], integers(answer[1])[1]
    if rows * columns == 0:
        return UNFIT
    for k in range(count):
        kind = (kinds >> 2 * k) & 3
        if not is_plain(place + 8 * k, at, INT64 if kind == LABEL else answer[3]):
            return UNFIT
        if answer[0] != (1 if kind == COLUMN else 2):
            return UNFIT
        sizes, strides = integers(answer[1]), integers(answer[2])
        if kind == COLUMN:
            if sizes[0] != columns or (strides[0] != 1 and columns != 1):
                return UNFIT
            continue
        wide = columns if kind == TENSOR else 1
        if sizes[0] != rows or sizes[1] != wide:
            return UNFIT
        if (strides[1] != 1 and wide != 1) or (strides[0] != wide and rows != 1):
            return UNFIT
    if not have_addresses(place, count):
        return UNFIT
    answer[0], answer[1] = rows, columns
    return rows * columns
'''


@functools.cache
def functions() -> ModuleType | None:
    """Return the compiled functions that look at tables of tensors, or None where they cannot be had."""
    return _compiled("native", _TABLES)


@functools.cache
def entries() -> ModuleType | None:
    """As `functions`, those that kernels call in their entries, `alike` and `fitting`, which the kernels then may do.

    Apart, as either takes a second to compile and an optimizer's first step needs the others alone.
    """
    module = _compiled("native_entries", _ENTRIES)
    if module is not None:
        library.make_known({f"torch_bp_{f.__name__}": f.address for f in (module.alike, module.fitting)})
    return module


def _compiled(name: str, text: str) -> ModuleType | None:
    if not cpu.usable():
        return None
    try:
        library.export(f"aoti_torch_get_{a}" for a in _ANSWERS)
        declared = [f'get_{a} = types.ExternalFunction("aoti_torch_get_{a}", ask)' for a in _ANSWERS]
        common = _COMMON.format(functions="\n".join(declared), pointer=cpu_text.POINTER)
        return cpu.compiled(name, common + text)
    except Exception as error:
        _log.info("tensors are checked one by one (%s: %s)", type(error).__name__, error)
        return None


def handles(tensors: Iterable[torch.Tensor], count: int) -> np.ndarray:
    """Return the handles of `count` tensors; TypeError if something else is among them."""
    return np.fromiter(map(handle_of, tensors), np.int64, count)
