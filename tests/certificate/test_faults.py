"""Every kind of fault is found by the checks that are there for it, and rounding is not taken for one."""

import json

import pytest
import torch
from torch import nn

import torch_bp
from torch_bp.certificate.checks import CHECKS

NAMES = [check.name for check in CHECKS]
OPTIMIZERS = NAMES[-6:]
x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2), nn.LogSoftmax(1))


def verdicts(certificate, verdict):
    return [row.check for row in certificate.rows if row.verdict == verdict]


class Altered(torch_bp.autograd.Function):
    """The identity, with a factor in its derivative, in the derivative's derivative, or in forward mode."""

    @staticmethod
    def forward(value, first, second, tangent):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factors = inputs[1:]

    @staticmethod
    def backward(ctx, dy):
        first, second, _ = ctx.factors
        return Altered.apply(first * dy, second, 1.0, 1.0), None, None, None

    @staticmethod
    def jvp(ctx, dx, *_):
        return ctx.factors[2] * dx


class WrongLinear(torch_bp.nn.Linear):
    """Our layer with a fault; `fault` is the name of a method."""

    fault = ""

    def forward(self, input):
        return getattr(self, self.fault)(input)

    def first_derivative(self, input):
        weight = Altered.apply(self.weight, 1.001, 1.0, 1.0)
        return torch_bp.nn.functional.linear(input, weight, self.bias)

    def second_derivative(self, input):
        return super().forward(Altered.apply(input, 1.0, 1.001, 1.0))

    def forward_mode(self, input):
        return super().forward(Altered.apply(input, 1.0, 1.0, 1.001))

    def lost_gradient(self, input):
        return torch_bp.nn.functional.linear(input, self.weight, self.bias.detach())

    def value(self, input):
        return super().forward(input) * 1.001

    def graph_break(self, input):
        torch._dynamo.graph_break()
        return super().forward(input)

    def batched(self, input):
        if torch.compiler.is_compiling():
            return super().forward(input)
        inside = input
        while torch._C._functorch.is_gradtrackingtensor(inside):
            inside = torch._C._functorch.get_unwrapped(inside)
        return super().forward(input * 1.001 if torch._C._functorch.is_batchedtensor(inside) else input)

    def without_autocast(self, input):
        with torch.autocast("cpu", enabled=False):
            return super().forward(input)

    def error(self, input):
        raise NotImplementedError("not for this input")


ALL_BUT = set(NAMES) - set(OPTIMIZERS) - {"state_dict"}
FAULTS = {
    "first_derivative": {"gradients", "second derivatives", "per-example gradients", "compile", "training"},
    "second_derivative": {"second derivatives"},
    "forward_mode": {"forward mode"},
    "lost_gradient": ALL_BUT - {"outputs"},
    "value": ALL_BUT - {"autocast"},
    "graph_break": {"compile"},
    "batched": {"per-example gradients"},
    "without_autocast": {"autocast"},
    "error": ALL_BUT,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_by_its_checks(fault, monkeypatch):
    monkeypatch.setattr(WrongLinear, "fault", fault)
    monkeypatch.setattr(torch_bp.nn, "Linear", WrongLinear)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.Tanh())
    certificate = torch_bp.verify(model, x)
    assert not certificate.holds
    assert set(verdicts(certificate, "differs")) == FAULTS[fault], str(certificate)
    assert all(row.deviation > row.tolerance or row.detail for row in certificate.rows if row.verdict == "differs")


def test_float64_hides_less(monkeypatch):
    """An error of 1e-7 is rounding in float32; autocast leaves float64 alone, so it is seen there too."""

    class Slightly(torch_bp.nn.Linear):
        def forward(self, input):
            return super().forward(input) * (1 + 1e-7)

    monkeypatch.setattr(torch_bp.nn, "Linear", Slightly)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    checks = ["outputs", "gradients", "autocast"]
    assert torch_bp.verify(model, x, checks=checks).holds
    assert verdicts(torch_bp.verify(model.double(), x.double(), checks=checks), "differs") == checks


