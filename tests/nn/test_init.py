"""Initial weights are torch's own draws, chosen by what follows the layer; the report measures what autograd gives."""

import copy

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from torch_bp import nn
from torch_bp.nn import functional as F
from torch_bp.nn import init

RECTIFIERS = ["ReLU", "ReLU6", "ELU", "CELU", "GELU", "SiLU", "Mish", "Softplus", "Hardswish", "PReLU", "RReLU"]
OTHERS = ["Tanh", "Sigmoid", "Hardsigmoid", "Hardtanh", "Softsign", "Tanhshrink", "LogSigmoid"]
ROW_WISE = ["Softmax", "LogSoftmax", "Softmin"]
x = torch.randn(20, 6)
BOTH = pytest.mark.parametrize("library", [nn, torch.nn], ids=["ours", "torch"])


class Hidden(torch.nn.Module):
    """A forward of its own: no order of modules tells what follows."""

    def __init__(self, model):
        super().__init__()
        self.parts = torch.nn.ModuleList(model)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Functional(torch.nn.Module):
    """Functions in the place of modules, and a sum."""

    def __init__(self, library=nn):
        super().__init__()
        self.first, self.second, self.third = (library.Linear(6, 6) for _ in range(3))
        self.last, self.aside = library.Linear(6, 3), library.Linear(6, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.F = library.functional

    def forward(self, x):
        a = self.F.leaky_relu(self.norm(self.first(x)), 0.3)
        b = torch.tanh(self.second(a).view(-1, 6) + x)
        c = self.third(b).relu_()
        return self.last(c) * 1.0, self.aside(c).mul_(c)


def network(activation, library=nn):
    return torch.nn.Sequential(library.Linear(6, 8), activation, library.Linear(8, 3))


def drawn(chosen):
    return {row.name: (row.follower, row.method) for row in chosen.rows}


def make(name):
    module = getattr(nn, name)
    return module(dim=1) if name in ROW_WISE else module()


@BOTH
@pytest.mark.parametrize("name", [*RECTIFIERS, *OTHERS, *ROW_WISE, "SELU", "LeakyReLU"])
def test_the_activation_chooses(name, library):
    """By the order of modules, and by running: the same choice."""
    expected = "kaiming" if name in [*RECTIFIERS, "LeakyReLU"] else "lecun" if name == "SELU" else "xavier"
    for model, given in ((network(make(name), library), None), (Hidden(network(make(name), library)), x)):
        first, last = init.auto_(model, x=given).rows
        assert first.method == expected, model
        assert (last.follower, last.method) == ("end", "xavier")


DRAWS = {
    "kaiming": (torch.nn.ReLU(), lambda w, g: torch.nn.init.kaiming_normal_(w, nonlinearity="relu", generator=g)),
    "slope": (torch.nn.LeakyReLU(0.4), lambda w, g: torch.nn.init.kaiming_normal_(w, a=0.4, generator=g)),
    "xavier": (torch.nn.Tanh(), lambda w, g: torch.nn.init.xavier_uniform_(w, generator=g)),
    "lecun": (
        torch.nn.SELU(),
        lambda w, g: torch.nn.init.kaiming_normal_(w, nonlinearity="linear", generator=g),
    ),
}


@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("case", DRAWS)
def test_weights_are_torchs_draws(case, run):
    activation, draw = DRAWS[case]
    model = network(activation)
    layer = model[0]
    weight = torch.empty_like(layer.weight)
    draw(weight, torch.Generator().manual_seed(3))
    init.auto_(Hidden(model) if run else model, x=x if run else None, generator=torch.Generator().manual_seed(3))
    assert torch.equal(layer.weight, weight)
    assert not layer.bias.any()
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf


@pytest.mark.parametrize(
    ("method", "draw"),
    [
        ("kaiming", lambda w, g: torch.nn.init.kaiming_normal_(w, nonlinearity="relu", generator=g)),
        ("xavier", lambda w, g: torch.nn.init.xavier_uniform_(w, generator=g)),
        ("lecun", lambda w, g: torch.nn.init.kaiming_normal_(w, nonlinearity="linear", generator=g)),
        ("orthogonal", lambda w, g: torch.nn.init.orthogonal_(w, generator=g)),
    ],
)
def test_one_method_for_all(method, draw):
    """Also where nothing is known of what follows."""
    model = Hidden(network(torch.nn.ReLU()))
    chosen = init.auto_(model, method, generator=torch.Generator().manual_seed(1))
    assert {row.method for row in chosen.rows} == {method}
    generator = torch.Generator().manual_seed(1)
    for layer in (model.parts[0], model.parts[2]):
        weight = torch.empty_like(layer.weight)
        draw(weight, generator)
        assert torch.equal(layer.weight, weight)


def test_orthogonal_has_the_gain_of_what_follows():
    model = network(torch.nn.LeakyReLU(0.2))
    init.auto_(model, "orthogonal")
    gains = [torch.nn.init.calculate_gain("leaky_relu", 0.2), 1.0]
    for layer, gain in zip((model[0], model[2]), gains):
        torch.testing.assert_close(
            torch.linalg.svdvals(layer.weight), torch.full((min(layer.weight.shape),), gain), rtol=1e-5, atol=0
        )


def test_nested_sequentials_and_what_is_passed():
    inner = torch.nn.Sequential(nn.Linear(6, 6), torch.nn.BatchNorm1d(6))
    tail = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Identity(), nn.ReLU())
    model = torch.nn.Sequential(
        torch.nn.Sequential(inner, tail), nn.Linear(6, 6), nn.Linear(6, 6), torch.nn.LayerNorm(6), nn.Sigmoid()
    )
    expected = {"0.0.0": ("relu", "kaiming"), "1": ("linear", "xavier"), "2": ("sigmoid", "xavier")}
    assert drawn(init.auto_(model)) == expected
    assert drawn(init.auto_(Hidden(model), x=x)) == {f"parts.{name}": row for name, row in expected.items()}


