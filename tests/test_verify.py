"""The certificate holds where nothing is wrong, and leaves no trace; `certificate/test_faults.py` has what is wrong."""

import copy
import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import torch_bp
from torch_bp.certificate.checks import CHECKS

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
    with pytest.raises(TypeError, match=r"verify: model must be a torch.nn.Module, got function"):
        torch_bp.verify(lambda x: x, x)
    with pytest.raises(ValueError, match=r"checks must be names from outputs, gradients, .*; got 'outputs'"):
        torch_bp.verify(mlp(), x, checks="outputs")
    with pytest.raises(ValueError, match=r"got \['nowhere'\]"):
        torch_bp.verify(mlp(), x, checks=["nowhere"])
    with pytest.raises(ValueError, match=r"the model must run on example_inputs .* got RuntimeError: mat1 and mat2"):
        torch_bp.verify(mlp(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="returns no floating-point tensor"):
        torch_bp.verify(nn.Flatten(), torch.ones(2, 2, dtype=torch.long))
