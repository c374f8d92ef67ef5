"""Checkpoints between optimizers: engine flags stay, and by name everything finds its place or nothing is changed."""

import copy
import inspect
import pickle

import pytest
import torch

import torch_bp.optim
from tests.optim.table import PAIRS, parameters, train
from torch_bp.optim import load_state_dict_by_name, param_groups
from torch_bp.optim.loading import load_state_dict
from torch_bp.optim.state_names import names_of_state

EACH = pytest.mark.parametrize("name", PAIRS)
FUSED = pytest.mark.parametrize(
    "name", [n for n, (kind, _) in PAIRS.items() if "fused" in inspect.signature(kind).parameters]
)
SAME = {"rtol": 0, "atol": 0}


def test_every_optimizer_of_ours_loads_in_this_way():
    kinds = [v for v in vars(torch_bp.optim).values() if isinstance(v, type) and hasattr(v, "state_layout")]
    assert len(kinds) > len(PAIRS)
    own = {kind for kind in kinds if kind.load_state_dict is not load_state_dict}
    assert own == {torch_bp.optim.NAdam}  # which calls it


def trained(kind, **options):
    params = parameters()
    optimizer = kind(params, **options)
    train(optimizer, params, 3)
    return optimizer


@FUSED
@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("source", [0, 1], ids=["ours", "torch's"])
def test_flags_stay_as_built(name, flag, source):
    saved = trained(PAIRS[name][source], lr=0.5, weight_decay=0.2, **{flag: True}).state_dict()
    before = copy.deepcopy(saved["param_groups"])
    ours = PAIRS[name][0](parameters(), weight_decay=0.1)
    with pytest.warns(UserWarning, match=rf"{name}.load_state_dict: .*got {flag}=True where it has None") as caught:
        ours.load_state_dict(saved)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    (group,) = ours.param_groups
    assert group[flag] is None
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.2)
    assert saved["param_groups"] == before
    kept = PAIRS[name][0](parameters(), **{flag: True})
    kept.load_state_dict(saved)  # no warning: the same
    assert kept.param_groups[0][flag] is True


@pytest.mark.parametrize("name", [n for n in PAIRS if n != "Lion"])  # which is not torch's, and has no flags
def test_torch_takes_the_flags_of_ours(name):
    """In torch's own way: they replace those it was built with."""
    theirs = PAIRS[name][1](parameters(), foreach=False)
    theirs.load_state_dict(trained(PAIRS[name][0], foreach=True).state_dict())
    assert theirs.param_groups[0]["foreach"] is True


def test_old_checkpoints_without_flags():
    saved = trained(torch.optim.Adam).state_dict()
    for flag in ("foreach", "fused", "capturable"):
        del saved["param_groups"][0][flag]
    ours = torch_bp.optim.Adam(parameters(), fused=True)
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["fused"] is True
    assert ours.param_groups[0]["capturable"] is False


def test_hooks_see_the_loading_and_none_is_left():
    ours, called = torch_bp.optim.Adam(parameters()), []
    ours.register_load_state_dict_pre_hook(lambda o, state: called.append("pre") or {**state, "param_groups": fused})
    ours.register_load_state_dict_post_hook(lambda o: called.append("post"))
    saved = trained(torch.optim.Adam).state_dict()
    fused = [{**saved["param_groups"][0], "fused": True}]
    with pytest.warns(UserWarning, match="fused=True"):
        ours.load_state_dict(saved)
    assert called == ["pre", "post"]
    assert ours.param_groups[0]["fused"] is None
    with pytest.raises(ValueError, match="different number of parameter groups"):
        torch_bp.optim.SGD(parameters()).load_state_dict({"state": {}, "param_groups": []})
    assert len(ours._optimizer_load_state_dict_pre_hooks) == 1


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2)).double()


