"""Torch's own conformance data for its modules, run through ours. Private to torch, so it may be missing one day."""

import inspect

import pytest
import torch

import torch_bp.nn as ours

common = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="torch ships no conformance data", exc_type=ImportError
)
INFOS = [
    info for info in common.module_db if getattr(ours, info.module_cls.__name__, info.module_cls) is not info.module_cls
]
every_class = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def build(module_class, sample):
    torch.manual_seed(0)
    return module_class(*sample.constructor_input.args, **sample.constructor_input.kwargs)


def copied(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def run(module_class, sample):
    """State, output and gradients of a class on torch's sample."""
    module = build(module_class, sample).double()
    args = [copied(a) for a in sample.forward_input.args]
    kwargs = {k: copied(a) for k, a in sample.forward_input.kwargs.items()}
    output = module(*args, **kwargs)
    tensors = [t for t in (*args, *kwargs.values(), *module.parameters()) if isinstance(t, torch.Tensor)]
    wanted = [t for t in tensors if t.requires_grad]
    return dict(module.state_dict()), output, torch.autograd.grad(output.sin().sum(), wanted)


WITHOUT_DATA = {"Dropout"}  # torch ships samples for none of the random ones


def test_all_our_classes_of_torchs_are_there():
    mirrored = {
        name
        for name, found in vars(ours).items()
        if inspect.isclass(found) and issubclass(found, getattr(torch.nn, name, ()))
    }
    assert mirrored - WITHOUT_DATA == {info.module_cls.__name__ for info in INFOS}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@every_class
def test_samples(info, training):
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    assert samples
    for sample in samples:
        got, expected = run(getattr(ours, info.module_cls.__name__), sample), run(info.module_cls, sample)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("info", [i for i in INFOS if i.module_error_inputs_func], ids=lambda info: info.name)
def test_error_samples(info):
    samples = info.module_error_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
    for sample in samples:
        module = build(getattr(ours, info.module_cls.__name__), sample.module_error_input)
        forward = sample.module_error_input.forward_input
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module(*forward.args, **forward.kwargs)
