"""What an optimizer remembers between steps never survives a change of what it remembers."""

import pytest
import torch

from tests.optim.table import PAIRS, parameters, train

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def swap_data(params, optimizer):
    for p in params:
        p.data = p.data.clone() * 2


def transpose_data(params, optimizer):
    """Same address, other strides."""
    params[3].data = params[3].data.t().contiguous().t()


def replace_state(params, optimizer):
    state = optimizer.state[params[0]]
    optimizer.state[params[0]] = {k: v.clone() * 3 if v.dim() else v.clone() for k, v in state.items()}


def replace_state_tensor(params, optimizer):
    for key, value in list(optimizer.state[params[3]].items()):
        optimizer.state[params[3]][key] = value.clone() + 1


def write_step(params, optimizer):
    for p in params:
        if "step" in optimizer.state[p]:
            optimizer.state[p]["step"].fill_(3)


def write_one_step(params, optimizer):
    if "step" in optimizer.state[params[0]]:
        optimizer.state[params[0]]["step"].add_(5)


def clear_state(params, optimizer):
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def reload_state(params, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def new_group(params, optimizer):
    added = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))
    params.append(added)
    optimizer.add_param_group({"params": [added], "lr": 0.5})


def other_rate(params, optimizer):
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
        group["weight_decay"] = 0.1


def freeze(params, optimizer):
    params[0].grad = None
    params[0].requires_grad_(False)


def other_order(params, optimizer):
    optimizer.param_groups[0]["params"].reverse()


CHANGES = [
    swap_data,
    transpose_data,
    replace_state,
    replace_state_tensor,
    write_step,
    write_one_step,
    clear_state,
    reload_state,
    new_group,
    other_rate,
    freeze,
    other_order,
]
OPTIONS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}, "Adagrad": {}, "Adam": {}, "AdamW": {}}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", PAIRS)
def test_a_change_in_mid_training(name, change):
    results = []
    for kind in PAIRS[name]:
        params = parameters()
        optimizer = kind(params, **OPTIONS[name])
        train(optimizer, params, 4)
        change(params, optimizer)
        train(optimizer, [p for p in params if p.requires_grad], 4, seed=2)
        results.append((params, optimizer))
    torch.testing.assert_close(results[0][0], results[1][0], **EXACT)


GRADIENTS = {
    "transposed": lambda p: torch.randn(p.shape[::-1], dtype=p.dtype).t() if p.dim() == 2 else torch.randn_like(p),
    "expanded": lambda p: torch.randn((), dtype=p.dtype).expand(p.shape),
    "sliced": lambda p: torch.randn(*p.shape, 2, dtype=p.dtype)[..., 0],
    "zero tensor": lambda p: torch._efficientzerotensor(p.shape, dtype=p.dtype),
    "negative bit": lambda p: torch._neg_view(torch.randn_like(p)),
    "a view of one buffer": lambda p: torch.randn(4000, dtype=p.dtype)[: p.numel()].view(p.shape),
}


@pytest.mark.parametrize("kind_of_gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_unusual_gradients(name, kind_of_gradient):
    results = []
    for kind in PAIRS[name]:
        params = parameters()
        optimizer = kind(params)
        torch.manual_seed(0)
        for step in range(6):
            for p in params:
                plain = torch.randn_like(p)
                p.grad = GRADIENTS[kind_of_gradient](p.detach()) if step % 2 else plain
            before = [p.grad.clone() for p in params]
            optimizer.step()
            torch.testing.assert_close([p.grad.clone() for p in params], before, rtol=0, atol=0)
        results.append(params)
    torch.testing.assert_close(*results, **EXACT)


def test_gradients_are_not_kept_alive():
    import weakref

    params = parameters()
    optimizer = PAIRS["Adam"][0](params)
    train(optimizer, params, 3)
    old = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert all(reference() is None for reference in old)