def test_a_fault_names_its_tensor(monkeypatch):
    monkeypatch.setattr(WrongLinear, "fault", "lost_gradient")
    monkeypatch.setattr(torch_bp.nn, "Linear", WrongLinear)
    (row,) = torch_bp.verify(mlp(), x, checks=["gradients"]).rows
    assert (row.tensor, row.detail) == ("gradient: 0.bias", "None in torch_bp only")
    monkeypatch.setattr(WrongLinear, "fault", "first_derivative")
    (row,) = torch_bp.verify(nn.Linear(3, 2), x, checks=["gradients"]).rows
    assert row.tensor == "gradient: weight"
    assert row.deviation == pytest.approx(1e-3, rel=1e-2)
    monkeypatch.setattr(WrongLinear, "fault", "error")
    (row,) = torch_bp.verify(mlp(), x, checks=["outputs"]).rows
    assert row.detail == "torch_bp raised NotImplementedError: not for this input"


def test_a_state_dict_that_torch_cannot_load(monkeypatch):
    class Extra(torch_bp.nn.Linear):
        def get_extra_state(self):
            return {}

        def set_extra_state(self, state):
            pass

    monkeypatch.setattr(torch_bp.nn, "Linear", Extra)
    certificate = torch_bp.verify(mlp(), x, checks=["outputs", "state_dict"])
    assert verdicts(certificate, "differs") == ["state_dict"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_wrong_optimizer(name, monkeypatch):
    kind = getattr(torch_bp.optim, name.split(" ")[0])

    class Wrong(kind):
        def __init__(self, params, **options):
            super().__init__(params, **{**options, "lr": 1.001 * options["lr"]})

    monkeypatch.setattr(torch_bp.optim, kind.__name__, Wrong)
    certificate = torch_bp.verify(mlp(), x, checks=OPTIMIZERS)
    wrong = [other for other in OPTIMIZERS if other.split(" ")[0] == kind.__name__]
    assert verdicts(certificate, "differs") == wrong


class Centred(nn.Module):
    """What is left after a mean is subtracted has the rounding of what was there before."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, input):
        hidden = self.layer(input + 1000)
        return hidden - hidden.mean(0)


def test_rounding_is_judged_in_float64(monkeypatch):
    """A matrix product that is summed in another order has other digits, and none of them is worse."""

    class Reordered(torch_bp.nn.Linear):
        def forward(self, input):
            halves = zip(input.chunk(2, -1), self.weight.chunk(2, -1))
            return sum(a @ w.t() for a, w in halves) + self.bias

    monkeypatch.setattr(torch_bp.nn, "Linear", Reordered)
    certificate = torch_bp.verify(Centred(), torch.randn(32, 64), checks=["outputs"])
    (row,) = certificate.rows
    assert row.deviation > row.tolerance
    assert row.verdict == "holds"
    assert row.detail.startswith("as near to float64 as torch")

    class Wrong(Reordered):
        def forward(self, input):
            return super().forward(input) + 0.01 * input.sin().sum(-1, keepdim=True)

    monkeypatch.setattr(torch_bp.nn, "Linear", Wrong)
    certificate = torch_bp.verify(Centred(), torch.randn(32, 64), checks=["outputs"])
    assert not certificate.holds


def test_the_report(monkeypatch):
    monkeypatch.setattr(WrongLinear, "fault", "lost_gradient")
    monkeypatch.setattr(torch_bp.nn, "Linear", WrongLinear)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    certificate = torch_bp.verify(model, x, checks=["outputs", "gradients", "per-example gradients"])
    lines = str(certificate).splitlines()
    assert "2 modules are torch_bp's; float32 on cpu" in lines[0]
    assert [line.split()[0] for line in lines[1:5]] == ["check", "outputs", "gradients", "per-example"]
    assert "torch cannot" in lines[4]
    assert lines[-1] == "It does not hold: gradients."
    assert not certificate
    read = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
    assert read["holds"] is False
    assert read["modules"]["ours"] == {"0": "WrongLinear", "1": "BatchNorm1d"}
    assert [row["verdict"] for row in read["rows"]] == ["holds", "differs", "torch cannot"]
    assert read["rows"][0]["deviation"] == 0
    assert read["rows"][1]["deviation"] is None
