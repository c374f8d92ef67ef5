"""A `TrainStep` that is watched, against a watched loop through autograd."""

import dataclasses
import math

import pytest
import torch

import torch_bp
from torch_bp import nn, optim, watch
from torch_bp.autograd.tape import Tape

ALWAYS = {"every": 1, "budget": None}
X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(2))


class Written(torch.nn.Module):
    """Writes to what its layers have returned."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5), torch.nn.Linear(5, 3)

    def forward(self, x):
        h = self.one(x)
        z = self.two(x)
        h *= 2
        return self.three(h + z)


def network(kind):
    torch.manual_seed(0)
    if kind == "fused":
        model = nn.MLP([5, 8, 7, 3], activation="tanh")
    elif kind == "normalised":
        model = nn.MLP([5, 8, 7, 3], activation="relu", norm="batch", dropout=0.3)
    elif kind == "residual":
        model = nn.MLP([5, 8, 8, 3], activation="gelu", residual=True)
    elif kind == "in place":
        layers = [torch.nn.Linear(5, 8), torch.nn.ReLU(inplace=True), torch.nn.Linear(8, 7), torch.nn.Sigmoid()]
        model = torch.nn.Sequential(*layers, torch.nn.Linear(7, 3))
    else:
        model = Written()
    return model.double()


def flat(reading):
    """All numbers of a reading, by name."""
    found = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, each in value.items():
                walk(f"{name}.{key}", each)
        elif isinstance(value, list | tuple):
            for key, each in enumerate(value):
                walk(f"{name}.{key}", each)
        else:
            found[name] = value

    walk("", dataclasses.asdict(reading))
    return {name: value for name, value in found.items() if name.split(".")[-1] not in ("seconds", "share")}


def agree(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, float):
            assert value == pytest.approx(other[name], rel=1e-10, abs=1e-12, nan_ok=True), name
        else:
            assert value == other[name], name


def by_step(model, optimizer, batches, watching, level="full", accumulate=1, every=1, clip=None, **options):
    step = torch_bp.TrainStep(
        model, nn.CrossEntropyLoss(), optimizer, accumulate=accumulate, clip_grad_norm=clip, **options
    )
    monitor = watch(step, level=level, every=every, budget=None) if watching else None
    losses = [step(x, y) for x, y in batches]
    return losses, monitor


def by_autograd(model, optimizer, batches, level="full", accumulate=1, every=1, clip=None):
    loss_fn = nn.CrossEntropyLoss()
    monitor = watch(model, optimizer, loss_fn=loss_fn, level=level, every=every, budget=None)
    for number, (x, y) in enumerate(batches, 1):
        (loss_fn(model(x), y) / accumulate).backward()
        if number % accumulate == 0:
            if clip is not None:
                monitor.clipped(torch.nn.utils.clip_grad_norm_(model.parameters(), clip), clip)
            optimizer.step()
            optimizer.zero_grad()
    return monitor


def batches(count, accumulate=1):
    found = [(X.roll(k, 0) * (1 + k / 10), Y.roll(k, 0)) for k in range(count)]
    return [pair for x, y in found for pair in zip(x.chunk(accumulate), y.chunk(accumulate))]


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("level", ["summary", "layers", "full"])
@pytest.mark.parametrize("kind", ["fused", "normalised", "residual", "in place"])
def test_readings_are_those_of_the_loop(kind, level, capture):
    found = []
    for explicit in (True, False):
        model = network(kind)
        optimizer = optim.Adam(model.parameters(), lr=0.05)
        torch.manual_seed(5)
        if explicit:
            monitor = by_step(model, optimizer, batches(5), True, level, capture=capture)[1]
        else:
            monitor = by_autograd(model, optimizer, batches(5), level)
        found.append(monitor.readings)
        monitor.close()
    assert len(found[0]) == len(found[1]) == 5
    assert found[0][-1].layers[next(iter(found[0][-1].layers))].signal_norm > 0
    for one, other in zip(*found):
        agree(one, other)


@pytest.mark.parametrize("capture", [True, False])
def test_what_a_model_writes_over_is_read_as_it_was(capture):
    model = network("written")
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1), capture=capture)
    monitor = watch(step, level="full", **ALWAYS)
    for x, y in batches(3):
        h, z = model.one(x), model.two(x)
        logits = model.three(2 * h + z)
        h.retain_grad()
        torch.nn.functional.cross_entropy(logits, y).backward(inputs=[h])
        expected = h.mean().item(), h.grad.norm().item()
        step(x, y)
        layer = monitor.last.layers["one"]
        assert (layer.activation_mean, 2 * layer.signal_norm) == pytest.approx((expected[0], 2 * expected[1]))


@pytest.mark.parametrize("clip", [None, 0.1, 100.0])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("maker", [optim.Adam, torch.optim.SGD], ids=["ours", "torchs"])
def test_windows_and_clipping(maker, accumulate, clip):
    found = []
    for explicit in (True, False):
        model = network("fused")
        optimizer = maker(model.parameters(), lr=0.05)
        run = by_step if explicit else by_autograd
        arguments = (True,) if explicit else ()
        monitor = run(model, optimizer, batches(4, accumulate), *arguments, accumulate=accumulate, clip=clip)
        found.append((monitor[1] if explicit else monitor).readings)
    assert [r.step for r in found[0]] == [0, 1, 2, 3]
    for one, other in zip(*found):
        # the loop lets the monitor see gradients that are scaled down by its own operations, one bit apart
        agree(one, other)
    assert found[0][-1].clipped == (None if clip is None else clip < 1)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", ["fused", "normalised", "residual", "in place", "written"])
def test_weights_and_random_numbers_are_the_same_watched_or_not(kind, every):
    results = []
    for watching in (True, False):
        model = network(kind).float()
        optimizer = optim.Adam(model.parameters(), lr=0.05)
        torch.manual_seed(5)
        data = [(x.float(), y) for x, y in batches(8)]
        losses, monitor = by_step(model, optimizer, data, watching, "full", every=every, clip=0.5)
        if watching:
            assert [r.step for r in monitor.readings] == list(range(0, 8, every))
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        results.append([*losses, *model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_steps_that_are_not_recorded_are_those_of_a_step_that_is_not_watched():
    model = network("fused")
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()), capture=True)
    monitor = watch(step, every=4, budget=None)
    for x, y in batches(9):
        step(x, y)
    kinds = {"watched" in kind: lines for kind, lines in step._runner._lines.items()}
    assert [len(kinds[True]), len(kinds[False])] == [1, 1]
    assert kinds[False][0].heard == ()
    assert len(kinds[True][0].program.calls) >= len(kinds[False][0].program.calls)
    assert not step.optimizer._optimizer_step_post_hooks
    assert [r.step for r in monitor.readings] == [0, 4, 8]
    monitor.close()
    before = monitor.step
    step(*batches(1)[0])
    assert monitor.step == before
    assert len(monitor.readings) == 3


def test_a_step_is_given_a_monitor_and_refuses_another():
    model, loss_fn = network("fused"), nn.CrossEntropyLoss()
    optimizer = optim.Adam(model.parameters())
    monitor = watch(model, optimizer, **ALWAYS)
    step = torch_bp.TrainStep(model, loss_fn, optimizer, capture=True, watch=monitor)
    step(X, Y)
    assert monitor.last.loss_function == "CrossEntropyLoss"
    assert monitor.last.layers["0"].signal_norm > 0
    assert repr(monitor) == "Monitor(MLP, Adam, steps=1, readings=1, findings=0)"
    step.watch = None
    step(X, Y)
    assert len(monitor.readings) == 1
    with pytest.raises(TypeError, match="TrainStep: watch must be a monitor, got str"):
        step.watch = "logs"
    with pytest.raises(ValueError, match="must be a monitor of the step's optimizer"):
        step.watch = watch(model, optim.SGD(model.parameters()), **ALWAYS)
    with pytest.raises(TypeError, match="watch: optimizer must be left out"):
        watch(step, optimizer)


@pytest.mark.parametrize("folder", [str, lambda path: path])
def test_the_second_argument_beside_a_step_may_be_the_folder(folder, tmp_path):
    model = network("fused")
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
    with watch(step, folder(tmp_path / "run"), **ALWAYS):
        step(X, Y)
    assert len((tmp_path / "run" / "readings.jsonl").read_text().splitlines()) == 1
    with pytest.raises(TypeError, match="watch: output must be given once"):
        watch(step, folder(tmp_path / "run"), tmp_path)


def test_what_is_read_of_a_step_that_is_refused_is_no_part_of_the_next():
    model = network("fused")
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
    monitor = watch(step, **ALWAYS)
    step(X, Y)
    with pytest.raises(FloatingPointError):
        step(X * math.nan, Y)
    step(X, Y)
    first, refused, second = monitor.readings
    assert [(r.step, bool(r.refused)) for r in (first, refused, second)] == [(0, False), (1, True), (1, False)]
    assert refused.layers["0"].forward.nan == 12 * 8
    assert second.layers["0"].forward.ok
    assert (second.batch, second.layers["0"].forward.count) == (12, 12 * 8)


def test_backward_alone_and_a_step_of_the_optimizers():
    found = []
    for explicit in (True, False):
        model, loss_fn = network("fused"), nn.CrossEntropyLoss()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        monitor = watch(model, optimizer, loss_fn=loss_fn, level="full", **ALWAYS)
        if explicit:
            step = torch_bp.TrainStep(model, loss_fn, optimizer, watch=monitor)
        for x, y in batches(3):
            optimizer.zero_grad()
            if explicit:
                step.backward(x, y)
            else:
                loss_fn(model(x), y).backward()
            optimizer.step()
        found.append(monitor.readings)
    assert len(found[0]) == 3
    for one, other in zip(*found):
        agree(one, other)


def test_a_scale_of_the_loss_is_in_no_reading():
    norms = []
    for precision in ("fp16", None):
        model = network("fused").float()
        step = torch_bp.TrainStep(
            model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1), precision=precision
        )
        monitor = watch(step, **ALWAYS)
        for _ in range(4):
            step(X.float(), Y)
        norms.append([layer.signal_norm for layer in monitor.last.layers.values()])
        assert len(monitor.readings) == (4 if precision is None else step.steps)
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


def test_a_tape_tells_the_whole_error_signal_of_a_tensor():
    w = torch.randn(3, 3, dtype=torch.float64)
    heard = {}
    with Tape([w]) as tape:
        h = torch_bp.ops.linear(X[:, :3], w)
        y = torch_bp.ops.tanh(h)
        z = torch_bp.ops.linear(y, w)
        total = torch_bp.ops.linear(y, w)
        for name, tensor in {"w": w, "h": h, "y": y, "z": z, "x": X}.items():
            tape.observe(tensor, lambda signal, name=name: heard.setdefault(name, signal))
        with torch.no_grad():
            loss = torch_bp.ops.linear(z, w)
        del loss, total
        tape.backward(z, torch.ones_like(z))
    v = w.clone().requires_grad_()
    a = X[:, :3] @ v.T
    b = a.tanh()
    (b @ v.T).sum().backward(inputs=[v])
    torch.testing.assert_close(heard["w"], v.grad)
    dy = torch.ones_like(b) @ w
    torch.testing.assert_close(heard["y"], dy)
    torch.testing.assert_close(heard["h"], dy * (1 - b.detach() ** 2))
    assert "x" not in heard
