"""What a monitor reads, against plain autograd, in loops as users write them."""

import copy
import logging
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torch_bp
from torch_bp import nn, optim, watch

ALWAYS = {"every": 1, "budget": None}
X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(2))


def network(kind="ours"):
    torch.manual_seed(0)
    if kind == "ours":
        return nn.MLP([5, 8, 7, 3], activation="tanh")
    if kind == "normalised":
        return nn.MLP([5, 8, 7, 3], norm="batch")
    layers = [torch.nn.Linear(5, 8), torch.nn.ReLU(inplace=True), torch.nn.Linear(8, 7), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(7, 3))


def step(model, optimizer, loss_fn, x=X, y=Y):
    optimizer.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def parts(model):
    """Linear layers, and what follows each up to the next."""
    found = []
    for module in model:
        if isinstance(module, torch.nn.Linear):
            found.append((module, []))
        else:
            found[-1][1].append(module)
    return found


def by_hand(model, x, y):
    """Error signals and activations in the order of the layers, and all gradients, with nothing but torch."""
    model = copy.deepcopy(model)
    if isinstance(model, nn.MLP):
        model.fused = False
    pre, post, inputs = [], [], []
    h = x
    for linear, following in parts(model):
        inputs.append(h)
        z = h = linear(h)
        z.retain_grad()
        pre.append(z)
        for module in following:
            if getattr(module, "inplace", False):
                module = torch.nn.ReLU()
            h = module(h)
        h.retain_grad()
        post.append(h)
    loss = torch.nn.functional.cross_entropy(h, y)
    loss.backward()
    return loss, inputs, pre, post, model


@pytest.mark.parametrize("kind", ["ours", "torchs", "normalised"])
@pytest.mark.parametrize("optimizer", [optim.Adam, torch.optim.SGD], ids=["ours", "torchs"])
def test_readings_are_those_of_autograd(kind, optimizer):
    model, loss_fn = network(kind), nn.CrossEntropyLoss()
    optimizer = optimizer(model.parameters(), lr=0.05)
    loss, inputs, pre, post, copied = by_hand(model, X, Y)
    before = [p.detach().clone() for p in model.parameters()]
    with watch(model, optimizer, loss_fn=loss_fn, level="full", **ALWAYS) as monitor:
        step(model, optimizer, loss_fn)
    reading = monitor.last
    close = {"rel": 1e-5, "abs": 1e-7}
    assert reading.loss == pytest.approx(loss.item(), **close)
    assert (reading.step, reading.batch, reading.lr) == (0, 12, (0.05,))
    gradients = [p.grad for p in copied.parameters()]
    assert reading.grad_norm == pytest.approx(math.sqrt(sum(g.square().sum() for g in gradients)), **close)
    updates = [p.detach() - b for p, b in zip(model.parameters(), before)]
    decrease = -sum((g * u).sum() for g, u in zip(gradients, updates)).item()
    assert reading.predicted_decrease == pytest.approx(decrease, rel=1e-4)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = [reading.layers[name] for name in names]
    assert [*reading.layers.values()] == sorted(reading.layers.values(), key=lambda each: int(each.name))
    for number, (layer, z, a) in enumerate(zip(layers, pre, post)):
        module = model[int(layer.name)]
        assert layer.signal_norm == pytest.approx(z.grad.norm().item(), **close)
        assert (layer.activation_mean, layer.activation_var) == pytest.approx(
            (a.mean().item(), a.var(correction=0).item()), rel=1e-4, abs=1e-6
        )
        assert (layer.forward.count, layer.backward.count, layer.units) == (a.numel(), z.numel(), z.shape[1])
        own = [i for i, p in enumerate(model.parameters()) if p is module.weight or p is module.bias]
        norm = lambda tensors, own=own: math.sqrt(sum(tensors[i].square().sum() for i in own))  # noqa: E731
        assert layer.weight_norm == pytest.approx(norm(before), **close)
        assert layer.grad_norm == pytest.approx(norm(gradients), **close)
        assert layer.update_norm == pytest.approx(norm(updates), rel=1e-4)
        one_by_one = (z.grad.square().sum(1) * (inputs[number].square().sum(1) + 1)).sqrt() * 12
        assert layer.per_example.mean == pytest.approx(one_by_one.mean().item(), rel=1e-5)
        assert layer.per_example.max == pytest.approx(one_by_one.max().item(), rel=1e-5)
        if number < 2:
            ahead = pre[number + 1].grad.norm()
            assert layer.signal_ratio == pytest.approx((z.grad.norm() / ahead).item(), **close)
            assert layer.weight_factor == pytest.approx((a.grad.norm() / ahead).item(), **close)
            if kind != "normalised":
                assert layer.derivative_factor == pytest.approx((z.grad.norm() / a.grad.norm()).item(), **close)
                assert layer.signal_ratio == pytest.approx(layer.weight_factor * layer.derivative_factor)
            if layer.activation == "ReLU":
                assert layer.saturated == pytest.approx((a == 0).float().mean().item())
                assert layer.dead_units == (a == 0).all(0).sum()
    assert reading.labels.count == 12
    assert reading.labels.largest_share == Y.bincount().max() / 12
    assert reading.labels.changes == pytest.approx((Y[1:] != Y[:-1]).float().mean().item())
    assert (reading.input.mean, reading.input.std) == pytest.approx((X.mean().item(), X.std(correction=0).item()))
    assert not reading.unknown