def step(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    model(torch.randn(5, 4, generator=generator, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


# torch's NAdam casts its product of momenta to the dtype of the parameters, and goes on a little elsewhere
@pytest.mark.parametrize(
    ("name", "library"), [(name, k) for name in PAIRS for k in (0, 1) if (name, k) != ("NAdam", 1)]
)
def test_other_order_and_other_groups_train_on_as_before(name, library):
    kind = PAIRS[name][library]
    reference = network()
    options = {"momentum": 0.9} if name == "SGD" else {}
    uninterrupted = kind(reference.named_parameters(), lr=0.05, weight_decay=0.01, **options)
    for number in range(3):
        step(reference, uninterrupted, number)
    model = copy.deepcopy(reference)
    named = [*model.named_parameters()][::-1]
    resumed = kind([{"params": named[:2]}, {"params": named[2:], "lr": 0.5}])
    report = load_state_dict_by_name(resumed, copy.deepcopy(uninterrupted.state_dict()))
    assert not report
    for number in range(3, 6):
        step(reference, uninterrupted, number)
        step(model, resumed, number)
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()), **SAME)
    assert [group["param_names"] for group in resumed.param_groups] == [
        [n for n, _ in named[:2]],
        [n for n, _ in named[2:]],
    ]


def test_groups_made_by_param_groups():
    model = network()
    optimizer = torch_bp.optim.AdamW(param_groups(model, lr=0.1))
    step(model, optimizer, 0)
    other = torch_bp.optim.AdamW(param_groups(model, layer_decay=0.5, lr=1.0))  # four groups for two
    assert not load_state_dict_by_name(other, optimizer.state_dict())
    assert {group["lr"] for group in other.param_groups} == {0.1}


def test_names_given_by_the_model():
    model = network()
    optimizer = torch_bp.optim.Adam(model.named_parameters())
    step(model, optimizer, 0)
    unnamed = torch_bp.optim.Adam(reversed(list(model.parameters())))
    with pytest.raises(ValueError, match="must know the names of its parameters, got one built without; give model="):
        load_state_dict_by_name(unnamed, optimizer.state_dict())
    assert not load_state_dict_by_name(unnamed, optimizer.state_dict(), model=model)
    assert unnamed.state_dict()["param_groups"][0]["param_names"][0] == "2.bias"
    torch.testing.assert_close(unnamed.state[model[0].weight], optimizer.state[model[0].weight], **SAME)
    with pytest.raises(ValueError, match="must have all parameters of the optimizer, got one without 4 of them"):
        load_state_dict_by_name(unnamed, optimizer.state_dict(), model=model[0])


def test_state_keyed_by_names():
    """As `torch.distributed.checkpoint.state_dict` gives it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = network()
    optimizer = torch_bp.optim.Adam(model.parameters(), lr=0.25)
    step(model, optimizer, 0)
    other = torch_bp.optim.Adam(model.named_parameters())
    assert not load_state_dict_by_name(other, get_optimizer_state_dict(model, optimizer))
    torch.testing.assert_close(dict(other.state), dict(optimizer.state), **SAME)
    assert other.param_groups[0]["lr"] == 0.25


def changed():
    """A model that has a layer more, lacks one, and has one of another shape; its optimizer; and a saved state."""
    model = network()
    optimizer = torch_bp.optim.Adam(model.named_parameters(), lr=0.5)
    step(model, optimizer, 0)
    state = optimizer.state_dict()
    model[1], model[2] = torch.nn.Identity(), torch.nn.Linear(3, 7)
    model.append(torch.nn.Linear(7, 1))
    model.double()
    other = torch_bp.optim.Adam(model.named_parameters(), lr=0.1)
    step(model, other, 1)
    return model, other, state


def test_strict_changes_nothing():
    _, other, state = changed()
    before = pickle.dumps(other.state_dict())
    with pytest.raises(RuntimeError) as caught:
        load_state_dict_by_name(other, state)
    assert str(caught.value) == (
        "Error(s) in loading state_dict for Adam:\n"
        "\tMissing in the state: 3.weight, 3.bias.\n"
        "\tUnexpected in the state: 1.bias, 1.weight.\n"
        "\tSize mismatch for 2.weight: exp_avg of shape (2, 3) in the state, (7, 3) in the optimizer.\n"
        "\tSize mismatch for 2.bias: exp_avg of shape (2,) in the state, (7,) in the optimizer.\n"
        "strict=False loads what matches."
    )
    assert pickle.dumps(other.state_dict()) == before


def test_not_strict_loads_what_matches():
    model, other, state = changed()
    kept = copy.deepcopy([dict(other.state[p]) for p in (*model[2].parameters(), *model[3].parameters())])
    report = load_state_dict_by_name(other, state, strict=False)
    assert report
    assert (report.missing, report.unexpected) == (["3.weight", "3.bias"], ["1.bias", "1.weight"])
    assert set(report.mismatched) == {"2.weight", "2.bias"}
    assert torch.equal(other.state[model[0].weight]["exp_avg"], state["state"][0]["exp_avg"])
    left = [dict(other.state[p]) for p in (*model[2].parameters(), *model[3].parameters())]
    torch.testing.assert_close(left, kept, **SAME)
    assert other.param_groups[0]["lr"] == 0.5
    step(model, other, 2)


def test_groups_that_were_several():
    model = network()
    groups = [{"params": [pair], "lr": 0.1 * number} for number, pair in enumerate(model.named_parameters())]
    state = torch_bp.optim.SGD(groups).state_dict()
    one = torch_bp.optim.SGD(model.named_parameters(), lr=0.7)
    with pytest.raises(RuntimeError, match="Group 0 has parameters of several groups that differ in lr"):
        load_state_dict_by_name(one, state)
    assert load_state_dict_by_name(one, state, strict=False).mixed_groups == {0: "lr"}
    assert one.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "Adam", "SGD"])
def test_numbers_beside_averages(name):
    """They have no shape of their own; a state of a single number is not that of a vector."""
    states = []
    for size in ((), (3,)):
        p = torch.nn.Parameter(torch.ones(size))
        optimizer = getattr(torch.optim, name)([("p", p)], **({"momentum": 0.9} if name == "SGD" else {}))
        p.square().sum().backward()
        optimizer.step()
        states.append(optimizer.state_dict())
    fresh = getattr(torch.optim, name)([("p", torch.nn.Parameter(torch.ones(3)))])
    assert not load_state_dict_by_name(fresh, states[1])
    fresh = getattr(torch.optim, name)([("p", torch.nn.Parameter(torch.ones(3)))])
    with pytest.raises(RuntimeError, match="Size mismatch for p"):
        load_state_dict_by_name(fresh, states[0])


def test_names_that_are_lacking_or_double():
    model = network()
    optimizer = torch_bp.optim.Adam(model.named_parameters())
    state = torch_bp.optim.Adam(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="state_dict must name its parameters, got group 0 without"):
        load_state_dict_by_name(optimizer, state)
    state["param_groups"][0]["param_names"] = ["a"] * 6
    with pytest.raises(ValueError, match="names in state_dict must be unique, got a again"):
        load_state_dict_by_name(optimizer, state)


def test_groups_do_not_share_a_rate_in_a_tensor():
    model = torch.nn.Linear(2, 2)
    saved = torch_bp.optim.SGD(model.named_parameters(), lr=torch.tensor(0.1)).state_dict()
    groups = [{"params": [named]} for named in model.named_parameters()]
    optimizer = torch_bp.optim.SGD(groups, lr=torch.tensor(0.2))
    load_state_dict_by_name(optimizer, saved)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first is not second
    assert first == second == torch.tensor(0.1)


class Factored(torch.optim.Optimizer):
    """An optimizer whose states are of other shapes than the parameters: sums over an axis, and parts of all."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            state["rows"], state["exp_avg"] = p.grad.reshape(len(p), -1).sum(1), p.grad.clone()
            if p.dim() > 1:
                state["columns"] = p.grad.sum(0)
            state["step"] = torch.tensor(1.0)


class Rows(Factored):
    """Of a square matrix, all its states have one shape, with fewer axes."""

    def step(self):
        super().step()
        for state in self.state.values():
            del state["exp_avg"]


def stepped(kind, rows=3, columns=4, seed=0, **options):
    torch.manual_seed(seed)
    model = torch.nn.Linear(columns, rows)
    optimizer = kind(model.named_parameters(), **options)
    model(torch.randn(5, columns)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (1, 4), (1, 1)])
