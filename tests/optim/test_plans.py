"""What an optimizer remembers between steps never survives a change of what it remembers."""

import pytest
import torch

from tests.optim.table import PAIRS, SHAPES, parameters, train
from torch_bp.kernels import Table, use

EXACT = {"rtol": 1e-12, "atol": 1e-13}


def swap_data(params, optimizer):
    for p in params:
        p.data = p.data.clone() * 2


def transpose_data(params, optimizer):
    """Same address, other strides."""
    params[3].data = params[3].data.t().contiguous().t()


def transpose_in_place(params, optimizer):
    """The very same tensor at the same address, with other strides."""
    params[3].data.t_()
    params[3].data = params[3].data.t().clone().t()


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


def write_step_unseen(params, optimizer):
    """As numpy writes: no version counter tells."""
    for p in params[:2]:
        if "step" in optimizer.state[p]:
            optimizer.state[p]["step"].numpy()[...] = 7


def move_state_data(params, optimizer):
    """The same state tensors, other memory: what offloading to another device and back does."""
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone() + 1


def swap_parameter(params, optimizer):
    """The same parameter, another tensor behind it: what `module.to` does under swap_module_params_on_conversion."""
    for p in params:
        p.grad = None
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone() * 2))


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


def no_momentum(params, optimizer):
    """Another layout of state."""
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = 0.0


def replace_parameter(params, optimizer):
    """In the very list that the group holds."""
    params[1] = optimizer.param_groups[0]["params"][1] = torch.nn.Parameter(params[1].detach().clone() * 2)


CHANGES = [
    no_momentum,
    replace_parameter,
    swap_data,
    transpose_data,
    transpose_in_place,
    replace_state,
    replace_state_tensor,
    write_step,
    write_one_step,
    write_step_unseen,
    move_state_data,
    swap_parameter,
    clear_state,
    reload_state,
    new_group,
    other_rate,
    freeze,
    other_order,
]
OPTIONS = {name: {"momentum": 0.9} if name in ("SGD", "RMSprop") else {} for name in PAIRS}


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
    reloaded = name == "NAdam" and change is reload_state  # torch goes on in float64 with a product of float32
    torch.testing.assert_close(results[0][0], results[1][0], **({"rtol": 1e-10, "atol": 1e-11} if reloaded else EXACT))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_every_step_counts_as_a_write_and_asks_for_the_engine(name):
    params = parameters()
    optimizer = PAIRS[name][0](params, **OPTIONS[name])
    train(optimizer, params, 5)
    assert optimizer._plan.again
    before = [p._version for p in params]
    train(optimizer, params, 1)
    assert [p._version for p in params] == [version + 1 for version in before]
    with use("torch"):
        train(optimizer, params, 1)
    assert not optimizer._plan.again


GRADIENTS = {
    "transposed": lambda p: torch.randn(p.shape[::-1], dtype=p.dtype).t() if p.dim() == 2 else torch.randn_like(p),
    "expanded": lambda p: torch.randn((), dtype=p.dtype).expand(p.shape),
    "sliced": lambda p: torch.randn(*p.shape, 2, dtype=p.dtype)[..., 0],
    "zero tensor": lambda p: torch._efficientzerotensor(p.shape, dtype=p.dtype),
    "negative bit": lambda p: torch.randn(p.shape, dtype=torch.complex128).conj().imag,
    "a view of one buffer": lambda p: torch.randn(4000, dtype=p.dtype)[: p.numel()].view(p.shape),
}


@pytest.mark.parametrize("shapes", [SHAPES, [(3, 4), (5,)], [(6, 1), (1, 6)], [()], [(1,)]], ids=str)
@pytest.mark.parametrize("kind_of_gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_unusual_gradients(name, kind_of_gradient, shapes):
    results = []
    for kind in PAIRS[name]:
        params = parameters(shapes=shapes)
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


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_gradient_that_comes_to_share_memory_with_another_parameter(name):
    results = []
    for kind in PAIRS[name]:
        a, b = parameters(shapes=[(40, 50), (40, 50)])
        optimizer = kind([a, b], lr=0.1, **OPTIONS[name])
        train(optimizer, [a, b], 3)
        a.grad, b.grad = torch.ones_like(a), a.detach()  # b follows a after a's update, as torch updates in order
        optimizer.step()
        results.append([a, b])
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_table_refuses_what_would_be_read_while_it_is_written(offset):
    memory, other = torch.zeros(100), torch.zeros(10)
    params, table = [memory[40:50], other], Table()
    gradients = [torch.ones(10), torch.ones(10)]
    assert table.refresh([params, gradients], [True, False], 8)
    assert table.refresh([params, [torch.ones(10), gradients[1]]], [True, False], 8)
    shared = memory[40 + offset : 50 + offset]
    assert not table.refresh([params, [gradients[0], shared]], [True, False], 8), "another parameter's memory"
    assert table.refresh([params, gradients], [True, False], 8)
    assert table.refresh([params, [shared, gradients[1]]], [True, False], 8) == (offset == 0), (
        "its own, element by element"
    )


def signed(values):
    """The values, with their sign pending."""
    return torch.complex(torch.zeros(len(values)), -torch.tensor(values)).conj().imag


def test_a_pending_sign_is_seen():
    results = []
    for kind in PAIRS["SGD"]:
        p, q = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.tensor(0.0))
        optimizer = kind([p, q], lr=1.0)
        for _ in range(3):
            p.grad, q.grad = torch.zeros(4), torch.zeros(())
            optimizer.step()
        p.grad = signed([1.0, 2.0, 3.0, 4.0]).as_strided((4,), (1,))
        assert p.grad.is_neg()
        q.grad = signed([5.0])[0]
        optimizer.step()
        results.append([p, q])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_group_that_fails_leaves_the_next_one_as_it_was():
    results = []
    for kind in PAIRS["SGD"]:
        a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = kind([{"params": [a]}, {"params": [b]}], lr=0.1, momentum=0.9, dampening=0.5)
        a.grad, b.grad = torch.ones(3), torch.ones(3)
        optimizer.param_groups[0]["lr"] = "x"
        with pytest.raises(TypeError):
            optimizer.step()
        assert not optimizer.state[b]
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        results.append([a, b])
    torch.testing.assert_close(*results)