@pytest.mark.parametrize("level", ["summary", "layers", "full"])
@pytest.mark.parametrize("every", [1, 3])
def test_weights_and_random_numbers_are_the_same_watched_or_not(level, every):
    results = []
    for watched in (False, True):
        model = nn.MLP([5, 8, 7, 3], norm="batch", dropout=0.3) if False else network("normalised")
        model.insert(3, torch.nn.Dropout(0.4))
        loss_fn, optimizer = nn.CrossEntropyLoss(), optim.Adam(model.parameters())
        torch.manual_seed(3)
        monitor = watch(model, optimizer, loss_fn=loss_fn, level=level, every=every, budget=None) if watched else None
        losses = [step(model, optimizer, loss_fn) for _ in range(8)]
        if monitor is not None:
            monitor.close()
            assert [r.step for r in monitor.readings] == list(range(0, 8, every))
        state = [*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())]
        results.append([*losses, *state, torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_nothing_is_attached_in_steps_that_are_not_recorded_nor_afterwards():
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(model, optimizer, loss_fn=loss_fn, every=3, budget=None)
    attached = []
    for _ in range(7):
        attached.append(hooks_of(model) > 0)
        step(model, optimizer, loss_fn)
    assert attached == [True, False, False] * 2 + [True]
    monitor.close()
    monitor.close()
    assert hooks_of(model) + hooks_of(loss_fn) == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert "_extras" not in vars(optimizer)


def test_micro_batches_add_up_to_the_batch():
    found = []
    for parts_ in (1, 3):
        model, loss_fn = network(), nn.CrossEntropyLoss()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer, level="full", **ALWAYS) as monitor:
            optimizer.zero_grad()
            for x, y in zip(X.chunk(parts_), Y.chunk(parts_)):
                (monitor.loss(loss_fn(model(x), y)) / parts_).backward()
            optimizer.step()
        found.append(monitor.last)
    whole, split = found
    assert split.loss == pytest.approx(whole.loss)
    assert split.batch == whole.batch == 12
    assert split.noise_scale == pytest.approx(whole.noise_scale, rel=1e-4)
    for name, layer in whole.layers.items():
        other = split.layers[name]
        for field in ("signal_norm", "signal_ratio", "grad_norm", "activation_mean", "activation_var", "saturated"):
            expected = getattr(layer, field)
            expected = None if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert getattr(other, field) == expected, field
        assert (other.dead_units, other.forward) == (layer.dead_units, layer.forward)
        assert other.per_example.mean == pytest.approx(layer.per_example.mean, rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_counts_once(reentrant):
    class Checkpointed(torch.nn.Module):
        def __init__(self, active):
            super().__init__()
            self.first, self.inner, self.active = torch.nn.Linear(5, 5), network("torchs"), active

        def forward(self, x):
            x = self.first(x)
            return checkpoint(self.inner, x, use_reentrant=reentrant) if self.active else self.inner(x)

    found = []
    for active in (True, False):
        torch.manual_seed(0)
        model, loss_fn = Checkpointed(active), nn.CrossEntropyLoss()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        with watch(model, optimizer, loss_fn=loss_fn, level="full", **ALWAYS) as monitor:
            for _ in range(2):
                step(model, optimizer, loss_fn)
        found.append(monitor.last)
    for name, layer in found[0].layers.items():
        other = found[1].layers[name]
        assert (layer.forward, layer.backward) == (other.forward, other.backward)
        assert layer.signal_norm == pytest.approx(other.signal_norm)
        assert layer.dead_units == other.dead_units


def test_a_frozen_part_stays_out_of_the_backward():
    model, loss_fn = network("torchs"), nn.CrossEntropyLoss()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with watch(model, optimizer, loss_fn=loss_fn, level="full", **ALWAYS) as monitor:
        output = model(X)
        assert not model[1](model[0](X)).requires_grad
        loss_fn(output, Y).backward()
        optimizer.step()
    layer = monitor.last.layers["0"]
    assert (layer.signal_norm, layer.grad_norm, layer.backward, layer.per_example) == (None, None, None, None)
    assert layer.forward.ok
    assert monitor.last.layers["2"].signal_norm > 0


def test_evaluation_is_no_part_of_a_step_and_gives_the_validation_loss():
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, loss_fn=loss_fn, **ALWAYS) as monitor:
        with torch.no_grad():
            expected = loss_fn(model(X[:4]), Y[:4])
        step(model, optimizer, loss_fn)
        assert monitor.last.validation_loss == pytest.approx(expected.item())
        assert monitor.last.layers["0"].forward.count == 12 * 8
        step(model, optimizer, loss_fn)
        assert monitor.last.validation_loss is None


@pytest.mark.parametrize("where", ["weight", "input", "signal"])
def test_nan_is_found_where_it_is(where):
    model, loss_fn = network("torchs"), nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    x = X.clone()
    with watch(model, optimizer, loss_fn=loss_fn, level="full", every=1, budget=None, write_every=50) as monitor:
        step(model, optimizer, loss_fn)
        if where == "weight":
            model[2].weight.data[0, 0] = math.nan
        elif where == "input":
            x[0, 0] = math.inf
        else:
            model[4].register_forward_hook(lambda m, a, z: z.register_hook(lambda g: g * math.nan) and None)
        step(model, optimizer, loss_fn, x)
    found = {"weight": ("2", "weight"), "input": ("0", "forward"), "signal": ("2", "backward")}[where]
    assert monitor.readings[1].nonfinite[0] == found or found in monitor.readings[1].nonfinite
    assert monitor.readings[0].nonfinite == []
    if where == "signal":
        assert ("0", "forward") not in monitor.readings[1].nonfinite


@pytest.mark.parametrize("ours", [True, False])
def test_dead_units_since_when_and_why(ours):
    model, loss_fn = (
        torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)),
        nn.CrossEntropyLoss(),
    )
    with torch.no_grad():
        model[0].bias[1] = -100.0  # the bias
        model[0].weight[2], model[0].bias[2] = 0, -0.1  # weights of 0
        model[0].weight[3], model[0].bias[3] = -1.0, -0.0  # weights, of inputs above 0
    optimizer = (optim.SGD if ours else torch.optim.SGD)(model.parameters(), lr=1e-4)
    x = X.abs()
    with watch(model, optimizer, loss_fn=loss_fn, level="full", **ALWAYS) as monitor:
        step(model, optimizer, loss_fn, x)
        model[0].bias.data[4] = -50.0
        step(model, optimizer, loss_fn, x)
        first, second = monitor.readings
        dead = {each.unit: each for each in second.layers["0"].dead}
        assert {unit: (d.since, d.cause) for unit, d in dead.items() if unit in (1, 2, 3, 4)} == {
            1: (0, "bias"),
            2: (0, "weights"),
            3: (0, "weights"),
            4: (1, "bias"),
        }
        assert dead[1].bias == -100.0
        assert dead[1].pre_activation_max == pytest.approx((x @ model[0].weight[1] - 100).max().item(), rel=1e-4)
        assert first.layers["0"].dead_units + 1 == second.layers["0"].dead_units
        step(model, optimizer, loss_fn, 0 * x)
        causes = {each.unit: each.cause for each in monitor.last.layers["0"].dead}
        assert causes[1] == "input"


