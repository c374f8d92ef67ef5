"""The certificate holds where nothing is wrong, names what is, and leaves no trace."""

import copy
import json
import math
import random
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import torch_bp
from torch_bp.certificate.checks import CHECKS
from torch_bp.certificate.comparison import deviations, mismatch, tolerance

NAMES = [check.name for check in CHECKS]
OPTIMIZERS = NAMES[-6:]
TRAINING = ["per-example gradients", "training", *OPTIMIZERS]  # what takes parameters
CHEAP = [name for name in NAMES if name != "compile"]
x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2), nn.LogSoftmax(1))


def verdicts(certificate, verdict):
    return [row.check for row in certificate.rows if row.verdict == verdict]


class Words(nn.Module):
    """Integers in; a tuple and a dict out, integers among them."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.unused = nn.Embedding(7, 3), nn.Linear(3, 2), nn.Linear(1, 1)

    def forward(self, words):
        hidden = self.layer(self.table(words))
        return {"pair": (hidden, hidden.sigmoid()), "best": hidden.argmax(-1)}


class Loss(nn.Module):
    """Keyword arguments in nested containers; a number out. What torch lacks stays on both sides."""

    def __init__(self):
        super().__init__()
        self.layer, self.mean, self.report = nn.Linear(3, 2), nn.MSELoss(), torch_bp.nn.HalfMSELoss()

    def forward(self, *, batch, scale):
        prediction = self.layer(batch["x"])
        return scale * self.mean(prediction, batch["y"]) + self.report(prediction, batch["y"])


class Attributes(nn.Module):
    """Tied weights, a frozen one, a buffer that every call changes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, input):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * input.detach().mean(0)
        return self.second(torch.relu(self.first(input)))


def pruned():
    return nn.Sequential(prune.l1_unstructured(nn.Linear(3, 4), "weight", amount=0.5), nn.Sigmoid())


MODELS = {
    "mlp": (mlp, x, []),
    "float64": (lambda: mlp().double(), x.double(), []),
    "bfloat16": (lambda: mlp().bfloat16(), x.bfloat16(), []),
    "complex": (lambda: nn.Linear(3, 2, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64), []),
    "dropout": (lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), x, []),
    "in place": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), x, []),
    "no parameters": (lambda: nn.Sequential(nn.Tanh(), nn.Softmax(1)), x, TRAINING),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()), x, ["per-example gradients"]),
    "batch norm, eval": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), x, []),
    "words": (Words, torch.randint(7, (4, 5)), []),
    "keywords": (Loss, {"batch": {"x": x, "y": torch.randn(6, 2)}, "scale": 2.0}, []),
    "attributes": (Attributes, x, []),
    "two arguments": (lambda: nn.CrossEntropyLoss(), (x, torch.randint(3, (6,))), TRAINING),
    "weight norm": (lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Sigmoid()), x, ["forward mode"]),
    "pruned": (pruned, x, []),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_holds(name):
    make, inputs, cannot = MODELS[name]
    certificate = torch_bp.verify(make(), inputs)
    assert certificate.holds, str(certificate)
    assert [row.check for row in certificate.rows] == NAMES
    assert verdicts(certificate, "torch cannot") == cannot, str(certificate)


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Linear(3, 2))
    certificate = torch_bp.verify(model, torch.randint(7, (4, 5)))
    cannot = ["per-example gradients", "SGD Nesterov", "RMSprop", "Adam", "AdamW"]
    assert verdicts(certificate, "torch cannot") == cannot, str(certificate)
    # torch keeps the momentum of a sparse gradient sparse, ours is dense
    [row] = [row for row in certificate.rows if row.verdict == "differs"]
    assert row.check == "SGD momentum"
    assert row.detail == "layout torch.strided should be torch.sparse_coo"


def test_it_takes_models_of_either_library():
    for model in (mlp(), torch_bp.convert(mlp())):
        certificate = torch_bp.verify(model, x, checks=["outputs", "gradients"])
        assert certificate.holds
        assert list(certificate.conversion.ours) == ["0", "1", "2", "3", "4", "5"]


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


def test_a_model_that_does_not_repeat_itself():
    class Counting(nn.Module):
        calls = 0

        def forward(self, input):
            Counting.calls += 1
            return input * Counting.calls

    (row,) = torch_bp.verify(Counting(), x, checks=["outputs"]).rows
    assert (row.verdict, row.detail) == ("torch cannot", "two runs of torch with one seed differ")