def test_a_refused_sparse_gradient_changes_nothing():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = PAIRS["Adam"][0]([a, b])
    a.grad, b.grad = torch.ones(3), torch.ones(3, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert a.eq(1).all()
    assert not optimizer.state[a]


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_an_odd_gradient_leaves_the_others_to_the_kernel(name):
    results = []
    for kind in PAIRS[name]:
        params = parameters(shapes=[(4, 5), (6,), (7,)])
        optimizer = kind(params, lr=0.1, **OPTIONS[name])
        for step in range(6):
            train(optimizer, params, 1, seed=step)
            params[0].grad = params[0].grad.t().contiguous().t()
            optimizer.step()
            optimizer.step()
        results.append(params)
        if kind is PAIRS[name][0]:
            (bucket,) = optimizer._plan.shares[0].buckets
            assert bucket.positions == [1, 2]
    torch.testing.assert_close(*results, **EXACT)


def test_a_change_in_one_group_keeps_the_plan_of_another():
    params = parameters(shapes=[(4,), (5,), (6,)])
    optimizer = PAIRS["Adam"][0]([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, 3)
    kept = optimizer._plan.shares[0]
    train(optimizer, params, 8, missing=2)
    assert optimizer._plan.shares[0] is kept


def test_state_cannot_be_swapped_unseen():
    params = parameters()
    optimizer = PAIRS["Adam"][0](params)
    train(optimizer, params, 3)
    average = optimizer.state[params[0]]["exp_avg"]
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(average, torch.zeros_like(average))


def test_without_torchs_functions_every_step_looks_anew(monkeypatch):
    from torch_bp.kernels import native

    monkeypatch.setattr(native, "functions", lambda: None)
    results = []
    for kind in PAIRS["Adam"]:
        params = parameters()
        optimizer = kind(params)
        train(optimizer, params, 6, missing=1)
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


@pytest.mark.parametrize("name", PAIRS)
def test_a_parameter_that_changes_shape_or_strides_at_its_address(name):
    """With gradients of the old layout kept, as zero_grad(set_to_none=False) keeps them."""
    results = []
    for kind in PAIRS[name]:
        p = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        optimizer = kind([p], **OPTIONS[name])
        for step in range(4):
            p.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
            if step == 2:
                p.data = p.data.t()
            optimizer.step()
        results.append(p)
    torch.testing.assert_close(*results, **EXACT)
    memory = torch.ones(4)
    p = torch.nn.Parameter(memory)
    optimizer = PAIRS[name][0]([p])
    p.grad = torch.ones(4)
    optimizer.step(), optimizer.step()
    before, p.data = memory.clone(), memory[:2]
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()
    torch.testing.assert_close(memory, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_momentum_is_not_dampened_on_any_way(dtype):
    results = []
    for kind in PAIRS["SGD"]:
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = kind([p], lr=0.1, momentum=0.9, dampening=0.5)
        with use("torch"):
            for _ in range(3):
                p.grad = torch.ones(3, dtype=dtype)
                optimizer.step()
        results.append(p)
    torch.testing.assert_close(*results)


def test_a_step_that_fails_has_not_happened():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = PAIRS["Adam"][0]([p])
    p.grad = torch.ones(3)
    optimizer.param_groups[0]["betas"] = ("a", "b")
    with pytest.raises(TypeError):
        optimizer.step()
    assert p.eq(1).all()
    assert not optimizer.state[p]


@pytest.mark.parametrize("name", PAIRS)
def test_in_inference_mode(name):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = PAIRS[name][0]([p], **OPTIONS[name])
    p.grad = torch.ones(3)
    with torch.inference_mode():
        optimizer.step(), optimizer.step()
    assert p.lt(1).all()