def test_an_unknown_layer_is_watched_as_far_as_it_can_be():
    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head, self.scale = (
                torch.nn.LSTM(5, 4),
                torch.nn.Linear(4, 3),
                torch.nn.Parameter(torch.ones(())),
            )

        def forward(self, x):
            return self.head(self.lstm(x)[0]) * self.scale

    model, loss_fn = Recurrent(), nn.CrossEntropyLoss()
    optimizer = optim.Adam(model.parameters())
    with watch(model, optimizer, loss_fn=loss_fn, level="full", **ALWAYS) as monitor:
        step(model, optimizer, loss_fn)
        assert set(monitor.unknown) == {"", "lstm"}
    layer = monitor.last.layers["lstm"]
    assert "LSTM is no layer" in monitor.last.unknown["lstm"]
    assert layer.update_norm > 0
    assert layer.signal_norm > 0
    assert layer.per_example is None


def test_layers_are_chosen_by_name_or_function():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for which, names in ((r"^[02]$", ["0", "2"]), (lambda name, module: module.out_features == 3, ["4"])):
        with watch(model, optimizer, layers=which, **ALWAYS) as monitor:
            step(model, optimizer, nn.CrossEntropyLoss())
        assert list(monitor.last.layers) == names


def test_a_loop_without_optimizer():
    model, loss_fn = network(), nn.CrossEntropyLoss()
    with watch(model, **ALWAYS) as monitor:
        loss_fn(model(X), Y).backward()
        monitor.step_done(1.25)
    reading = monitor.last
    assert reading.loss == 1.25
    assert reading.layers["0"].grad_norm > 0
    assert reading.layers["0"].weight_norm > 0
    assert reading.layers["0"].update_norm is None
    with (
        watch(model, optim.SGD(model.parameters()), **ALWAYS) as monitor,
        pytest.raises(RuntimeError, match="step_done"),
    ):
        monitor.step_done()


