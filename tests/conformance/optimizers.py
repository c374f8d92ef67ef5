"""`common_optimizers.optim_db`: how torch builds its optimizers, and what they must refuse.

torch's samples say with which options; the parameters and gradients are ours.
"""

import copy
import pickle
import re
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.testing._internal.common_optimizers import optim_db

import torch_bp.optim as ours
from tests.conformance.comparison import failure
from tests.conformance.group import Group

INPUTS, ERRORS = "optimizer inputs", "optimizer errors"
KINDS = (INPUTS, ERRORS)
INFOS = [info for info in optim_db if getattr(ours, info.optim_cls.__name__) is not info.optim_cls]
OPTIMIZERS = sorted(info.optim_cls.__name__ for info in INFOS)
CLOSE = {  # after 40 steps, rounded in another order
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.complex128: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.complex64: {"rtol": 2e-5, "atol": 2e-6},
}
SHAPES = [(3, 4), (5,), (), (0, 3), (70, 50)]


def groups() -> Iterator[Group]:
    """For every optimizer its inputs by dtype, and its error inputs."""
    for info in INFOS:
        name = info.optim_cls.__name__
        for dtype in CLOSE:
            yield Group(name, INPUTS, f"{dtype}", partial(_inputs, info, dtype))
        yield Group(name, ERRORS, "any", partial(_errors, info))


def _inputs(info: Any, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    for sample in info.optim_inputs_func(device="cpu", dtype=dtype):
        yield f"{sample.desc} {sample.kwargs}", partial(_check, info.optim_cls, sample.kwargs, dtype)


def _parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def _train(optimizer: torch.optim.Optimizer, seed: int, steps: int = 20) -> None:
    """Make steps along random gradients, some of which are missing."""
    torch.manual_seed(seed)
    for number in range(steps):
        for position, p in enumerate(optimizer.param_groups[0]["params"]):
            grad = torch.randn(p.shape, dtype=p.dtype)
            p.grad = None if (number + position) % 7 == 3 else grad
        optimizer.step()


def _check(theirs: type, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Ours makes torch's steps, keeps torch's state, and either goes on from the other's."""
    mine = getattr(ours, theirs.__name__)(_parameters(dtype), **copy.copy(options))
    other = theirs(_parameters(dtype), **copy.copy(options))
    assert repr(mine) == repr(other)
    assert mine.defaults == other.defaults
    for optimizer in (mine, other):
        _train(optimizer, seed=1)
    _assert_same(mine, other, CLOSE[dtype])
    mine = pickle.loads(pickle.dumps(mine))
    saved = copy.deepcopy(mine.state_dict()), copy.deepcopy(other.state_dict())
    mine.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    for optimizer in (mine, other):
        _train(optimizer, seed=2)
    _assert_same(mine, other, CLOSE[dtype], numbers=False)


def _assert_same(mine: Any, other: Any, close: dict[str, float], numbers: bool = True) -> None:
    """Parameters and state alike; `numbers` that torch loads in the dtype of a parameter may be left out."""
    torch.testing.assert_close(mine.param_groups[0]["params"], other.param_groups[0]["params"], **close)
    got, expected = mine.state_dict(), other.state_dict()
    assert got["param_groups"] == expected["param_groups"]
    assert got["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert [*got["state"][number]] == [*state]
        for name, value in state.items():
            if numbers or name not in getattr(mine, "numbers", ()):
                torch.testing.assert_close(got["state"][number][name], value, msg=lambda t: f"{name}: {t}", **close)  # noqa: B023


def _errors(info: Any) -> Iterator[tuple[str, Any]]:
    for sample in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        yield sample.error_regex, partial(_check_error, info.optim_cls, sample)


def _check_error(theirs: type, sample: Any) -> None:
    """The type that torch's data asks for, and the very words of torch's class."""
    given = sample.optimizer_error_input

    def run(kind: type) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one of torch's samples is only warned of
            kind(given.params, **given.kwargs).step()

    kind, message = failure(lambda: run(getattr(ours, theirs.__name__)))
    assert kind is not None, "no error"
    assert issubclass(kind, sample.error_type), f"{kind.__name__} instead of {sample.error_type}"
    assert re.search(sample.error_regex, message), message
    assert (kind, message) == failure(lambda: run(theirs)), message
