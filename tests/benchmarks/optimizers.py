"""C1 and C2: one optimizer step, against torch's default and torch at its best."""

from collections.abc import Iterator

import torch

import torch_bp.optim
from tests.benchmarks.protocol import Result, paired

# The shapes of an MNIST multilayer perceptron (0.67 M parameters in 6 tensors), many small layers, and 25 M parameters.
WORKLOADS = {
    "0.67 M in 6": [(512, 784), (512,), (512, 512), (512,), (10, 512), (10,)],
    "200 small": [(64, 64), (64,)] * 100,
    "25 M in 48": [(1021, 1021), (1021,)] * 24,
}
C1 = {  # name: torch class, options, targets against default and best for each workload
    "SGD momentum": ("SGD", {"lr": 1e-3, "momentum": 0.9}),
    "SGD Nesterov": ("SGD", {"lr": 1e-3, "momentum": 0.9, "nesterov": True}),
    "Adagrad": ("Adagrad", {"lr": 1e-3}),
    "Adam": ("Adam", {"lr": 1e-3}),
    "AdamW": ("AdamW", {"lr": 1e-3}),
}
C2 = {
    "RMSprop": ("RMSprop", {"lr": 1e-3}),
    "RMSprop momentum": ("RMSprop", {"lr": 1e-3, "momentum": 0.9}),
    "RMSprop centered": ("RMSprop", {"lr": 1e-3, "centered": True}),
}
TARGETS = {
    "C1": {"0.67 M in 6": (0.33, 0.80), "200 small": (0.08, 0.30), "25 M in 48": (0.30, 0.95)},
    "C2": {"0.67 M in 6": (0.40, 0.60), "200 small": (0.10, 0.30), "25 M in 48": (0.45, 0.60)},
}


def _optimizer(kind: type, shapes: list, options: dict) -> tuple[torch.optim.Optimizer, list]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.1) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 0.01
    return kind(params, **options), params


def _gradient(p: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-0.01, 0.01, p.numel()).view(p.shape)


def _agree(ours: list, theirs: list) -> None:
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def _peers(group: str, workload: str) -> dict[str, dict]:
    peers = {"default": {}, "foreach": {"foreach": True}}
    if group == "C1":
        return peers | {"fused": {"fused": True}}
    return peers | {"compiled": {"compiled": True}}


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield, for each optimizer and workload, the ratio to torch's default and to the fastest of torch's settings."""
    for what, (name, options) in (C1 if group == "C1" else C2).items():
        for workload, shapes in WORKLOADS.items():
            ours, _params = _optimizer(getattr(torch_bp.optim, name), shapes, options)
            results = {}
            for peer, setting in _peers(group, workload).items():
                setting = dict(setting)
                compiled = setting.pop("compiled", False)
                theirs, their_params = _optimizer(getattr(torch.optim, name), shapes, {**options, **setting})
                step = torch.compile(theirs.step) if compiled else theirs.step
                fresh, fresh_params = _optimizer(getattr(torch_bp.optim, name), shapes, options)
                for _ in range(3):
                    for p in (*their_params, *fresh_params):  # torch's foreach writes into the gradients
                        p.grad = _gradient(p)
                    step()
                    fresh.step()
                _agree(fresh_params, their_params)
                results[peer] = paired(ours.step, step, pairs)
            best = min((p for p in results if p != "default"), key=lambda p: results[p][4])
            targets = TARGETS[group][workload]
            yield Result(group, what, workload, "default", *results["default"], targets[0])
            yield Result(group, what, workload, f"best: {best}", *results[best], targets[1])