def test_clipping_and_achieved_decrease():
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, loss_fn=loss_fn, **ALWAYS) as monitor:
        for max_norm in (1e-3, 1e3):
            optimizer.zero_grad()
            loss = loss_fn(model(X), Y)
            loss.backward()
            norm = monitor.clipped(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm), max_norm)
            optimizer.step()
            with torch.no_grad():
                after = torch.nn.functional.cross_entropy(model(X), Y)
            monitor.loss_after(after)
        step(model, optimizer, loss_fn)
    first, second, third = monitor.readings
    assert (first.clipped, second.clipped, third.clipped) == (True, False, None)
    assert (first.clip_rate, second.clip_rate) == (1.0, 0.5)
    assert first.grad_norm == pytest.approx(1e-3, rel=1e-3)
    assert second.grad_norm == pytest.approx(norm.item()) == pytest.approx(second.grad_norm_before)
    assert third.achieved_decrease == pytest.approx((loss - after).item(), rel=1e-4)


def test_a_grad_scaler_scales_no_reading_and_a_skipped_step_none():
    found = []
    for scale in (1.0, 1024.0):
        model, loss_fn = network(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with watch(model, optimizer, loss_fn=loss_fn, scaler=scaler, level="full", **ALWAYS) as monitor:
            for broken in (True, False):
                optimizer.zero_grad()
                scaler.scale(loss_fn(model(X), Y) * (math.inf if broken else 1)).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update(scale)
        assert len(monitor.readings) == 1
        found.append(monitor.last)
    for name, layer in found[0].layers.items():
        assert layer.backward.ok
        assert found[1].layers[name].signal_norm == pytest.approx(layer.signal_norm, rel=1e-4)
        assert found[1].layers[name].per_example.mean == pytest.approx(layer.per_example.mean, rel=1e-4)
        assert layer.forward.count == 12 * layer.units


def test_gradients_that_were_not_cleared_are_seen():
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, loss_fn=loss_fn, **ALWAYS) as monitor:
        for number in range(4):
            loss = loss_fn(model(X), Y)
            if number == 2:
                optimizer.zero_grad()  # between forward and backward, as many do
            if number == 3:
                optimizer.zero_grad(set_to_none=False)
            left = math.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
            loss.backward()
            optimizer.step()
            if number == 1:
                expected = left
        carried = [reading.carried for reading in monitor.readings]
    assert carried[0] is None
    assert carried[1] == pytest.approx(expected, rel=1e-6)
    assert expected > 0
    assert carried[2:] == [0.0, 0.0]


