"""What the optimizers offer beyond torch's, against the formula in operations of torch."""

import copy
import inspect

import pytest
import torch

from tests.optim.table import parameters, train
from torch_bp import optim
from torch_bp.kernels import use

EXACT = {"rtol": 1e-12, "atol": 1e-13}


class EpsInside(torch.optim.Optimizer):
    """RMSprop with sqrt(s + eps): the report's sec. 6.1 in operations of torch."""

    def __init__(self, params, lr, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False):
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "wd": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"centered": centered})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            alpha = group["alpha"]
            for p in group["params"]:
                state = self.state[p]
                for name in ("s", "a", "b"):
                    state.setdefault(name, torch.zeros_like(p))
                g = p.grad + group["wd"] * p
                state["s"] = alpha * state["s"] + (1 - alpha) * g.square()
                state["a"] = alpha * state["a"] + (1 - alpha) * g
                variance = state["s"] - state["a"].square() if group["centered"] else state["s"]
                state["b"] = group["momentum"] * state["b"] + g / torch.sqrt(variance + group["eps"])
                p -= group["lr"] * state["b"]


OPTIONS = [
    {"lr": 0.01},
    {"lr": 0.01, "eps": 0.1, "alpha": 0.9},
    {"lr": 0.01, "eps": 1e-3, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_eps_inside_sqrt(options, engine):
    trained = []
    for kind, more in ((optim.RMSprop, {"eps_inside_sqrt": True}), (EpsInside, {})):
        params = parameters()
        optimizer = kind(params, **options, **more)
        with use(engine):
            train(optimizer, params, 100)
        trained.append(params)
    torch.testing.assert_close(*trained, **EXACT)


def test_eps_inside_sqrt_is_a_key_only_where_it_is_true():
    params = parameters()
    plain, inside = optim.RMSprop(params), optim.RMSprop(params, eps_inside_sqrt=True)
    assert "eps_inside_sqrt" not in plain.param_groups[0] | plain.defaults
    assert inside.param_groups[0]["eps_inside_sqrt"] is True
    inside.add_param_group({"params": parameters(), "eps_inside_sqrt": False})
    assert inside.scalars(inside.param_groups[1], 1, False)["eps_inside_sqrt"] is False
    signature = inspect.signature(optim.RMSprop)
    own = signature.parameters["eps_inside_sqrt"]
    assert (own.kind, own.default) == (own.KEYWORD_ONLY, False)


@pytest.mark.parametrize("copied", [copy.deepcopy, None], ids=["copy", "checkpoint"])
def test_eps_inside_sqrt_is_resumed(copied):
    reference = parameters()
    whole = optim.RMSprop(reference, eps=0.1, eps_inside_sqrt=True)
    train(whole, reference, 5)
    if copied:
        params, resumed = copied((reference, whole))
    else:
        params = copy.deepcopy(reference)
        resumed = optim.RMSprop(params)
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for optimizer, trained in ((whole, reference), (resumed, params)):
        train(optimizer, trained, 5, seed=2)
    torch.testing.assert_close(params, reference, rtol=0, atol=0)


def test_torch_loads_eps_inside_sqrt_and_does_without():
    params, others = parameters(), parameters()
    mine = optim.RMSprop(params, eps=0.1, eps_inside_sqrt=True)
    train(mine, params, 3)
    theirs, expected = (torch.optim.RMSprop(others, eps=0.1) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    train(theirs, others, 3)
    stayed = optim.RMSprop(params, eps_inside_sqrt=True)
    stayed.load_state_dict(expected.state_dict())  # says nothing of it
    assert stayed.scalars(stayed.param_groups[0], 1, False)["eps_inside_sqrt"] is True


def slope(w):
    """The gradient of a function that is neither quadratic nor convex: sum of sin(3 w_i) + (w_i - w_{i+1})^2."""
    w = w.detach().requires_grad_()
    ((3 * w).sin().sum() + (w - w.roll(-1)).square().sum()).backward()
    return w.grad


@pytest.mark.parametrize(("lr", "momentum"), [(0.01, 0.9), (0.1, 0.5), (0.003, 0.99)])
def test_nesterov_looks_ahead(lr, momentum):
    """Sec. 5.4 step by step: the gradient at W' - lr momentum v, a step from W'. Ours stands ahead."""
    torch.manual_seed(0)
    report = torch.randn(7, dtype=torch.float64)  # W'
    v = torch.zeros_like(report)
    p = torch.nn.Parameter(report.clone())
    optimizer = optim.SGD([p], lr=lr, momentum=momentum, nesterov=True)
    for _ in range(60):
        ahead = report - lr * momentum * v
        torch.testing.assert_close(p.data, ahead, **EXACT)
        v = momentum * v + slope(ahead)
        report = report - lr * v
        p.grad = slope(p)
        optimizer.step()
        buffer = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(buffer, v, **EXACT)
        torch.testing.assert_close(p.data + lr * momentum * buffer, report, **EXACT)


def test_plain_momentum_does_not_look_ahead():
    """The test above can fail: without `nesterov` the parameters are elsewhere."""
    start = torch.arange(3, dtype=torch.float64)
    ended = []
    for nesterov in (True, False):
        p = torch.nn.Parameter(start.clone())
        optimizer = optim.SGD([p], lr=0.1, momentum=0.9, nesterov=nesterov)
        for _ in range(3):
            p.grad = slope(p)
            optimizer.step()
        ended.append(p.data)
    assert not torch.allclose(*ended)
