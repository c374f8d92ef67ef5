"""Swapping the modules of a model: what must change, and everything that must not."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, weight_norm

import torch_bp
from torch_bp.nn.convert import twins

x = torch.randn(4, 3)
every_twin = pytest.mark.parametrize("theirs", twins(), ids=lambda kind: kind.__name__)


def outputs_and_gradients(model, inputs=x):
    output = model(inputs)
    return output, torch.autograd.grad(output.sin().sum(), [*model.parameters()])


def assert_same_results(mine, other, inputs=x):
    torch.testing.assert_close(
        outputs_and_gradients(mine, inputs), outputs_and_gradients(other, inputs), rtol=1e-5, atol=1e-6
    )


def kinds(model):
    return [type(module) for module in model.modules()]


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.0), nn.Sequential(nn.Linear(5, 2), nn.LogSoftmax(1)))


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_the_twins_are_those_of_the_same_name():
    found = twins()
    assert {theirs.__name__ for theirs in found} >= {"Linear", "ReLU", "Softmax", "CrossEntropyLoss", "BCELoss"}
    for theirs, ours in found.items():
        assert theirs.__name__ == ours.__name__
        assert getattr(torch.nn, theirs.__name__) is theirs
        assert getattr(torch_bp.nn, theirs.__name__) is ours
        assert ours.__module__.startswith("torch_bp.nn")


def test_a_new_class_joins_by_itself(monkeypatch):
    class Dropout(nn.Dropout):
        pass

    monkeypatch.setattr(torch_bp.nn, "Dropout", Dropout, raising=False)
    assert type(torch_bp.convert(mlp())[2]) is Dropout


@every_twin
def test_both_ways(theirs):
    """The root itself; nothing but the class changes."""
    required = [p for p in inspect.signature(theirs).parameters.values() if p.default is p.empty]
    module = theirs(*(3 for p in required if p.kind is p.POSITIONAL_OR_KEYWORD))
    state = dict(vars(module))
    ours = torch_bp.convert(module, inplace=True)
    assert ours is module
    assert type(ours) is twins()[theirs]
    assert vars(ours) == state
    assert torch_bp.conversion(ours).ours == {"": theirs.__name__}
    back = torch_bp.to_torch(ours, inplace=True)
    assert back is module
    assert type(back) is theirs
    assert vars(back) == state
    assert torch_bp.conversion(back).torchs == {"": theirs.__name__}


def test_the_default_is_a_copy():
    model = mlp()
    before = kinds(model)
    ours = torch_bp.convert(model)
    assert kinds(model) == before
    assert isinstance(ours[0], torch_bp.nn.Linear)
    assert not {id(t) for t in ours.parameters()} & {id(t) for t in model.parameters()}
    torch.testing.assert_close(ours.state_dict(), model.state_dict(), rtol=0, atol=0)
    back = torch_bp.to_torch(ours)
    assert kinds(back) == before
    assert isinstance(ours[0], torch_bp.nn.Linear)


def test_results_and_names_stay():
    model = mlp()
    ours = torch_bp.convert(model)
    assert_same_results(ours, model)
    assert "LinearBackward" in type(ours[0](x).grad_fn).__name__
    assert list(ours.state_dict()) == list(model.state_dict())
    assert repr(ours) == repr(model)


def test_in_place_keeps_the_very_objects():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [*model.modules(), *model.parameters()]
    model[0].note = note = object()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = gradient = torch.ones(5)
    torch_bp.convert(model, inplace=True)
    assert all(a is b for a, b in zip([*model.modules(), *model.parameters()], before, strict=True))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
    assert model[0].note is note
    assert model[0].bias.grad is gradient
    assert not model[0].weight.requires_grad
    assert [module.training for module in model] == [True, True, True, False]
    assert not model[3][0].training


@pytest.mark.parametrize("inplace", [True, False])
def test_tied_weights_and_shared_modules(inplace):
    first, second, activation = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU()
    second.weight = first.weight
    model = nn.Sequential(first, activation, second, activation, first)
    ours = torch_bp.convert(model, inplace=inplace)
    assert ours[4] is ours[0]
    assert ours[3] is ours[1]
    assert ours[2].weight is ours[0].weight
    assert torch_bp.conversion(ours).ours == {"0": "Linear", "1": "ReLU", "2": "Linear"}
    assert_same_results(ours, torch_bp.to_torch(ours))


@pytest.mark.parametrize("inplace", [True, False])
def test_every_kind_of_hook_runs(inplace):
    layer, seen = nn.Linear(3, 2), []

    def hook(name):
        return lambda *_, **__: seen.append(name)

    layer.register_forward_pre_hook(hook("before"))
    layer.register_forward_pre_hook(hook("before, with keywords"), with_kwargs=True)
    layer.register_forward_hook(hook("after"))
    layer.register_forward_hook(hook("always"), always_call=True)
    layer.register_full_backward_pre_hook(hook("before backward"))
    layer.register_full_backward_hook(hook("after backward"))
    layer.register_state_dict_pre_hook(hook("before state"))
    layer.register_state_dict_post_hook(hook("after state"))
    layer.register_load_state_dict_pre_hook(hook("before loading"))
    layer.register_load_state_dict_post_hook(hook("after loading"))

    def use(module):
        seen.clear()
        module(x.clone().requires_grad_()).sum().backward()
        module.load_state_dict(module.state_dict())
        return list(seen)

    expected = use(layer)
    assert len(expected) == 10
    assert use(torch_bp.convert(layer, inplace=inplace)) == expected


def test_buffers():
    layer = nn.Linear(3, 2)
    layer.register_buffer("kept", torch.ones(2))
    layer.register_buffer("passing", torch.zeros(2), persistent=False)
    weighted = nn.ModuleDict({"layer": layer, "loss": nn.CrossEntropyLoss(weight=torch.rand(2))})
    ours = torch_bp.convert(weighted)
    assert isinstance(ours["loss"], torch_bp.nn.CrossEntropyLoss)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(weighted.named_buffers()), rtol=0, atol=0)
    assert list(ours.state_dict()) == list(weighted.state_dict())


def test_subclasses_are_left_alone_and_listed():
    class Shifted(torch_bp.nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(3, 3), Doubled(3, 3), Shifted(3, 3), nn.Conv1d(4, 4, 1))
    ours = torch_bp.convert(model)
    assert kinds(ours)[1:] == [torch_bp.nn.Linear, Doubled, Shifted, nn.Conv1d]
    assert kinds(torch_bp.to_torch(ours)) == kinds(model)
    kept = torch_bp.conversion(ours).kept
    assert kept == torch_bp.conversion(model).kept
    assert list(kept) == ["1", "2", "3"]
    assert kept["1"] == "Doubled is a subclass of torch.nn.Linear"
    assert kept["2"].endswith("Shifted is a subclass of torch_bp.nn.Linear")
    assert kept["3"] == "torch_bp has no Conv1d of its own"


def test_what_torch_lacks_stays():
    model = nn.ModuleList([torch_bp.nn.HalfMSELoss(), torch_bp.nn.MSELoss()])
    back = torch_bp.to_torch(model)
    assert kinds(back) == [nn.ModuleList, torch_bp.nn.HalfMSELoss, nn.MSELoss]
    assert torch_bp.conversion(back).kept == {"0": "torch has no HalfMSELoss"}


def test_a_replaced_forward_is_left_alone():
    """The replacement holds the method of the old class: a new class would change nothing, or half of it."""
    layer = nn.Linear(3, 2)
    old = layer.forward
    layer.forward = lambda input: old(input) + 1
    model = torch_bp.convert(nn.Sequential(layer, nn.ReLU()))
    assert kinds(model)[1:] == [nn.Linear, torch_bp.nn.ReLU]
    assert "replaced" in torch_bp.conversion(model).kept["0"]


def test_lazy_modules():
    model = nn.Sequential(nn.LazyLinear(2), nn.ReLU())
    ours = torch_bp.convert(model)
    assert "becomes Linear when it is first called" in torch_bp.conversion(ours).kept["0"]
    ours(x)
    assert torch_bp.conversion(ours).torchs == {"0": "Linear"}
    torch_bp.convert(ours, inplace=True)
    assert type(ours[0]) is torch_bp.nn.Linear


@pytest.mark.parametrize("parametrization", [weight_norm, orthogonal])
@pytest.mark.parametrize("inplace", [True, False])
def test_parametrized_modules(parametrization, inplace):
    model = nn.Sequential(parametrization(nn.Linear(3, 3)), nn.ReLU(), nn.Linear(3, 2))
    reference = copy.deepcopy(model)
    ours = torch_bp.convert(model, inplace=inplace)
    assert isinstance(ours[0], torch_bp.nn.Linear)
    assert parametrize.type_before_parametrizations(ours[0]) is torch_bp.nn.Linear
    assert torch_bp.conversion(ours).ours == {"0": "Linear", "1": "ReLU", "2": "Linear"}
    assert list(ours.state_dict()) == list(reference.state_dict())
    assert_same_results(ours, reference)
    assert_same_results(copy.deepcopy(ours), reference)
    back = torch_bp.to_torch(ours)
    assert parametrize.type_before_parametrizations(back[0]) is nn.Linear
    assert_same_results(back, reference)
    parametrize.remove_parametrizations(ours[0], "weight")
    assert type(ours[0]) is torch_bp.nn.Linear
    assert "weight" in dict(ours[0].named_parameters())
    assert_same_results(back, reference)


def test_one_of_two_copies_may_lose_its_parametrization():
    """Deepcopies of a parametrized module share its class; torch alters that class in place."""
    layer = weight_norm(nn.Linear(3, 2))
    ours = torch_bp.convert(nn.ModuleList([layer, copy.deepcopy(layer)]))
    parametrize.remove_parametrizations(ours[0], "weight")
    assert_same_results(ours[1], layer)


@pytest.mark.parametrize("inplace", [True, False])
def test_pruned_modules(inplace):
    """The pruned weight is no leaf, which deepcopy refuses; the hook computes it anew."""
    layer = prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=0.5)
    expected = outputs_and_gradients(layer)
    ours = torch_bp.convert(layer, inplace=inplace)
    assert type(ours) is torch_bp.nn.Linear
    assert int((ours.weight == 0).sum()) == 3
    torch.testing.assert_close(outputs_and_gradients(ours), expected, rtol=1e-5, atol=1e-6)
    assert (ours.weight_orig is layer.weight_orig) == inplace
    prune.remove(ours, "weight")
    assert isinstance(ours.weight, nn.Parameter)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_by_hooks():
    layer = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    assert_same_results(torch_bp.convert(layer), layer)


def test_copies_of_converted_models():
    ours = torch_bp.convert(mlp())
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert kinds(copied) == kinds(ours)
        assert_same_results(copied, ours)


def test_modules_that_torch_calls_by_their_parts():
    """Attention reads the weight of its output layer itself, a subclass of Linear."""
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
    ours = torch_bp.convert(model)
    assert {"linear1", "linear2"} <= set(torch_bp.conversion(ours).ours)
    assert torch_bp.conversion(ours).kept["self_attn.out_proj"].endswith("is a subclass of torch.nn.Linear")
    for mode in (True, False):
        assert_same_results(ours.train(mode), model.train(mode), torch.randn(2, 3, 4))


@pytest.mark.parametrize("name", ["convert", "to_torch", "conversion"])
def test_no_module(name):
    with pytest.raises(TypeError, match=rf"{name}: model must be a torch.nn.Module, got list. Put several"):
        getattr(torch_bp, name)([nn.Linear(3, 2)])


def test_the_summary_reads_well():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(8)), nn.Softsign(), Doubled(3, 3))
    text = str(torch_bp.conversion(torch_bp.convert(model)))
    assert text.split("\n") == [
        "torch_bp's: Linear (0, 1, 2, 3, 4, 5 and 2 more)",
        "torch's, to be swapped by convert: none",
        "left alone: Doubled is a subclass of torch.nn.Linear (9), torch_bp has no Softsign of its own (8)",
    ]
    assert "Linear (the model itself)" in str(torch_bp.conversion(nn.Linear(3, 2)))
    assert str(torch_bp.conversion(nn.Linear(3, 2))).endswith("left alone: none")