def test_convolutions():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), nn.ReLU(), torch.nn.Flatten(), nn.Linear(16, 2))
    assert drawn(init.auto_(model)) == {"0": ("relu", "kaiming"), "3": ("end", "xavier")}
    assert drawn(init.auto_(Hidden(model), x=torch.randn(2, 3, 4, 4)))["parts.0"] == ("relu", "kaiming")


@BOTH
def test_a_run_sees_functions(library):
    model = Functional(library)
    before = copy.deepcopy(model.state_dict())
    chosen = init.auto_(model)
    assert chosen.left == ("first", "second", "third", "last", "aside")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    chosen = init.auto_(model, x=x)
    assert chosen.left == ("last", "aside")  # what is multiplied is not known
    assert drawn(chosen) == {
        "first": ("leaky_relu(0.3)", "kaiming"),
        "second": ("tanh", "xavier"),
        "third": ("relu", "kaiming"),
        "last": ("mul", ""),
        "aside": ("mul", ""),
    }
    text = str(chosen)
    assert "aside" in text
    assert "left as it was: what follows is not known" in text


@pytest.mark.parametrize("inplace", [False, True])
@BOTH
def test_in_place_activations(library, inplace):
    model = Hidden(network(library.ReLU(inplace), library))
    assert drawn(init.auto_(model, x=x))["parts.0"] == ("relu", "kaiming")


def test_order_goes_before_the_run():
    """The run is for what the order leaves open."""
    model = torch.nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Hidden([nn.Linear(6, 6), nn.ReLU()]))
    chosen = init.auto_(model, x=(x,))
    assert drawn(chosen) == {"0": ("tanh", "xavier"), "2.parts.0": ("relu", "kaiming")}


def test_layers_that_are_used_twice():
    layer = nn.Linear(6, 6)
    agreeing = torch.nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU())
    assert drawn(init.auto_(agreeing)) == {"0": ("relu", "kaiming")}
    disagreeing = torch.nn.Sequential(layer, nn.ReLU(), layer, nn.Tanh())
    assert drawn(init.auto_(disagreeing)) == {"0": ("relu and tanh", "")}


def test_weights_that_are_not_the_layers_own():
    model = torch.nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), weight_norm(nn.Linear(6, 6)))
    model[2].weight = model[0].weight
    before = {k: v.clone() for k, v in model[4].state_dict().items()}
    chosen = init.auto_(model)
    assert chosen.left == ("2", "4")
    assert "weight is that of '0'" in str(chosen)
    torch.testing.assert_close(dict(model[4].state_dict()), before, rtol=0, atol=0)


