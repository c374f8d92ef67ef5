"""`common_modules.module_db`: how torch builds its modules, what it feeds them, and what they must refuse."""

import copy
import pickle
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.testing._internal.common_modules import module_db

import torch_bp.nn as ours
from tests.conformance.comparison import assert_alike, behaviour, copied, failure, strided, wide
from tests.conformance.group import CLASSES, Group

INPUTS, ERRORS = "module inputs", "module errors"
INFOS = [info for info in module_db if info.module_cls.__name__ in CLASSES]
Checks = Iterator[tuple[str, Any]]


def groups() -> Iterator[Group]:
    """For every class its inputs by dtype and mode, and its error inputs."""
    for info in INFOS:
        name = info.module_cls.__name__
        for dtype in info.supported_dtypes("cpu"):
            for training in (True, False):
                case = f"{dtype} {'training' if training else 'evaluation'}"
                yield Group(name, INPUTS, case, partial(_inputs, info, dtype, training))
            if info.module_error_inputs_func:
                yield Group(name, ERRORS, f"{dtype}", partial(_errors, info, dtype))


def _inputs(info: Any, dtype: torch.dtype, training: bool) -> Checks:
    options = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
    for sample in info.module_inputs_func(info, **options):
        yield sample.desc, partial(_check, info.module_cls, sample, dtype, training)


def _build(module_class: type, sample: Any, dtype: torch.dtype, training: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    constructor = sample.constructor_input
    return module_class(*constructor.args, **constructor.kwargs).to(dtype).train(training)


def _check(module_class: type, sample: Any, dtype: torch.dtype, training: bool) -> None:
    """Ours starts with torch's numbers, exchanges state with it, and then computes what it computes."""
    mine = _build(getattr(ours, module_class.__name__), sample, dtype, training)
    other = _build(module_class, sample, dtype, training)
    assert type(mine) is not type(other)
    assert repr(mine) == repr(other)
    torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):  # no ones and zeros, which hide what they are for
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    mine.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(mine.state_dict(), strict=True)
    exactly = copy.deepcopy(other).double()
    again, spaced = pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)
    inputs = sample.forward_input.args, sample.forward_input.kwargs
    got, expected = _run(mine, inputs), _run(other, inputs)
    exact = partial(_run, exactly, wide(inputs))
    assert_alike(got, expected, exact)
    torch.testing.assert_close(_run(again, inputs), got, rtol=0, atol=0, equal_nan=True)
    assert_alike(_run(spaced, strided(inputs)), expected, exact)
    _check_reference(mine, sample)


def _run(module: torch.nn.Module, inputs: tuple[Any, Any]) -> dict[str, Any]:
    """The behaviour of a module, by its inputs and parameters, and the state it is left in."""
    found = behaviour(module, *inputs[0], wanted=[*module.parameters()], **inputs[1])
    return found | {"state": {k: v.clone() for k, v in module.state_dict().items()}}


def _check_reference(module: torch.nn.Module, sample: Any) -> None:
    """torch's test data may say what the output should be; single precision must be near, as torch's must."""
    if sample.reference_fn is None:
        return
    args, kwargs = copied(sample.forward_input.args), copied(sample.forward_input.kwargs)
    output = module(*args, **kwargs)
    half = output.dtype is torch.float16  # what torch allows itself there
    more = {"rtol": 1e-3, "atol": 3e-2} if half else {}
    torch.testing.assert_close(output, sample.reference_fn(module, *args, **kwargs), **more)


def _errors(info: Any, dtype: torch.dtype) -> Checks:
    options = {"device": "cpu", "dtype": dtype, "requires_grad": False, "training": True}
    for sample in info.module_error_inputs_func(info, **options):
        yield sample.error_regex, partial(_check_error, info.module_cls, sample)


def _check_error(module_class: type, sample: Any) -> None:
    """The type that torch's data asks for, and the very words of torch's class."""
    construct, forward = sample.module_error_input.constructor_input, sample.module_error_input.forward_input

    def run(module_class: type) -> None:
        module = module_class(*construct.args, **construct.kwargs)
        module(*copied(forward.args), **copied(forward.kwargs))

    kind, message = failure(lambda: run(getattr(ours, module_class.__name__)))
    assert kind is not None, "no error"
    assert issubclass(kind, sample.error_type), f"{kind.__name__} instead of {sample.error_type}"
    assert re.search(sample.error_regex, message), message
    assert (kind, message) == failure(lambda: run(module_class)), message
