"""One row per optimizer: ours, torch's, and options beyond those of torch's own input table."""

import re
import warnings

import torch

from torch_bp import optim

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # torch's own conformance data, shipped in its wheel
    from torch.testing._internal.common_optimizers import optim_db


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023 in operations of torch, since torch has no Lion."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0, *, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (beta1, beta2), lr, weight_decay = group["betas"], group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                kept = p, p.grad, self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                real = [torch.view_as_real(t) if t.is_complex() else t for t in kept]
                theta, g, m = (t.float() if t.dtype is torch.bfloat16 else t for t in real)
                g = -g if group["maximize"] else g
                c = beta1 * m + (1 - beta1) * g
                real[0].copy_(theta - lr * (torch.sign(c) + weight_decay * theta))
                real[2].copy_(beta2 * m + (1 - beta2) * g)


TORCHS = ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta")
PAIRS = {name: (getattr(optim, name), getattr(torch.optim, name)) for name in TORCHS} | {"Lion": (optim.Lion, Lion)}
INFO = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in PAIRS}
INPUTS = [
    (name, options)
    for name, info in INFO.items()
    for options in (dict(i.kwargs) for i in info.optim_inputs_func(device="cpu"))
]
INPUTS += [
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    ("RAdam", {"betas": (0.8, 0.6)}),
    ("RAdam", {"betas": (0.9, 0)}),
]
INPUTS += [("NAdam", {"betas": (0.5, 0.9), "momentum_decay": 0.5, "maximize": True})]
INPUTS += [
    ("Lion", options) for options in ({}, {"lr": 0.1, "betas": (0.5, 0.9)}, {"weight_decay": 0.1, "maximize": True})
]
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


def readable(value):
    """A name for a test, without the addresses of functions, which differ from process to process."""
    return re.sub(r"<function (\S+) at 0x\w+>", r"\1", str(value).strip("{}"))