def test_devices_and_kinds_of_layers():
    with torch.device("meta"):
        assert drawn(init.auto_(network(nn.ReLU())))["0"] == ("relu", "kaiming")
    assert drawn(init.auto_(nn.Linear(6, 2, bias=False))) == {"": ("end", "xavier")}
    assert init.auto_(nn.ReLU()).rows == ()
    with pytest.raises(ValueError, match="auto_: layer '0' must have weights, got a lazy one"):
        init.auto_(torch.nn.Sequential(torch.nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"auto_: method must be one of 'auto'.* got 'he'"):
        init.auto_(nn.Linear(6, 2), "he")


def test_everything_else_is_torchs():
    assert init.kaiming_normal_ is torch.nn.init.kaiming_normal_
    assert {"auto_", "report", "xavier_uniform_"} <= set(dir(init))


def state_of(model):
    """Everything that a look must leave as it is."""
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    return tensors, grads, hooks, modes, torch.get_rng_state()


def assert_untouched(model, before):
    for mine, other in zip(state_of(model), before):
        if isinstance(other, list):
            assert mine == other
        else:
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


def noisy():
    """Batch normalization, dropout, a frozen parameter and a gradient that is there already."""
    model = torch.nn.Sequential(
        nn.Linear(6, 8), torch.nn.BatchNorm1d(8), nn.ReLU(inplace=True), torch.nn.Dropout(), nn.Linear(8, 3)
    )
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones(3, 8)
    model[3].eval()
    return model


@pytest.mark.parametrize("look", [init.report, lambda model, x: init.auto_(Hidden([*model, nn.ReLU()]), x=x)])
def test_a_look_leaves_everything_as_it_is(look):
    model, given = noisy(), x.clone().requires_grad_()
    model[3].train()
    if look is not init.report:
        for layer in (model[0], model[4]):  # what a look leaves, `auto_` does not: compare what it draws nothing for
            layer.weight.data.zero_()
            layer.bias.data.zero_()
            weight_norm(layer)
    before, wanted = state_of(model), [p.requires_grad for p in model.parameters()]
    look(model, given)
    assert_untouched(model, before)
    assert given.grad is None
    assert torch.equal(given, x)
    assert [p.requires_grad for p in model.parameters()] == wanted


def by_hooks(model, x, layers, activations):
    """Variances at layers from plain autograd: of activations, and of gradients at the layers' outputs."""
    kept = {}
    handles = [
        m.register_forward_hook(lambda m, a, out: kept.__setitem__(m, out)) for m in {*layers, *activations} - {None}
    ]
    output = model(x)
    for handle in handles:
        handle.remove()
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    errors = torch.autograd.grad(output, [kept[m] for m in layers], noise.to(output))
    signals = [kept[a or layer] for layer, a in zip(layers, activations)]
    return signals, errors


@BOTH
def test_the_report_is_what_autograd_gives(library):
    model = torch.nn.Sequential(
        library.Linear(6, 50), library.Tanh(), library.Linear(50, 30), library.ReLU(), library.Linear(30, 2)
    ).double()
    layers, activations = [model[0], model[2], model[4]], [model[1], model[3], None]
    model[2].bias.data[:3] = -100.0  # three dead units
    given = x.double()
    signals, errors = by_hooks(model, given, layers, activations)
    rows = init.report(model, given).rows
    assert [row.name for row in rows] == ["0", "2", "4"]
    assert [row.activation for row in rows] == ["tanh", "relu", "end"]
    for row, signal, error in zip(rows, signals, errors):
        assert row.activation_variance == pytest.approx(signal.var(correction=0).item(), rel=1e-12)
        assert row.error_variance == pytest.approx(error.var(correction=0).item(), rel=1e-12)
    for k in (1, 2):
        expected = signals[k].var(correction=0) / signals[k - 1].var(correction=0)
        assert rows[k].forward_ratio == pytest.approx(expected.item())
        expected = (errors[k - 1].norm() / errors[k].norm()) ** 2
        assert rows[k - 1].backward_ratio == pytest.approx(expected.item())
    assert rows[0].idle == pytest.approx((signals[0].abs() > 0.98).double().mean().item())
    assert rows[1].idle == (signals[1].max(0).values == 0).double().mean() >= 0.1


def deep(activation, method, factor=1.0, depth=30):
    layers = [part for _ in range(depth) for part in (nn.Linear(60, 60), activation())]
    model = torch.nn.Sequential(*layers, nn.Linear(60, 1))
    init.auto_(model, method, generator=torch.Generator().manual_seed(0))
    for layer in layers[::2]:
        layer.weight.data.mul_(factor)
    return init.report(model, torch.randn(50, 60, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("activation", "method", "factor", "verdict"),
    [
        (nn.ReLU, "auto", 1.0, "healthy"),
        (nn.Tanh, "auto", 1.0, "healthy"),
        (torch.nn.SELU, "auto", 1.0, "healthy"),
        (torch.nn.Identity, "orthogonal", 1.0, "healthy"),
        (nn.Sigmoid, "auto", 1.0, "vanishing"),
        (nn.ReLU, "xavier", 1.0, "vanishing"),
        (nn.ReLU, "auto", 2.0, "exploding"),
        (nn.ReLU, "auto", 1e30, "exploding"),
        (nn.ReLU, "auto", 0.0, "vanishing"),
    ],
)
def test_verdicts(activation, method, factor, verdict):
    found = deep(activation, method, factor)
    assert found.verdict == verdict
    last = str(found).splitlines()[-1]
    assert last.startswith(verdict)
    assert "below 0.001" in last
    assert "above 1000" in last


def test_he_keeps_the_error_signal_across_widths():
    """Its squared length: within the noise of one draw, whatever the widths (variances differ by the widths' ratio)."""
    model = torch.nn.Sequential(nn.Linear(6, 2000), nn.ReLU(), nn.Linear(2000, 500), nn.ReLU(), nn.Linear(500, 400))
    init.auto_(model, "kaiming", generator=torch.Generator().manual_seed(0))
    first, second, last = init.report(model, torch.randn(200, 6)).rows
    assert 0.8 < second.backward_ratio < 1.25
    assert 0.8 < first.backward_ratio < 1.25
    assert first.error_variance < 0.5 * second.error_variance
    assert last.error_variance == pytest.approx(1, rel=0.1)


def test_the_report_is_the_same_every_time():
    model = network(nn.ReLU())
    first = str(init.report(model, x))
    torch.rand(3)
    assert str(init.report(model, (x,))) == first
    assert len(first.splitlines()) == 2 + 2 + 1


def test_layers_without_an_error_signal():
    """Run without a graph, or of no use to the output: there is no gradient, and the rest is measured."""

    class Cut(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.unused, self.used = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            with torch.no_grad():
                x = F.relu(self.frozen(x))
            self.unused(x)
            return self.used(x)

    found = init.report(Cut(), x)
    assert [row.error_variance > 0 for row in found.rows] == [False, False, True]
    assert found.verdict == "healthy"
    assert "nan" not in str(found)
    with torch.no_grad():
        found = init.report(network(nn.ReLU()), x)  # a graph of its own
    assert all(row.error_variance > 0 for row in found.rows)
    assert "nan" not in str(found)


def test_models_that_cannot_be_measured():
    with pytest.raises(ValueError, match="report: model must have Linear or Conv layers that run, got none in ReLU"):
        init.report(nn.ReLU(), x)

    class Classes(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(1)

    with pytest.raises(ValueError, match="a floating-point output, got none in Sequential"):
        init.report(torch.nn.Sequential(nn.Linear(6, 6), Hidden([Classes(6, 3)])), x)


def test_inputs_are_not_written_to():
    given = x.clone()
    model = torch.nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3))
    init.report(model, given)
    assert torch.equal(given, x)


def test_frozen_models_are_measured_too():
    model = network(nn.ReLU())
    expected = str(init.report(model, x))
    assert str(init.report(model.requires_grad_(False), x)) == expected


def test_the_output_is_not_judged():
    """A softmax over many classes has little variance, and that is as it should be."""
    model = torch.nn.Sequential(
        *(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 3000), nn.Softmax(1))
    )
    init.auto_(model)
    found = init.report(model, x)
    assert found.rows[-1].forward_ratio < 1e-4
    assert found.forward_change == found.rows[1].forward_ratio
    assert found.verdict == "healthy"


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"norm": "batch", "residual": True}, {"dropout": 0.2}])
def test_what_runs_as_one_node_is_reported_apart(options):
    torch.manual_seed(0)
    model, x = nn.MLP([6, 8, 8, 3], **options), torch.randn(16, 6)
    torch.manual_seed(1)
    fused = init.report(model, x)
    plain = nn.MLP([6, 8, 8, 3], **options, fused=False)
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    assert str(fused) == str(init.report(plain, x))
    assert [row.activation for row in fused.rows] == ["relu", "relu", "end"]