def test_adafactor(size, begun):
    assert torch_bp.optim.Adafactor is torch.optim.Adafactor
    _, optimizer = stepped(torch.optim.Adafactor, *size)
    state = optimizer.state_dict()
    if begun:
        model, other = stepped(torch.optim.Adafactor, *size, seed=1)
    else:
        model = torch.nn.Linear(*size[::-1])
        other = torch.optim.Adafactor([*model.named_parameters()][::-1])
    report = load_state_dict_by_name(other, state)
    assert not report
    assert not report.unchecked
    torch.testing.assert_close([dict(other.state[p]) for p in model.parameters()], [*state["state"].values()], **SAME)
    model(torch.ones(2, size[1])).sum().backward()
    other.step()


@pytest.mark.parametrize(
    ("size", "wrong"),
    [
        ((7, 4), "row_var of shape (3, 1) in the state, (7, 1) in the optimizer"),
        ((3, 7), "col_var of shape (1, 4) in the state, (1, 7) in the optimizer"),
    ],
)
def test_adafactor_of_another_shape(size, wrong):
    _, optimizer = stepped(torch.optim.Adafactor)
    other = torch.optim.Adafactor(torch.nn.Linear(*size[::-1]).named_parameters())
    assert load_state_dict_by_name(other, optimizer.state_dict(), strict=False).mismatched["weight"] == wrong
    vector = torch.optim.Adafactor([("weight", torch.nn.Parameter(torch.ones(3)))])
    assert "row_var" in load_state_dict_by_name(vector, optimizer.state_dict(), strict=False).mismatched["weight"]


