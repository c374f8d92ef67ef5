"""The benchmarks, small and on the CPU: ours and the peers compute the same, and what is measured is what is said."""

import pytest
import torch

import torch_bp.optim
from tests import hostile, tables
from tests.benchmarks import (
    cross_entropy,
    exactness,
    fusion,
    gradient_check,
    guard,
    honesty,
    loops,
    network,
    normalised,
    operations,
    optimizers,
    train_step,
)
from tests.benchmarks.protocol import agree
from tests.ops.test_graph import Recorder
from torch_bp import ops

WIDTHS = (6, 5, 4, 3)


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling takes its time, and what is compiled here is torch's."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("what", operations.OPERATIONS)
def test_operations_agree(what):
    workload, smallest, _ = next(operations.sizes(what))
    assert workload == f"{torch.Size(smallest).numel()} element{'s' if sum(smallest) > 2 else ''}"
    for shape in (smallest, (5, 3)):
        mine, peer = operations.sides(what, shape)
        operations.check(mine, peer)
        assert len(mine()) == 1 + len(operations.DIFFERENTIATED.get(what, ("input",)))


@pytest.mark.parametrize("name", fusion.ACTIVATIONS)
def test_fused_layers_agree(name, uncompiled):
    runs = fusion.sides(name, (4, 3, 2))
    assert [tuple(t.shape) for t in runs["ours"]()] == [(4, 2), (4, 3), (2, 3), (2,)]
    assert runs["ours"]()[0].grad_fn.name() == f"Linear{name.capitalize()}Backward"
    for run in runs.values():
        agree(runs["ours"](), run())


