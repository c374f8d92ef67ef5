"""Losses tell when they are given what another loss is for, once, and keep quiet otherwise."""

import copy
import functools
import pickle
import timeit
import warnings

import pytest
import torch

from torch_bp import nn
from torch_bp.nn import functional as F
from torch_bp.nn import pairing

classes, units = torch.tensor([0, 2, 1, 0]), torch.rand(4, 3)
TARGETS = {
    "CrossEntropyLoss": classes,
    "NLLLoss": classes,
    "BCELoss": units,
    "BCEWithLogitsLoss": units,
}
FUNCTIONS = {
    "CrossEntropyLoss": F.cross_entropy,
    "NLLLoss": F.nll_loss,
    "BCELoss": F.binary_cross_entropy,
    "BCEWithLogitsLoss": F.binary_cross_entropy_with_logits,
}


@pytest.fixture(autouse=True)
def anew():
    pairing.set_enabled(True)
    yield
    pairing.set_enabled(True)


def logits(library=nn, **kwargs):
    """Of a linear layer, within (0, 1), so that every loss takes them for what it wants."""
    layer = library.Linear(3, 3, **kwargs)
    with torch.no_grad():
        layer.weight.fill_(0.1)
        if layer.bias is not None:
            layer.bias.fill_(0.2)
    return layer(torch.rand(4, 3))


def convolved():
    layer = torch.nn.Conv1d(2, 3, 1)
    with torch.no_grad():
        layer.weight.fill_(0.1)
        layer.bias.fill_(0.2)
    return layer(torch.rand(4, 2, 1)).squeeze(-1)


def softmax(library=nn):
    return library.Softmax(1)(logits(library))


def sigmoid(library=nn):
    return library.Sigmoid()(logits(library))


def hooked():
    layer = nn.Softmax(1)
    layer.register_forward_hook(lambda module, args, output: output.view(4, 3))
    return layer(logits())


WRONG = {
    "softmax": ("CrossEntropyLoss", softmax, "softmax"),
    "torch's softmax": ("CrossEntropyLoss", lambda: softmax(torch.nn), "softmax"),
    "softmax of a mask": ("CrossEntropyLoss", lambda: softmax()[torch.arange(4)], "softmax"),
    "softmax, reshaped": ("CrossEntropyLoss", lambda: softmax().reshape(2, 2, 3).flatten(0, 1), "softmax"),
    "softmax, transposed": ("CrossEntropyLoss", lambda: softmax().t().contiguous().t(), "softmax"),
    "softmax, sliced": ("CrossEntropyLoss", lambda: softmax()[:, :3].unsqueeze(0).squeeze(0), "softmax"),
    "softmax, half and back": ("CrossEntropyLoss", lambda: softmax().bfloat16().float(), "softmax"),
    "softmax after a hook": ("CrossEntropyLoss", hooked, "softmax"),
    "sigmoid": ("BCEWithLogitsLoss", sigmoid, "sigmoid"),
    "torch's sigmoid": ("BCEWithLogitsLoss", lambda: sigmoid(torch.nn), "sigmoid"),
    "sigmoid, selected": ("BCEWithLogitsLoss", lambda: torch.stack([sigmoid()] * 2)[0].sigmoid()[:], "sigmoid"),
    "linear to BCELoss": ("BCELoss", logits, "linear"),
    "torch's linear to BCELoss": ("BCELoss", lambda: logits(torch.nn), "linear"),
    "torch's linear without bias": ("BCELoss", lambda: logits(torch.nn, bias=False), "linear"),
    "convolution": ("BCELoss", convolved, "linear"),
    "linear to NLLLoss": ("NLLLoss", logits, "linear"),
    "torch's linear to NLLLoss": ("NLLLoss", lambda: logits(torch.nn).view(4, 3), "linear"),
    "softmax to NLLLoss": ("NLLLoss", softmax, "softmax"),
}
RIGHT = {
    "linear to CrossEntropyLoss": ("CrossEntropyLoss", logits),
    "torch's linear to CrossEntropyLoss": ("CrossEntropyLoss", lambda: logits(torch.nn)),
    "log-softmax to CrossEntropyLoss": ("CrossEntropyLoss", lambda: F.log_softmax(logits(), 1)),
    "softmax before a layer": ("CrossEntropyLoss", lambda: nn.Linear(3, 3)(softmax())),
    "scaled softmax": ("CrossEntropyLoss", lambda: 10 * softmax()),
    "log-softmax to NLLLoss": ("NLLLoss", lambda: F.log_softmax(logits(), 1)),
    "torch's log-softmax to NLLLoss": ("NLLLoss", lambda: logits(torch.nn).log_softmax(1).view(4, 3)),
    "log of softmax to NLLLoss": ("NLLLoss", lambda: softmax().log()),
    "sigmoid to BCELoss": ("BCELoss", sigmoid),
    "softmax to BCELoss": ("BCELoss", softmax),
    "clamped linear to BCELoss": ("BCELoss", lambda: logits().clamp(0, 1)),
    "mixture of probabilities to BCELoss": ("BCELoss", lambda: softmax() @ softmax()[:3]),
    "mixture of fixed probabilities": ("BCELoss", lambda: softmax() @ torch.rand(3, 3)),
    "mixture by transposed shares": ("BCELoss", lambda: softmax() @ sigmoid()[:3].t()),
    "linear to BCEWithLogitsLoss": ("BCEWithLogitsLoss", logits),
    "log-sigmoid to BCEWithLogitsLoss": ("BCEWithLogitsLoss", lambda: F.logsigmoid(logits())),
    "a parameter": ("CrossEntropyLoss", lambda: torch.nn.Parameter(torch.rand(4, 3))),
    "no graph": ("CrossEntropyLoss", lambda: softmax().detach()),
    "a constant": ("BCELoss", lambda: torch.rand(4, 3).view(4, 3)),
    "many views": ("CrossEntropyLoss", lambda: functools.reduce(lambda t, _: t.clone(), range(8), softmax())),
}


