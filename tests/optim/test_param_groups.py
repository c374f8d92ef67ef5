"""Groups by what parameters are: each parameter once, rates by name and depth, patterns that must match."""

import re

import pytest
import torch

import torch_bp
from tests.optim.table import PAIRS
from torch_bp.optim import AdamW, param_groups


class OwnRMSNorm(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(size))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norm = OwnRMSNorm(4)
        self.feed = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))


class Network(torch.nn.Module):
    """An embedding and a position, three blocks, a norm and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.position = torch.nn.Parameter(torch.zeros(5, 4))
        self.embedding = torch.nn.Embedding(7, 4)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.norm = torch.nn.LayerNorm([5, 4])
        self.head = torch.nn.Linear(4, 7)
        self.head.weight = self.embedding.weight


def by_name(groups, key):
    return {name: group.get(key) for group in groups for name, _ in group["params"]}


def test_every_trainable_parameter_is_in_one_group():
    model = Network()
    model.blocks[0].requires_grad_(False)
    groups = param_groups(model, lr={"head": 0.1, "blocks.1": 0.2, "*": 0.3}, layer_decay=0.5)
    pairs = [pair for group in groups for pair in group["params"]]
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(pairs) == len(expected)
    assert all(expected[name] is p for name, p in pairs)
    assert "frozen, in no group: blocks.0.attention.in_proj_weight" in repr(groups)
    assert [name for group in AdamW(groups).param_groups for name in group["param_names"]] == [n for n, _ in pairs]


@pytest.mark.parametrize("name", PAIRS)
def test_every_optimizer_takes_them_and_they_can_be_used_again(name):
    groups = param_groups(torch.nn.Linear(3, 2), lr=0.25)
    for kind in PAIRS[name]:
        optimizer = kind(groups)
        optimizer.param_groups[0]["lr"] = 1.0
        assert [g["param_names"] for g in optimizer.param_groups] == [["weight"], ["bias"]]
        assert optimizer.param_groups[1]["weight_decay"] == 0
    assert [group["lr"] for group in groups] == [0.25, 0.25]
    assert groups[-1] == groups[:][1]


def without_decay(model, no_decay):
    return {
        n
        for n, decay in by_name(param_groups(model, weight_decay=0.1, no_decay=no_decay), "weight_decay").items()
        if decay == 0
    }


def test_no_decay():
    model = Network()
    names = {name for name, _ in model.named_parameters()}
    norms = {n for n in names if "norm" in n}
    biases = {n for n in names if "bias" in n and "norm" not in n}
    assert {"blocks.0.attention.bias_k", "blocks.0.attention.in_proj_bias", "head.bias"} <= biases
    assert without_decay(model, "bias,norm") == norms | biases
    assert without_decay(model, "norm") == norms
    assert without_decay(model, ("bias",)) == biases
    assert without_decay(model, "") == without_decay(model, []) == set()
    assert without_decay(model, "embedding") == {"embedding.weight"}
    assert without_decay(model, "vector") == {n for n, p in model.named_parameters() if max(p.shape) == p.numel()}
    assert without_decay(model, "blocks.0, head.weight") == {n for n in names if "blocks.0" in n} | {"embedding.weight"}
    assert without_decay(model, [re.compile(r"\.[12]\..*weight$")]) == {
        n for n in names if n.endswith("weight") and ("blocks.1." in n or "blocks.2." in n or "feed.1" in n)
    }


def test_no_decay_of_our_modules():
    model = torch_bp.nn.MLP([4, 8, 2], norm="batch")
    assert without_decay(model, "bias,norm") == {n for n, p in model.named_parameters() if p.dim() == 1}


def test_rates_by_pattern():
    rates = by_name(param_groups(Network(), lr={re.compile("norm"): 1.0, "blocks.*.feed": 2.0, "head": 3.0}), "lr")
    assert rates["norm.bias"] == rates["blocks.1.norm.gain"] == 1.0
    assert rates["blocks.2.feed.0.bias"] == 2.0
    assert rates["head.bias"] == rates["embedding.weight"] == 3.0  # tied: any of its names
    assert rates["position"] is None


def test_layers():
    rates = by_name(param_groups(Network(), lr=1.0, layer_decay=0.5), "lr")
    assert rates["position"] == rates["embedding.weight"] == 0.5**4
    assert [rates[f"blocks.{i}.feed.1.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert rates["norm.weight"] == rates["blocks.2.norm.gain"]
    assert rates["head.bias"] == 1
    layers = [torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.ReLU(), torch.nn.Linear(2, 2)]
    rates = by_name(param_groups(torch.nn.Sequential(*layers), lr=1.0, layer_decay=0.5), "lr")
    assert [rates[f"{i}.weight"] for i in (0, 1, 3)] == [0.5, 0.5, 1]
    rates = by_name(param_groups(torch.nn.Linear(2, 2), lr=1.0, layer_decay=0.5), "lr")
    assert rates == {"weight": 1, "bias": 1}


class Pair(torch.nn.Sequential):
    """A block of its own class."""


def test_layers_of_stacks_in_stacks():
    """They are those of one stack; a block is a class."""

    def linear():
        return torch.nn.Linear(2, 2)

    def depths(model):
        rates = by_name(param_groups(model, lr=1.0, layer_decay=0.5), "lr")
        return [rates[name] for name, _ in model.named_parameters() if name.endswith("weight")]

    stack, modules = torch.nn.Sequential, torch.nn.ModuleList
    flat = stack(linear(), torch.nn.BatchNorm1d(2), torch.nn.ReLU(), linear(), linear(), linear())
    assert depths(flat) == [0.125, 0.125, 0.25, 0.5, 1]
    for body in (stack(*flat[:5]), modules(flat[:5]), stack(stack(*flat[:2]), stack(stack(*flat[2:4]), *flat[4:5]))):
        assert depths(stack(body, flat[5])) == [0.125, 0.125, 0.25, 0.5, 1]
    model = torch.nn.Module()
    model.stages, model.head = modules([stack(linear(), linear()), stack(), stack(linear())]), linear()
    assert depths(model) == [0.125, 0.25, 0.5, 1]
    assert depths(stack(Pair(linear(), linear()), stack(Pair(linear(), stack(linear())), linear()))) == [
        *(0.25, 0.25),
        *(0.5, 0.5),
        1,
    ]
    assert depths(Pair(Pair(linear(), linear()), linear())) == [0.5, 0.5, 1]


def test_depth_by_a_function():
    rates = by_name(param_groups(Network(), lr=1.0, layer_decay=0.1, depth=lambda name: int("head" in name)), "lr")
    assert rates["head.bias"] == 1
    assert rates["norm.bias"] == 0.1


def test_the_table():
    text = str(param_groups(Network(), lr={"head.bias": 0.1}, weight_decay=0.5))
    head, *rows = text.splitlines()
    assert head.split() == ["group", "lr", "weight_decay", "tensors", "elements", "parameters"]
    assert rows[0].startswith("0      default  0.5 ")
    assert "position, embedding.weight, blocks.0.attention.in_proj_weight and 11 more" in rows[0]
    assert rows[-1].split() == ["2", "0.1", "0", "1", "7", "head.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": {"haed": 1.0}}, "lr must have patterns that match a parameter, got 'haed'; the nearest names are head"),
        ({"lr": {re.compile("^x$"): 1.0}}, r"got '\^x\$'; names are like position, embedding.weight"),
        (
            {"no_decay": "bias,norms"},
            "no_decay must have .*, got 'norms'; the nearest names are norm.*; the words are bias, norm, embed",
        ),
        ({"lr": {"*": 1.0, "head": 2.0}}, "got 'head' after patterns that match all it does; put it before them"),
        ({"lr": {"head": -1.0}}, "lr of 'head' must be at least 0 and finite, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite, got nan"),
        ({"layer_decay": 0.0, "lr": 1.0}, "layer_decay must be above 0 and at most 1, got 0.0"),
        ({"layer_decay": 0.5}, "lr must be given for every parameter with layer_decay, got none for position"),
        ({"depth": len}, "depth must be given with layer_decay"),
        ({"lr": 1.0, "layer_decay": 0.5, "depth": lambda name: -1}, "depth must give an int of at least 0, got -1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"^param_groups: .*{message}"):
        param_groups(Network(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weight_decay": {"head": 0.1}},
            "weight_decay must be a number, got {'head': 0.1}; rates by pattern are for lr",
        ),
        ({"lr": "0.1"}, r"lr of '\*' must be a number, got '0.1'"),
        ({"lr": {"head": None}}, "lr of 'head' must be a number, got None"),
        ({"lr": True}, r"lr of '\*' must be a number, got True"),
    ],
)
def test_what_is_no_number(options, message):
    with pytest.raises(TypeError, match=f"^param_groups: {message}"):
        param_groups(Network(), **options)


def test_numbers_are_near_to_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for pattern in ("11", "l1"):
        with pytest.raises(ValueError, match=f"got '{pattern}'; names are like 0.weight, 0.bias, 1.weight"):
            param_groups(model, lr={pattern: 1.0})


def test_compiled_models():
    """Whole or in part: patterns see the names of before, groups have those of `named_parameters`."""
    model = Network()
    expected = param_groups(model, lr={"blocks.1": 0.2, "*": 0.3}, no_decay=["head", re.compile("^norm")])
    model.blocks[1].compile()  # in place, which changes no name
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    compiled = torch.compile(model, backend="eager")
    groups = param_groups(compiled, lr={"blocks.1": 0.2, "*": 0.3}, no_decay=["head", re.compile("^norm")])
    names = {name for name, _ in compiled.named_parameters()}
    assert {name for group in groups for name, _ in group["params"]} == names
    assert any("_orig_mod.blocks.1._orig_mod" in name for name in names)
    assert [[p for _, p in group.pop("params")] for group in groups] == [[p for _, p in g["params"]] for g in expected]
    linears = [torch.nn.Linear(2, 2) for _ in range(3)]
    stack = torch.compile(torch.nn.Sequential(*linears[:2]), backend="eager")
    seen = []
    groups = param_groups(torch.nn.Sequential(stack, linears[2]), lr=1.0, layer_decay=0.5, no_decay="")
    assert [group["lr"] for group in groups] == [0.25, 0.5, 1]
    param_groups(stack, lr=1.0, layer_decay=0.5, depth=lambda name: seen.append(name) or 0)
    assert seen == ["0.weight", "0.bias", "1.weight", "1.bias"]
    with pytest.raises(ValueError, match="the nearest names are head"):
        param_groups(compiled, lr={"haed": 1.0})


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        param_groups([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match="strings or compiled regular expressions, got 3"):
        param_groups(Network(), no_decay=[3])
    with pytest.raises(ValueError, match=r"got the lazy 0.weight; run the model once before"):
        param_groups(torch.nn.Sequential(torch.nn.LazyLinear(3)))
    assert len(param_groups(torch.nn.ReLU(), lr=1.0)) == 0