def test_cross_entropies_agree(uncompiled):
    runs = cross_entropy.sides(7, 5)
    assert [tuple(t.shape) for t in runs["ours"]()] == [(), (7, 5)]
    for run in runs.values():
        agree(runs["ours"](), run(), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_agree(dtype, uncompiled):
    runs = network.sides(WIDTHS, 4, "cpu", dtype)
    shapes = [(4, 3), (5, 6), (5,), (4, 5), (4,), (3, 4), (3,)]
    for run in runs.values():
        assert [tuple(t.shape) for t in run()] == shapes
        agree(runs["ours"](), run(), **({} if dtype is torch.float32 else network.HALF))


def test_networks_are_of_both_libraries():
    layers = [type(layer).__module__ for layer in network.perceptron(network.torch_bp.nn, WIDTHS)]
    assert layers == [f"torch_bp.nn.{name}" for name in ("linear", "activation") * 2 + ("linear",)]
    layers = [type(layer).__module__ for layer in network.perceptron(torch.nn, WIDTHS)]
    assert layers == [f"torch.nn.modules.{name}" for name in ("linear", "activation") * 2 + ("linear",)]


def test_normalised_networks_agree(uncompiled):
    runs, _ = normalised.sides(2, 4, 32)
    shapes = [(32, 4), *[(4, 4), (4,), (4,)] * 2, (4, 4), (4,)]
    for run in runs.values():
        assert [tuple(t.shape) for t in run()] == shapes
        agree(runs["ours"](), run())


def test_bytes_that_normalised_networks_keep(uncompiled):
    """Ours: the input, a tensor a block, and two statistics of each of its channels; torch's: two tensors a block."""
    runs, there = normalised.sides(2, 4, 32)
    found = {name: normalised.kept_bytes(run, there) for name, run in runs.items()}
    statistics, tensor = 2 * 2 * 4 * 4, 32 * 4 * 4
    expected = {"ours": 3 * tensor + statistics, "torch": 5 * tensor + statistics}
    assert found == expected | {"compiled": expected["torch"]}


def test_every_operation_has_hostile_inputs():
    """What takes an activation, with some of them."""
    names = {row.name for row in hostile.HOSTILE}
    assert names >= {row.name for row in tables.ROWS}
    made = {"activation", "saves_input", "saves_output", "gelu_tanh", "linear_activation", "batch_norm_activation"}
    assert names >= set(ops.__all__) - made
    assert names >= {"batch_norm_relu", "batch_norm_gelu"}
    assert {row.name for row in exactness.ROWS} == names


def test_steps_agree_and_learn():
    runs = honesty.steps(WIDTHS, 4)
    assert list(runs) == ["torch_bp", *honesty.SETTINGS]
    honesty.check(runs, {})
    for run in runs.values():
        assert run() > run() > run()


def test_the_least_of_a_step_is_its_products_and_an_update(monkeypatch):
    updated = []
    step = torch_bp.optim.Adam.step
    monkeypatch.setattr(torch_bp.optim.Adam, "step", lambda self: (updated.append(self), step(self)))
    train_step.least(WIDTHS, 4)()
    (optimizer,) = updated
    weights = [p for p in optimizer.param_groups[0]["params"] if p.dim() == 2]
    for weight, dw in zip(weights, honesty.products(WIDTHS, 4)(), strict=True):
        torch.testing.assert_close(weight.grad, dw)


def test_steps_that_differ_are_seen():
    runs = honesty.steps(WIDTHS, 4)
    runs["torch"]()
    with pytest.raises(AssertionError, match="not close"):
        honesty.check(runs, {})


def test_bare_products_are_those_of_a_step():
    """The weight gradients of half the squared output, and no other operation than three products a layer but one."""
    x, _ = network.batch(4, WIDTHS)
    layers = network.perceptron(torch.nn, WIDTHS)[::2]
    output = x
    for layer in layers:
        output = output @ layer.weight.T
    expected = torch.autograd.grad(output.square().sum() / 2, [layer.weight for layer in layers])
    run = honesty.products(WIDTHS, 4)
    for _ in range(2):
        agree(run(), expected)
    with Recorder() as recorder:
        run()
    assert [n for n in recorder.names if n != "aten::t"] == ["aten::mm"] * (3 * len(layers) - 1)


SMALL = {
    "C4": (loops, {"WORKLOADS": {"4-3-2, batch 5": ((4, 3, 2), 5)}}),
    "C5": (operations, {"SIZES": {"128x512": ((3, 2), 1.3)}, "OPERATIONS": {"relu": operations.OPERATIONS["relu"]}}),
    "C6": (fusion, {"SIZES": {"32x64->64": ((4, 3, 2), 1.1)}, "ACTIVATIONS": ("tanh",)}),
    "C7": (cross_entropy, {"WORKLOADS": {"C7": {(64, 512): (0.8, 0.35)}}}),
    "C8": (normalised, {"WIDTH": 4, "BATCH": 2048}),
    "C9": (honesty, {"WORKLOADS": {"C9": ((2, 4, 3, "cpu", torch.float32), (None, None))}}),
    "guard": (guard, {"SIZES": {"64-32-10, batch 32": ((4, 3, 2), 5)}, "STEPS": 4}),
    "R5": (exactness, {"ROWS": [row for row in exactness.ROWS if row.name == "silu"][:2]}),
    "G2": (network, {"WIDTHS": WIDTHS, "BATCH": 4, "DEVICE": "cpu"}),
    "G4": (honesty, {"WORKLOADS": {"G4": ((2, 4, 3, "cpu", torch.bfloat16), (1.08, 0.93))}}),
    "G5": (
        optimizers,
        {
            "CUDA_WORKLOADS": {"G5": {"small": [(3, 2), (4,)]}},
            "OPTIMIZERS": {"G5": {"Adagrad": ("Adagrad", {"lr": 1e-3})}},
            "DEVICES": {"G5": "cpu"},
        },
    ),
    "G6": (
        optimizers,
        {
            "CUDA_WORKLOADS": {"G6": {"small": [(3, 2), (4,)]}},
            "OPTIMIZERS": {"G6": {"Adam": ("Adam", {"lr": 1e-3})}},
            "DEVICES": {"G6": "cpu"},
        },
    ),
    "G7": (cross_entropy, {"WORKLOADS": {"G7": {(64, 512): (0.4, 0.35)}}, "DEVICES": {"G7": "cpu"}}),
}
LINES = {  # what is printed: what is measured, against what, and the target
    "C4": [("step", "torch", 0.75), ("step", "torch, fused Adam", 1.05)],
    "C5": [("relu", "torch", 1.3)],
    "C6": [("linear_tanh", "torch", 1.1), ("linear_tanh", "compiled", None)],
    "C7": [
        ("cross_entropy", "torch", 0.8),
        ("memory", "torch", 0.35),
        ("cross_entropy", "compiled", None),
        ("memory", "compiled", None),
    ],
    "C8": [
        ("kept for backward", "torch", 0.53),
        ("forward, backward", "torch", 1.05),
        ("kept for backward", "compiled", None),
        ("forward, backward", "compiled", None),
    ],
    "R5": [("silu", "torch", 1.0)] * 3,
    "C9": [
        *[(f"step, {name}", "bare products", None) for name in ("torch_bp", "torch", "torch, fused Adam")],
        *[("step, torch_bp", name, None) for name in ("torch", "torch, fused Adam")],
    ],
    "G2": [("forward, backward", "torch", 0.5), ("forward, backward", "best: compiled", 0.9)],
}
LINES["guard"] = [
    ("4 steps, autograd", "no guard", None),
    ("4 steps, TrainStep", "no guard", None),
    ("memory of the snapshots", "model and Adam", None),
]
LINES["G5"] = [("Adagrad", "default", 0.53), ("Adagrad", "best", 1.0), ("Adagrad", "copy of its bytes", 1 / 0.88)]
LINES["G6"] = [("Adam", "default", 0.25), ("Adam", "best", 0.67)]
LINES["G4"] = [(what, peer, {0: 1.08, 3: 0.93}.get(number)) for number, (what, peer, _) in enumerate(LINES["C9"])]
LINES["G7"] = [(what, peer, {0.8: 0.4}.get(target, target)) for what, peer, target in LINES["C7"]]


@pytest.mark.parametrize("group", SMALL)
def test_lines_of_the_table(group, monkeypatch, uncompiled):
    module, settings = SMALL[group]
    for name, value in settings.items():
        monkeypatch.setattr(module, name, value)
    results = list(module.measure(group, 1))
    expected = [(what, "best" if peer.startswith("best") else peer, target) for what, peer, target in LINES[group]]
    assert [(r.what, "best" if r.peer.startswith("best") else r.peer, r.target) for r in results] == expected
    for result in results:
        assert result.group == group
        assert result.ratio > 0
        if result.what == "memory":  # exact, so a test
            assert result.unit == "bytes"
            assert result.ratio == result.low == result.high <= 0.35
            assert result.working_set == 2 * 4 * 64 * 512
        if result.unit == "ulp":
            assert result.met
            assert result.low <= result.ratio <= result.high <= result.most == 1.5
        if result.what == "kept for backward":
            assert result.unit == "bytes"
            assert result.ratio <= 0.53


def test_gradient_checks_check_the_same_layer():
    for fast in (True, False):
        mine, peer = gradient_check.sides((5, 3), fast)
        assert [row.shape for row in mine().rows] == [(32, 5), (3, 5), (3,)]
        assert peer() is True