def target(loss, input):
    return TARGETS[loss] if TARGETS[loss].dim() == 1 else torch.rand_like(input.detach())


def compute(loss, input):
    return getattr(nn, loss)()(input, target(loss, input))


@pytest.mark.parametrize(("loss", "make", "made"), WRONG.values(), ids=WRONG)
def test_wrong_pairs_are_told_of_once(loss, make, made):
    input = make()
    for form in (getattr(nn, loss)(), FUNCTIONS[loss]):
        pairing.set_enabled(True)
        with pytest.warns(pairing.LossPairingWarning) as caught:
            form(input, target(loss, input))
        form(input, target(loss, input))  # warnings are errors here
        assert len(caught) == 1
        message = str(caught[0].message)
        assert loss in message
        assert f"output of {made}" in message
        assert caught[0].filename == __file__


@pytest.mark.parametrize(("loss", "make"), RIGHT.values(), ids=RIGHT)
def test_right_pairs_are_not(loss, make):
    """Warnings are errors here."""
    compute(loss, make())


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        ("softmax", "loss = nn.CrossEntropyLoss()(logits, target)"),
        ("sigmoid", "loss = nn.BCEWithLogitsLoss()(logits, target)"),
        ("linear to BCELoss", "loss = nn.BCEWithLogitsLoss()(logits, target)"),
        ("linear to NLLLoss", "loss = nn.CrossEntropyLoss()(logits, target)"),
        ("softmax to NLLLoss", "loss = nn.CrossEntropyLoss()(logits, target)"),
    ],
)
def test_the_line_to_write_is_right(pair, line):
    """It is in the message, and it runs without another one."""
    loss, make, _ = WRONG[pair]
    with pytest.warns(pairing.LossPairingWarning) as caught:
        compute(loss, make())
    assert line in str(caught[0].message)
    names = {"nn": nn, "logits": logits()}
    names["target"] = target("BCELoss" if "BCE" in line else "NLLLoss", names["logits"])
    exec(line, names)
    assert names["loss"].isfinite()


def test_each_pair_is_told_of():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for loss, make, _ in 2 * list(WRONG.values()):
            compute(loss, make())
    assert len(caught) == len({(loss, made) for loss, _, made in WRONG.values()}) == 5


def test_it_can_be_switched_off_and_filtered():
    pairing.set_enabled(False)
    compute("CrossEntropyLoss", softmax())
    pairing.set_enabled(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pairing.LossPairingWarning)
        compute("CrossEntropyLoss", softmax())
    assert issubclass(pairing.LossPairingWarning, UserWarning)
    compute("CrossEntropyLoss", softmax())  # that was the once


def test_quiet_without_a_graph():
    with torch.no_grad():
        compute("CrossEntropyLoss", softmax())
    with torch.inference_mode():
        compute("CrossEntropyLoss", nn.Softmax(1)(torch.rand(4, 3)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_quiet_under_compile(backend):
    model, loss = nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)), nn.CrossEntropyLoss()
    compiled = torch.compile(lambda x: loss(model(x), classes), fullgraph=True, backend=backend)
    compiled(torch.rand(4, 3)).backward()
    torch.export.export(torch.nn.Sequential(model, _Criterion()), (torch.rand(4, 3),), strict=False)


class _Criterion(torch.nn.Module):
    def forward(self, input):
        return F.cross_entropy(input, classes)


def test_quiet_inside_transforms():
    weight = torch.rand(3, 3, requires_grad=True)

    def loss(weight, x):
        return F.cross_entropy(F.softmax(F.linear(x, weight), -1), classes)

    x = torch.rand(4, 3)
    torch.func.grad(loss)(weight, x)
    torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, torch.rand(2, 4, 3))
    torch.func.jacrev(loss)(weight, x)
    with pytest.warns(pairing.LossPairingWarning):
        loss(weight, x)


def test_the_loss_is_what_it_was():
    """Told of or not."""
    input = softmax()
    with pytest.warns(pairing.LossPairingWarning):
        told = compute("CrossEntropyLoss", input)
    pairing.set_enabled(False)
    assert torch.equal(told, compute("CrossEntropyLoss", input))
    torch.testing.assert_close(told, torch.nn.functional.cross_entropy(input, classes))


def test_losses_can_still_be_copied():
    for function in FUNCTIONS.values():
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function


def test_off_costs_nothing():
    """Less than 100 ns, over an empty loop; the least of many runs, since the machine may be busy."""
    pairing.set_enabled(False)
    input = logits()

    def asked():
        if pairing.enabled:
            pairing.check("cross_entropy", input)

    def empty():
        pass

    least = [min(timeit.repeat(f, number=5000, repeat=30)) / 5000 for f in (asked, empty)]
    assert least[0] - least[1] < 100e-9