@pytest.mark.parametrize(("kind", "size"), [(Factored, (3, 4)), (Rows, (3, 4)), (Rows, (3, 3))])
def test_states_of_unknown_shapes_are_loaded_and_reported(kind, size):
    model, optimizer = stepped(kind, *size)
    state = optimizer.state_dict()
    fresh = kind(model.named_parameters())
    report = load_state_dict_by_name(fresh, state)
    assert not report
    assert report.unchecked == {"weight": f"rows of shape ({size[0]},), columns of shape ({size[1]},)"}
    assert str(report) == f"Loaded unchecked for weight: {report.unchecked['weight']}."
    torch.testing.assert_close(dict(fresh.state[model.weight]), state["state"][0], **SAME)
    _, begun = stepped(kind, *size, seed=1)
    assert not load_state_dict_by_name(begun, state).unchecked  # the states in place tell the shapes
    _, begun = stepped(kind, 7, size[1])
    with pytest.raises(RuntimeError, match="Size mismatch for weight: rows of shape"):
        load_state_dict_by_name(begun, state)


def test_states_of_the_old_shape_of_a_parameter_are_refused_for_any_optimizer():
    """Where all are of one shape, with as many axes as the parameter has."""

    class Own(torch.optim.Adam):
        pass

    _, optimizer = stepped(Own)
    fresh = Own(torch.nn.Linear(4, 7).named_parameters())
    with pytest.raises(RuntimeError, match=r"exp_avg of shape \(3, 4\) in the state, \(7, 4\) in the optimizer"):
        load_state_dict_by_name(fresh, optimizer.state_dict())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_sparse_buffer_of_torchs_goes_on_dense(nesterov, by_name):
    results = []
    for kind in PAIRS["SGD"]:
        torch.manual_seed(0)
        table = torch.nn.Embedding(6, 3, sparse=True)
        before, after = (
            k(table.named_parameters(), lr=0.1, momentum=0.9, nesterov=nesterov) for k in (torch.optim.SGD, kind)
        )
        for number in range(5):
            table.zero_grad()
            table(torch.tensor([1, 1, number])).pow(2).sum().backward()
            (before if number < 2 else after).step()
            if number == 1:
                saved = copy.deepcopy(before.state_dict())
                load_state_dict_by_name(after, saved) if by_name else after.load_state_dict(saved)
                assert saved["state"][0]["momentum_buffer"].is_sparse, "what is loaded stays as it is"
        assert after.state[table.weight]["momentum_buffer"].is_sparse == (kind is torch.optim.SGD)
        results.append(table.weight.detach())
    torch.testing.assert_close(*results)


