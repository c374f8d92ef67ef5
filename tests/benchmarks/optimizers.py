"""C1, C2, G5 and G6: one optimizer step, against torch's default and torch at its best.

On CUDA torch's default is `foreach=True`, and a copy of as many bytes as a step must move says what memory allows.
"""

import math
from collections.abc import Callable, Iterator

import torch

import torch_bp.optim
from tests.benchmarks.protocol import Result, paired

# The shapes of an MNIST multilayer perceptron (0.67 M parameters in 6 tensors), many small layers, and 25 M parameters.
WORKLOADS = {
    "0.67 M in 6": [(512, 784), (512,), (512, 512), (512,), (10, 512), (10,)],
    "200 small": [(64, 64), (64,)] * 100,
    "25 M in 48": [(1021, 1021), (1021,)] * 24,
}
CUDA_WORKLOADS = {
    "G5": {"32 of 2048x2048": [(2048, 2048)] * 32},
    "G6": {"600 of 1 k to 64 k": [(1024 + 108 * number,) for number in range(600)]},
}
DEVICES = {"C1": "cpu", "C2": "cpu", "G5": "cuda", "G6": "cuda"}
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
G5 = {"SGD": ("SGD", {"lr": 1e-3})} | {n: (C1 | C2)[n] for n in ("SGD Nesterov", "Adagrad", "Adam", "RMSprop")}
G6 = {n: C1[n] for n in ("SGD momentum", "Adam")}
OPTIMIZERS = {"C1": C1, "C2": C2, "G5": G5, "G6": G6}
NEVER_FUSED = {"RMSprop"}
# Of a step over a parameter in float32: 12 of plain SGD, and 8 more for each state.
BYTES = {"SGD": 12, "SGD momentum": 20, "SGD Nesterov": 20, "Adagrad": 20, "Adam": 28, "RMSprop": 20}
COPY = 1 / 0.88
CUDA_TARGETS = {"RMSprop": 0.45, "SGD Nesterov": 0.67, "Adagrad": 0.53}
TARGETS = {
    "C1": {"0.67 M in 6": (0.33, 0.80), "200 small": (0.08, 0.30), "25 M in 48": (0.30, 0.95)},
    "C2": {"0.67 M in 6": (0.40, 0.60), "200 small": (0.10, 0.30), "25 M in 48": (0.45, 0.60)},
}


def _optimizer(kind: type, shapes: list, options: dict, device: str) -> tuple[torch.optim.Optimizer, list]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(device)) for s in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 0.01).to(device)
    return kind(params, **options), params


def _gradient(p: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-0.01, 0.01, p.numel(), device=p.device).view(p.shape)


def _agree(ours: list, theirs: list) -> None:
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def _peers(name: str, device: str) -> dict[str, dict]:
    peers = {"default": {}} | ({"foreach": {"foreach": True}} if device == "cpu" else {})
    return peers | ({"compiled": {"compiled": True}} if name in NEVER_FUSED else {"fused": {"fused": True}})


def _targets(group: str, what: str, workload: str) -> tuple[float | None, float]:
    """Against torch's default and its best."""
    if group == "G5":
        return CUDA_TARGETS.get(what), 1.0
    return (0.25, 0.67) if group == "G6" else TARGETS[group][workload]


def _copy(shapes: list, what: str, device: str) -> Callable[[], object]:
    """A copy that moves as many bytes as a step."""
    size = sum(map(math.prod, shapes)) * BYTES[what] // 8
    source, target = torch.zeros(size, device=device), torch.zeros(size, device=device)
    return lambda: target.copy_(source)


def measure(group: str, pairs: int) -> Iterator[Result]:
    """Yield, for each optimizer and workload, the ratio to torch's default and to the fastest of torch's settings."""
    device = DEVICES[group]
    for what, (name, options) in OPTIMIZERS[group].items():
        for workload, shapes in CUDA_WORKLOADS.get(group, WORKLOADS).items():
            ours, _params = _optimizer(getattr(torch_bp.optim, name), shapes, options, device)
            results = {}
            for peer, setting in _peers(name, device).items():
                setting = dict(setting)
                compiled = setting.pop("compiled", False)
                theirs, their_params = _optimizer(getattr(torch.optim, name), shapes, {**options, **setting}, device)
                step = torch.compile(theirs.step) if compiled else theirs.step
                fresh, fresh_params = _optimizer(getattr(torch_bp.optim, name), shapes, options, device)
                for _ in range(3):
                    for p in (*their_params, *fresh_params):  # torch's foreach writes into the gradients
                        p.grad = _gradient(p)
                    step()
                    fresh.step()
                _agree(fresh_params, their_params)
                results[peer] = paired(ours.step, step, pairs, device)
            best = min((p for p in results if p != "default"), key=lambda p: results[p][4])
            targets = _targets(group, what, workload)
            yield Result(group, what, workload, "default", *results["default"], targets[0])
            yield Result(group, what, workload, f"best: {best}", *results[best], targets[1])
            if group == "G5":
                found = paired(ours.step, _copy(shapes, what, device), pairs, device)
                yield Result(group, what, workload, "copy of its bytes", *found, COPY)
