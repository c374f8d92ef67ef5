"""Models, loops and optimizers of less usual kinds: what is read of them, and that nothing is left behind."""

import copy
import io
import logging
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from torch_bp import optim, watch

ALWAYS = {"every": 1, "budget": None}
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (16,), generator=torch.Generator().manual_seed(2))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def train(model, optimizer, steps=1, x=X, y=Y):
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("output", [False, True])
def test_a_copy_of_a_model_that_is_watched_is_a_model(output, tmp_path):
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, tmp_path if output else None, loss_fn=loss_fn, level="full", **ALWAYS) as monitor:
        train(model, optimizer)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins = copy.deepcopy(model), torch.load(file, weights_only=False)
        copy.deepcopy(loss_fn)(model(X[:1]).detach(), Y[:1])
        for twin in twins:
            assert torch.equal(twin(X), model(X))
            assert hooks(twin) == 0
        assert hooks(model) > 0
        monitor.skipped()
        train(model, optimizer)
    assert monitor.last.layers["0"].forward.count == 16 * 16
    assert monitor.last.loss is None


@pytest.mark.parametrize("family", [torch.optim, optim], ids=["torch", "torch_bp"])
def test_a_step_that_calls_that_of_its_base_class_is_one_step(family):
    class Twice(family.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = network()
    optimizer = Twice(model.parameters(), lr=0.1)
    with watch(model, optimizer, **ALWAYS) as monitor:
        train(model, optimizer, 3)
    assert [reading.step for reading in monitor.readings] == [0, 1, 2]
    assert all(reading.layers["2"].update_norm > 0 and reading.batch == 16 for reading in monitor.readings)


@pytest.mark.parametrize("family", [torch.optim, optim], ids=["torch", "torch_bp"])
def test_sparse_gradients(family):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    words = torch.randint(5, (16, 2))  # most rows have no gradient
    twin = copy.deepcopy(model)
    cross_entropy(twin(words), Y).backward()
    optimizer = family.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, level="full", **ALWAYS) as monitor:
        train(model, optimizer, 1, words)
    square = [p.grad.to_dense().double().square().sum().item() for p in twin.parameters()]
    assert monitor.last.grad_norm == pytest.approx(math.sqrt(sum(square)), rel=1e-5)
    assert monitor.last.predicted_decrease == pytest.approx(0.1 * sum(square), rel=1e-5)


def test_a_convolution_without_a_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(16, 4, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(24, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model[0].bias[1] = -100.0
    with watch(model, optimizer, level="full", **ALWAYS) as monitor:
        cross_entropy(model(X)[None], Y[:1]).backward()
        optimizer.step()
    layer = monitor.last.layers["0"]
    assert (layer.units, layer.dead_units) == (4, 1)


def test_units_of_sequences_are_the_last_dimension():
    model = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, **ALWAYS) as monitor:
        cross_entropy(model(torch.randint(20, (16, 5))).mean(1), Y).backward()
        optimizer.step()
    assert [layer.units for layer in monitor.last.layers.values()] == [8, 8, 3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_of_a_checkpoint_are_in_the_order_of_the_forward(reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.body = nn.Linear(16, 3), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))

        def forward(self, x):
            return self.last(checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=reentrant))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, **ALWAYS) as monitor:
        train(model, optimizer)
    assert list(monitor.last.layers) == ["body.0", "body.2", "last"]


def test_what_is_no_optimizer_is_refused_before_anything_is_attached():
    class Wrapper(torch.optim.Optimizer):  # as of accelerate
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = network()
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Wrapper; a wrapper has it as"):
        watch(model, Wrapper(torch.optim.SGD(model.parameters(), lr=0.1)))
    assert hooks(model) == 0


@pytest.mark.parametrize("loss", [None, "0.5", {"loss": torch.tensor(1.0)}, [torch.tensor(1.0)]])
def test_what_is_no_loss_is_refused_in_every_step(loss):
    model = network()
    with watch(model, torch.optim.SGD(model.parameters(), lr=0.1), every=10) as monitor:
        if loss == "0.5":
            assert monitor.loss(loss) == "0.5"  # a number, as `float` reads it
            return
        for _ in range(2):
            with pytest.raises(TypeError, match="watch: loss must be a tensor or a number, got"):
                monitor.loss(loss)
            train(model, monitor.optimizer)


@pytest.mark.parametrize("loss", [2, torch.tensor(2), torch.tensor([1.0, 3.0]), torch.tensor(2j), torch.tensor([2.0])])
def test_losses_of_any_kind(loss):
    model = network()
    with watch(model, torch.optim.SGD(model.parameters(), lr=0.1), **ALWAYS) as monitor:
        monitor.loss(loss)
        train(model, monitor.optimizer)
    assert monitor.last.loss == 2.0


