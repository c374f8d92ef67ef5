"""`common_nn`: the classes with which torch tests modules and losses, given ours.

They hold forward values against references, derivatives of both orders against finite differences, also of inputs
that are not contiguous and of batched gradients, and copies, casts and in-place variants against the module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.testing._internal import common_nn
from torch.testing._internal.common_utils import freeze_rng_state

import torch_bp.nn as ours
from tests.conformance.group import CLASSES, Group

KIND = "torch's tests"


class _Case(common_nn.NNTestCase):
    """What torch's test classes leave to the test case that runs them."""

    def _forward(self, module: Any, input: Any) -> Any:
        with freeze_rng_state():
            return module(*input) if isinstance(input, tuple) else module(input)

    def _backward(self, module: Any, input: Any, output: Any, grad_output: Any, create_graph: bool = False) -> Any:
        output.backward(grad_output, retain_graph=True, create_graph=create_graph)
        return tuple(i.grad for i in input) if isinstance(input, tuple) else input.grad

    def _forward_criterion(self, criterion: Any, input: Any, target: Any, extra_args: Any = ()) -> Any:
        return criterion(*input, target) if isinstance(input, tuple) else criterion(input, target, *extra_args)

    def _get_parameters(self, module: Any) -> Any:
        parameters = [*module.parameters()]
        return parameters, [p.grad for p in parameters]

    def _zero_grad_parameters(self, module: Any) -> None:
        module.zero_grad(set_to_none=False)


@contextmanager
def _given_ours() -> Iterator[None]:
    """Let torch's data, which looks classes and functions up when it runs, find ours."""
    with mock.patch.object(common_nn, "nn", ours), mock.patch.object(common_nn, "F", ours.functional):
        yield


def _entries() -> Iterator[tuple[type, dict[str, Any]]]:
    with _given_ours():
        for entry in (*common_nn.module_tests, *common_nn.get_new_module_tests()):
            yield common_nn.NewModuleTest, dict(entry)
        for entry in common_nn.criterion_tests:
            yield common_nn.CriterionTest, dict(entry)


def _class_of(entry: dict[str, Any]) -> str | None:
    """Of an entry that names its class, or is called `log_softmax_scalar` or `NLLLoss2d_no_reduce`."""
    if "module_name" in entry:
        return entry["module_name"] if entry["module_name"] in CLASSES else None
    called = entry["fullname"].replace("_", "").lower()
    return next((name for name in CLASSES if called.startswith(name.lower())), None)


def groups() -> Iterator[Group]:
    """Every entry by itself. torch draws random numbers for them: whoever lists them keeps his own."""
    with torch.random.fork_rng(devices=[]):
        entries = [*_entries()]
    for test_class, entry in entries:
        name = _class_of(entry)
        if name is not None:
            called = entry.get("fullname") or entry.get("desc") or "default"
            yield Group(name, KIND, called, partial(_checks, test_class, entry, called))


def _checks(test_class: type, entry: dict[str, Any], called: str) -> Iterator[tuple[str, Any]]:
    yield called, partial(_check, test_class, entry)


def _check(test_class: type, entry: dict[str, Any]) -> None:
    # Where an entry names no dtype, torch takes finite differences in float32, which tell rounding from rounding.
    threads, entry = torch.get_num_threads(), {"default_dtype": torch.float64, **entry}
    module_name = entry.pop("module_name", None)
    if module_name is not None:
        entry["constructor"] = getattr(ours, module_name)
    try:
        with _given_ours():
            test_class(**entry)(_Case())
    finally:
        torch.set_num_threads(threads)  # torch's classes set it
