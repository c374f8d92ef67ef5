"""One row per optimizer: ours, torch's, and options beyond those of torch's own input table."""

import warnings

import torch

from torch_bp import optim

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # torch's own conformance data, shipped in its wheel
    from torch.testing._internal.common_optimizers import optim_db

PAIRS = {
    name: (getattr(optim, name), getattr(torch.optim, name)) for name in ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW")
}
INFO = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in PAIRS}
INPUTS = [
    (name, options)
    for name, info in INFO.items()
    for options in (dict(i.kwargs) for i in info.optim_inputs_func(device="cpu"))
]
INPUTS += [("SGD", {"momentum": 0.9, "dampening": 0.5})]
SHAPES = [(3, 4), (5,), (), (40, 50), (0, 3)]


def parameters(dtype=torch.float64, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def train(optimizer, params, steps, seed=1, missing=None):
    """Make `steps` with random gradients; every seventh has none for parameter `missing`."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if missing is not None and number % 7 == 3:
            params[missing].grad = None
        optimizer.step()


def assert_same_state(ours, theirs, **tolerance):
    """Same parameters' state: keys in the same order, values close, kinds alike."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index in b["state"]:
        assert list(a["state"][index]) == list(b["state"][index])
        for key, expected in b["state"][index].items():
            torch.testing.assert_close(a["state"][index][key], expected, **tolerance)