def test_a_closed_monitor_is_not_entered():
    model = network()
    monitor = watch(model)
    monitor.close()
    with pytest.raises(RuntimeError, match="monitor must be open"), monitor:
        raise AssertionError


def test_what_on_reading_raises_is_said_once(caplog):
    def fails(reading):
        raise OSError("no connection")

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING), watch(model, optimizer, on_reading=fails, **ALWAYS) as monitor:
        train(model, optimizer, 3)
    assert len(monitor.readings) == 3
    assert len([r for r in caplog.records if "on_reading has failed" in r.getMessage()]) == 1


def test_two_monitors_of_one_file_lose_no_line(tmp_path, caplog):
    models = network(), network()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    monitors = [watch(model, o, tmp_path, **ALWAYS) for model, o in zip(models, optimizers)]
    for _ in range(4):
        for model, optimizer in zip(models, optimizers):
            train(model, optimizer)
    for monitor in monitors:
        monitor.close()
    assert len((tmp_path / "readings.jsonl").read_text().splitlines()) == 8
    assert len([r for r in caplog.records if "something else writes to" in r.getMessage()]) == 2


@pytest.mark.parametrize("change", ["replaced", "added", "parameter"])
@pytest.mark.parametrize("every", [1, 2])
def test_layers_that_change_on_the_way(change, every):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=every, budget=None) as monitor:
        train(model, optimizer, 3)
        if change == "replaced":
            model[2] = nn.Linear(16, 3)
        elif change == "added":
            model.append(nn.Linear(3, 3))
        else:
            model[2].weight = nn.Parameter(torch.randn(3, 16))
        optimizer.add_param_group({"params": [model[-1].weight]})
        train(model, optimizer, 4)
    assert monitor.findings == []
    steps = [reading.step for reading in monitor.readings]
    # nobody has listened to the new layer in the step under way
    assert steps == ([0, 1, 2, 4, 5, 6] if every == 1 else [0, 2, 4, 6])
    last = monitor.last.layers[str(len(model) - 1)]
    assert last.grad_norm == pytest.approx(
        math.sqrt(sum(p.grad.double().square().sum().item() for p in model[-1].parameters())), rel=1e-5
    )
    assert last.update_norm > 0
    assert last.signal_norm > 0
    monitor.close()
    assert hooks(model) == 0


class Tokens(nn.Module):
    """A linear map of steps of sequences: with the batch first, second, or in one with the steps; or called twice."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.body = kind, nn.Linear(8, 8)
        self.head = nn.Linear(32 if kind == "rows" else 8, 3)

    def forward(self, x):
        if self.kind == "rows":
            return self.head(self.body(x.flatten(0, 1)).tanh().view(len(x), -1))
        if self.kind == "second":
            return self.head(self.body(x.transpose(0, 1)).tanh().mean(0))
        z = self.body(x).tanh()
        return self.head((self.body(z).tanh() if self.kind == "twice" else z).mean(1))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", ["first", "second", "rows", "twice"])
def test_norms_of_single_examples_are_those_of_autograd_or_none(kind, named):
    torch.manual_seed(0)
    model, loss_fn, x, y = Tokens(kind), nn.CrossEntropyLoss(), torch.randn(6, 4, 8), torch.arange(6) % 3
    expected = {}
    for one, label in zip(x, y):
        gradients = torch.autograd.grad(loss_fn(model(one[None]), label[None]), [*model.parameters()])
        for (name, _), gradient in zip(model.named_parameters(), gradients):
            expected.setdefault(name.partition(".")[0], []).append(gradient.square().sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, level="full", **ALWAYS) as monitor:
        loss_fn(model(x=x) if named else model(x), y).backward()
        optimizer.step()
    assert monitor.last.batch == 6
    layers = monitor.last.layers
    assert (layers["body"].per_example is not None) == (kind == "first")
    for name in ("body", "head") if kind == "first" else ("head",):
        norms = torch.stack(expected[name]).view(6, 2).sum(1).sqrt()
        assert layers[name].per_example.count == 6
        assert layers[name].per_example.mean == pytest.approx(norms.mean().item(), rel=1e-4)


def test_a_tied_weight_has_no_norms_of_single_examples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, level="full", **ALWAYS) as monitor:
        train(model, optimizer, 1, torch.arange(16) % 3)
    assert monitor.last.layers["2"].per_example is None
    assert monitor.last.layers["1"].per_example.count == 16


def test_records_that_are_not_written_are_of_the_layers_that_there_were():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, write_every=100, **ALWAYS) as monitor:
        train(model, optimizer, 2)
        first = float(model[0].weight.grad.double().norm())
        model.insert(0, nn.Linear(8, 8))
        train(model, optimizer, 3)
    readings = {reading.step: reading for reading in monitor.readings}
    assert list(readings[1].layers) == ["0", "2"]
    assert readings[1].layers["0"].grad_norm >= first
    assert list(readings[4].layers) == ["0", "1", "3"]