def test_micro_batches_carry_nothing_from_each_other():
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, loss_fn=loss_fn, **ALWAYS) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            for x, y in zip(X.chunk(3), Y.chunk(3)):
                loss_fn(model(x), y).backward()
            optimizer.step()
    assert monitor.last.carried == 0.0


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle, self.fixed = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3), torch.nn.Linear(3, 3)
        self.fixed.requires_grad_(False)

    def forward(self, x):
        return self.fixed(self.used(x))


@pytest.mark.parametrize("kind", [optim.SGD, torch.optim.SGD], ids=["ours", "torchs"])
def test_parameters_that_are_not_used_frozen_or_not_updated(kind):
    model, loss_fn = Branches(), nn.CrossEntropyLoss()
    optimizer = kind([*model.idle.parameters(), *model.fixed.parameters()], lr=0.1)  # `used` is forgotten
    with watch(model, optimizer, loss_fn=loss_fn, **ALWAYS) as monitor:
        step(model, optimizer, loss_fn)
    reading = monitor.last
    assert reading.unused == ("idle.weight", "idle.bias")
    assert reading.frozen == ("fixed.weight", "fixed.bias")
    assert [layer.update_norm for layer in reading.layers.values()] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("told", [True, False])
def test_what_the_loss_was_given(told):
    model, loss_fn = torch.nn.Sequential(network("torchs"), torch.nn.Softmax(1)), torch.nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    output = model(X).detach()
    with watch(model, optimizer, loss_fn=loss_fn if told else None, **ALWAYS) as monitor:
        step(model, optimizer, loss_fn)
    reading = monitor.last
    assert reading.loss_function == ("CrossEntropyLoss" if told else None)
    found = reading.output
    values = (output.mean(), output.std(correction=0), output.min(), output.max())
    expected = (output.numel(), *map(float, values))
    assert (found.count, found.mean, found.std, found.min, found.max) == pytest.approx(expected, rel=1e-5)
    assert (reading.labels.commonest if told else None) == (Y.bincount().argmax().item() if told else None)


def test_examples_that_are_not_finite_are_named():
    model, loss_fn = network("torchs"), nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    x = X.clone()
    x[3, 1], x[10, 0], x[11, 4] = math.nan, math.inf, math.nan
    with watch(model, optimizer, loss_fn=loss_fn, level="full", **ALWAYS) as monitor:
        optimizer.zero_grad()
        for part, y in zip(x.chunk(2), Y.chunk(2)):
            loss_fn(model(part), y).backward()
        optimizer.step()
    reading = monitor.last
    assert (reading.input_finite.nan, reading.input_finite.inf) == (2, 1)
    assert reading.input_finite.examples == (3, 10, 11)
    assert reading.layers["0"].forward.examples == (3, 10, 11)
    assert set(reading.layers["4"].backward.examples) >= {3, 11}
    model = network("torchs")
    with watch(model, optim.SGD(model.parameters()), level="full", **ALWAYS) as monitor:
        loss_fn(model(torch.full((40, 5), math.nan)), torch.zeros(40, dtype=torch.long)).backward()
        monitor._optimizer.step()
    assert monitor.last.input_finite.examples == tuple(range(8))


@pytest.mark.parametrize("level", ["summary", "layers", "full"])
def test_a_run_that_diverges_is_read_to_its_end(level):
    model, loss_fn = nn.MLP([5, 8, 7, 1], activation="relu"), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    model.double()
    with watch(model, optimizer, loss_fn=loss_fn, level=level, **ALWAYS) as monitor:
        for _ in range(12):
            step(model, optimizer, loss_fn, 1e3 * X.double(), Y.double()[:, None])
    assert len(monitor.readings) == 12
    assert any(math.isinf(r.grad_norm) or math.isnan(r.grad_norm) for r in monitor.readings)
    assert not monitor._said