def test_state_that_is_no_parameters_is_loaded_as_it_is():
    saved = trained(torch_bp.optim.Adam).state_dict()
    saved["state"]["other"] = 3
    ours = torch_bp.optim.Adam(parameters())
    ours.load_state_dict(saved)
    assert ours.state["other"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [n for n in PAIRS if n != "Lion"])
def test_state_that_is_loaded_without_a_copy_is_shared(name, dtype):
    """All of it; torch converts NAdam's product where the parameter is not of single precision."""
    shared = []
    for kind in PAIRS[name]:
        params = parameters(dtype)
        first, second = kind(params), kind(params)
        train(first, params, 2)
        second.load_state_dict(first.state_dict())
        a, b = first.state[params[0]], second.state[params[0]]
        shared.append({key for key in a if a[key] is b[key]})
        everything = {*a}
    assert shared[0] == everything
    assert shared[1] >= everything - {"mu_product"}


def torchs():
    """Every optimizer of torch and of ours that steps on dense gradients by itself, and options that add a state."""
    options = {
        "SGD": [{}, {"momentum": 0.9}],
        "RMSprop": [{}, {"momentum": 0.9}, {"centered": True}],
        "Adam": [{}, {"amsgrad": True}],
        "AdamW": [{}, {"amsgrad": True}],
    }
    for name in [*torch.optim.__all__, "Lion"]:
        if name not in ("Optimizer", "LBFGS", "SparseAdam"):
            for kind in dict.fromkeys(getattr(m, name) for m in (torch_bp.optim, torch.optim) if hasattr(m, name)):
                yield from ((kind, each) for each in options.get(name, [{}]) if isinstance(kind, type))


def single(kind, steps=1, **options):
    """An optimizer of one matrix."""
    p = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = kind([("p", p)], **options)
    for _ in range(steps):
        p.grad = torch.ones(3, 3)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(("kind", "options"), [*torchs()], ids=lambda v: getattr(v, "__module__", "") + str(v))
def test_names_of_states_are_those_that_the_optimizer_makes(kind, options):
    p, optimizer = single(kind, **options)
    needed, known = names_of_state(optimizer, optimizer.param_groups[0])
    assert needed <= optimizer.state[p].keys() <= known
    _, fresh = single(kind, 0)
    assert not load_state_dict_by_name(fresh, optimizer.state_dict())  # with the options of the state
    _, begun = single(kind)
    assert not load_state_dict_by_name(begun, optimizer.state_dict())