def test_nothing_is_altered():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[2].eval()
    model[3].requires_grad_(False)
    inputs = torch.randn(6, 3, requires_grad=True)
    model(inputs).sum().backward()

    def everything():
        tensors = {**model.state_dict(keep_vars=True), "inputs": inputs}
        values = {k: (t.detach().clone(), t._version, t.requires_grad, t.grad) for k, t in tensors.items()}
        grads = [None if p.grad is None else (p.grad.clone(), p.grad._version) for p in (*model.parameters(), inputs)]
        kinds = [(type(module), module.training, sorted(vars(module))) for module in model.modules()]
        randomness = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy())
        return values, grads, kinds, randomness, torch.is_grad_enabled()

    before = copy.copy(everything())
    assert torch_bp.verify(model, inputs).holds
    after = everything()
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
    assert after[2] == before[2]
    assert torch.equal(after[3][0], before[3][0])
    assert after[3][1] == before[3][1]
    assert (after[3][2] == before[3][2]).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(mode):
    model = mlp()
    with mode():
        assert torch_bp.verify(model, x, checks=CHEAP).holds
        assert not torch.is_grad_enabled()


def test_many_certificates_in_one_process():
    """Dynamo gives up on code that it has compiled eight times."""
    for width in range(2, 12):
        certificate = torch_bp.verify(nn.Linear(3, width), x, checks=["compile"])
        assert verdicts(certificate, "holds") == ["compile"], str(certificate)


def test_errors():
    with pytest.raises(TypeError, match=r"to_torch: model must be a torch.nn.Module, got function"):
        torch_bp.verify(lambda x: x, x)
    with pytest.raises(ValueError, match=r"checks must be names from outputs, gradients, .*; got 'outputs'"):
        torch_bp.verify(mlp(), x, checks="outputs")
    with pytest.raises(ValueError, match=r"got \['nowhere'\]"):
        torch_bp.verify(mlp(), x, checks=["nowhere"])
    with pytest.raises(ValueError, match=r"the model must run on example_inputs .* got RuntimeError: mat1 and mat2"):
        torch_bp.verify(mlp(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="returns no floating-point tensor"):
        torch_bp.verify(nn.Flatten(), torch.ones(2, 2, dtype=torch.long))


def test_the_report(monkeypatch):
    monkeypatch.setattr(WrongLinear, "fault", "lost_gradient")
    monkeypatch.setattr(torch_bp.nn, "Linear", WrongLinear)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    certificate = torch_bp.verify(model, x, checks=["outputs", "gradients", "per-example gradients"])
    lines = str(certificate).splitlines()
    assert "1 module is torch_bp's; float32 on cpu" in lines[0]
    assert [line.split()[0] for line in lines[1:5]] == ["check", "outputs", "gradients", "per-example"]
    assert "torch cannot" in lines[4]
    assert lines[-1] == "It does not hold: gradients."
    assert not certificate
    read = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
    assert read["holds"] is False
    assert read["modules"]["ours"] == {"0": "WrongLinear"}
    assert [row["verdict"] for row in read["rows"]] == ["holds", "differs", "torch cannot"]
    assert read["rows"][0]["deviation"] == 0
    assert read["rows"][1]["deviation"] is None


def test_deviations():
    tensor = partial(torch.tensor, dtype=torch.float64)
    expected = {"a: large": tensor([100.0, 0.0]), "a: small": tensor([1e-9]), "b: none": None, "c": tensor([])}
    got = {**expected, "a: large": tensor([100.0, 1.0]), "a: small": tensor([2e-9])}
    found = deviations(got, expected)
    assert found == pytest.approx({"a: large": 0.01, "a: small": 1e-9, "c": 0.0})
    nan, inf = math.nan, math.inf
    assert deviations({"a": tensor([nan, inf, 1.0])}, {"a": tensor([nan, inf, 1.0])}) == {"a": 0.0}
    assert deviations({"a": tensor([nan, -inf, 1.0])}, {"a": tensor([nan, inf, 1.0])}) == {"a": inf}
    assert deviations({"a": tensor([inf])}, {"a": tensor([nan])}) == {"a": inf}
    assert deviations({"a": tensor([1.0])}, {"a": tensor([nan])}) == {"a": inf}
    assert deviations({"a": tensor([1e-300])}, {"a": tensor([0.0])}) == {"a": inf}


def test_mismatches():
    one = torch.ones(2)
    assert mismatch({"a": one, "b": None}, {"a": one + 1, "b": None}) is None
    assert mismatch({}, {"a": one}) == ("a", "only torch has it")
    assert mismatch({"a": one}, {}) == ("a", "only torch_bp has it")
    assert mismatch({"a": one}, {"a": None}) == ("a", "None in torch only")
    assert mismatch({"a": one[None]}, {"a": one}) == ("a", "shape (1, 2) should be (2,)")
    assert mismatch({"a": one.double()}, {"a": one}) == ("a", "dtype torch.float64 should be torch.float32")
    assert mismatch({"a": one.to_sparse()}, {"a": one}) == ("a", "layout torch.sparse_coo should be torch.strided")
    assert mismatch({"a": one.long()}, {"a": 2 * one.long()}) == ("a", "2 of 2 entries differ")


def test_tolerances_are_many_roundings_and_few_digits():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert 2 * torch.finfo(dtype).eps < tolerance(dtype) < torch.finfo(dtype).eps ** 0.5
    assert tolerance(None) == 0