@pytest.mark.parametrize("where", ["reading", "signals", "hook", "update"])
def test_what_fails_in_the_monitor_does_not_stop_the_training(where, caplog, monkeypatch):
    from torch_bp.diagnostics import assembly, measurements, monitor, parameters

    def fail(*args, **keywords):
        raise OverflowError("too large")

    if where == "reading":
        monkeypatch.setattr(assembly, "mean_and_variance", fail)
    elif where == "signals":
        monkeypatch.setattr(monitor, "signals", fail)
    elif where == "hook":
        monkeypatch.setattr(measurements, "active_counts", fail)
    else:
        monkeypatch.setattr(parameters.ParameterSums, "after", fail)
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with caplog.at_level(logging.WARNING), watch(model, optimizer, loss_fn=loss_fn, **ALWAYS) as watched:
        for _ in range(3):
            step(model, optimizer, loss_fn)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    assert len(caplog.records) == 1
    assert "a reading could not be made; training goes on" in caplog.records[0].getMessage()
    assert "OverflowError: too large" in caplog.records[0].getMessage()
    assert len(watched.readings) == (3 if where == "hook" else 0)


WRONG = {
    "model": (lambda m, o: watch(o, m), TypeError, "model must be a torch.nn.Module"),
    "optimizer": (lambda m, o: watch(m, "logs"), TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
    "output": (lambda m, o: watch(m, o, 3), TypeError, "output must be a folder or have add_scalar"),
    "level": (lambda m, o: watch(m, o, level="all"), ValueError, "level must be one of 'summary'"),
    "every": (lambda m, o: watch(m, o, every=0), ValueError, "every must be a whole number of 1 or more, got 0"),
    "write_every": (lambda m, o: watch(m, o, write_every=1.5), ValueError, "write_every must be"),
    "keep": (lambda m, o: watch(m, o, keep=0), ValueError, "keep must be"),
    "budget": (lambda m, o: watch(m, o, budget=2), ValueError, r"budget must be in \(0, 1\]"),
    "budget of bool": (lambda m, o: watch(m, o, budget=True), ValueError, r"budget must be in \(0, 1\]"),
    "loss_fn": (lambda m, o: watch(m, o, loss_fn=len), TypeError, "loss_fn must be a torch.nn.Module"),
    "layers": (lambda m, o: watch(m, o, layers="nowhere"), ValueError, "layers must name at least one.*'0', '2', '4'"),
    "pattern": (lambda m, o: watch(m, o, layers="("), ValueError, "layers must be a regular expression"),
    "no pattern": (lambda m, o: watch(m, o, layers=3), TypeError, "layers must be a regular expression or a function"),
    "reduction": (lambda m, o: watch(m, o, reduction="none"), ValueError, "reduction must be 'mean' or 'sum'"),
    "reduce": (lambda m, o: watch(m, o, reduce=True), ValueError, "reduce must be False"),
    "on_reading": (lambda m, o: watch(m, o, on_reading=3), TypeError, "on_reading must be callable"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_anything_is_attached(case):
    call, error, text = WRONG[case]
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=text):
        call(model, optimizer)
    assert hooks_of(model) == 0
    assert not optimizer._optimizer_step_post_hooks


def test_a_state_goes_on_where_it_was():
    model, loss_fn = nn.MLP([5, 8, 7, 3]), nn.CrossEntropyLoss()
    model[0].bias.data[1] = -100.0
    optimizer = optim.SGD(model.parameters(), lr=1e-5)
    with watch(model, optimizer, loss_fn=loss_fn, level="full", **ALWAYS) as monitor:
        for _ in range(3):
            step(model, optimizer, loss_fn)
    with watch(model, optimizer, loss_fn=loss_fn, level="full", **ALWAYS) as again:
        again.load_state_dict(monitor.state_dict())
        step(model, optimizer, loss_fn)
    assert again.last.step == 3
    assert {d.unit: d.since for d in again.last.layers["0"].dead}[1] == 0


def test_the_name_at_the_top():
    assert torch_bp.watch is watch