@pytest.mark.parametrize("begun", [0, 1])
@pytest.mark.parametrize("library", [torch.optim, torch_bp.optim])
@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            ("SGD", {"momentum": 0.9}),
            "Adam",
            "State of another optimizer for p: momentum_buffer in the state, where the ",
        ),
        (("SGD", {}), "Adam", "Options of another optimizer for group 0: betas, eps lacking in the state"),
        (("Adam", {}), "SGD", "for p: exp_avg, exp_avg_sq, step in the state, where the optimizer has momentum_buffer"),
        (("Adam", {}), "NAdam", "has exp_avg, exp_avg_sq, mu_product, step"),
        (("NAdam", {}), "Adam", "for p: exp_avg, exp_avg_sq, mu_product, step in the state"),
        (("RMSprop", {}), "Adagrad", "for p: square_avg, step in the state, where the optimizer has step, sum"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(source, target, message, library, begun):
    state = single(getattr(library, source[0]), **source[1])[1].state_dict()
    p, optimizer = single(getattr(library, target), begun, lr=0.25)
    before = pickle.dumps(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        load_state_dict_by_name(optimizer, state)
    assert pickle.dumps(optimizer.state_dict()) == before
    report = load_state_dict_by_name(optimizer, state, strict=False)
    assert report.other_states or report.other_options
    p.grad = torch.ones(3, 3)
    optimizer.step()  # what does not match has stayed


def test_a_state_without_a_needed_one_is_refused():
    state = single(torch_bp.optim.Adam)[1].state_dict()
    state["param_groups"][0]["amsgrad"] = True
    _, optimizer = single(torch_bp.optim.Adam, 0)
    with pytest.raises(RuntimeError, match="where the optimizer has exp_avg, exp_avg_sq, max_exp_avg_sq, step"):
        load_state_dict_by_name(optimizer, state)


def test_an_unknown_optimizer_that_has_begun_refuses_other_names():
    _, begun = stepped(Factored)
    state = stepped(torch.optim.SGD, momentum=0.9)[1].state_dict()
    with pytest.raises(RuntimeError, match="State of another optimizer for weight: momentum_buffer"):
        load_state_dict_by_name(begun, state)


def prefixed(state, prefix):
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group["param_names"] = [prefix + name for name in group["param_names"]]
    return state


@pytest.mark.parametrize("prefix", ["module.", "net.model."])
def test_names_that_differ_by_a_prefix(prefix):
    model = network()
    optimizer = torch_bp.optim.Adam(model.named_parameters())
    step(model, optimizer, 0)
    state = optimizer.state_dict()
    wrapped = torch_bp.optim.Adam([(prefix + name, p) for name, p in model.named_parameters()])
    for target, source in ((wrapped, state), (torch_bp.optim.Adam(model.named_parameters()), prefixed(state, prefix))):
        with pytest.raises(RuntimeError, match=f"Names differ by the prefix '{prefix}': give strip_prefix='{prefix}'"):
            load_state_dict_by_name(target, source)
        names = target.param_groups[0]["param_names"]
        assert not load_state_dict_by_name(target, source, strip_prefix=prefix)
        assert target.param_groups[0]["param_names"] == names
        torch.testing.assert_close(dict(target.state), dict(optimizer.state), **SAME)
    with pytest.raises(RuntimeError) as caught:
        load_state_dict_by_name(wrapped, prefixed(state, "x"))
    assert "prefix" not in str(caught.value)


def test_compiled_models_have_the_same_names():
    model = network()
    optimizer = torch_bp.optim.Adam(model.named_parameters())
    step(model, optimizer, 0)
    compiled = torch.compile(model, backend="eager")
    other = torch_bp.optim.Adam(compiled.named_parameters())
    assert not load_state_dict_by_name(other, optimizer.state_dict())
    assert other.param_groups[0]["param_names"][0] == "_orig_mod.0.weight"
    back = torch_bp.optim.Adam(model.named_parameters())
    assert not load_state_dict_by_name(back, other.state_dict())
    torch.testing.assert_close(dict(back.state), dict(optimizer.state), **SAME)


def test_arguments_of_another_kind():
    model = network()
    optimizer = torch_bp.optim.Adam(model.named_parameters())
    with pytest.raises(
        ValueError, match=r"the keys 'state' and 'param_groups', got '0.weight', .*a model's, or a whole"
    ):
        load_state_dict_by_name(optimizer, model.state_dict())
    with pytest.raises(TypeError, match=r"optimizer must be an optimizer, got dict\. The order is"):
        load_state_dict_by_name(optimizer.state_dict(), optimizer)
    with pytest.raises(TypeError, match="state_dict must be a dict, got Adam"):
        load_state_dict_by_name(optimizer, optimizer)
