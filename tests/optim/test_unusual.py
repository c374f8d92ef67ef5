"""Everything that is not a list of plain dense parameters: sparse, mixed, scaled, compiled, differentiated."""

import re
import warnings

import pytest
import torch

from tests.optim.table import PAIRS, TORCHS, parameters, train
from torch_bp import optim

EXACT = {"rtol": 1e-12, "atol": 1e-13}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
RATES = {"SGD": 0.5, "Adagrad": 0.1, "RAdam": 0.05, "Adadelta": 2.0}  # at which a small network learns
EACH = pytest.mark.parametrize("name", PAIRS)


def sparse_gradient(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(shape[0], (4,), generator=generator)  # with repetitions
    values = torch.randn(4, *shape[1:], generator=generator, dtype=torch.float64)
    return torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
        ("Adagrad", {}),
        ("Adagrad", {"lr_decay": 0.1}),
        ("SGD", {"maximize": 1}),
        ("Lion", {}),
    ],
)
def test_sparse_gradients(name, options):
    results = []
    for kind in PAIRS[name]:
        params = parameters(shapes=[(9, 3), (5,)])
        optimizer = kind(params, **options)
        for seed in range(5):
            params[0].grad = sparse_gradient((9, 3), seed)
            params[1].grad = torch.ones_like(params[1])
            optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adagrad", {"weight_decay": 0.1})] + [(name, {}) for name in TORCHS if name not in ("SGD", "Adagrad")],
)
def test_sparse_gradients_are_refused_before_anything_changes(name, options):
    messages = []
    for kind in PAIRS[name]:
        params = parameters(shapes=[(5,), (9, 3)])
        before = [p.detach().clone() for p in params]
        optimizer = kind(params, **options)
        params[0].grad, params[1].grad = torch.ones_like(params[0]), sparse_gradient((9, 3), 0)
        with pytest.raises(RuntimeError) as caught:
            optimizer.step()
        messages.append(str(caught.value))
        if kind is PAIRS[name][0]:  # torch's Adagrad has updated the first parameter by then
            torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)
    assert messages[0].split(",")[0] in messages[1]


@EACH
def test_mixed_dtypes_and_groups(name):
    results = []
    for kind in PAIRS[name]:
        first, second = parameters(torch.float64), parameters(torch.float32, seed=3)
        half = parameters(torch.bfloat16, seed=4)
        optimizer = kind([{"params": [first[0], second[0], first[3]]}, {"params": [*second[1:], half[3]], "lr": 0.05}])
        for seed in range(3):
            train(optimizer, [first[0], second[0], first[3], *second[1:], half[3]], 3, seed=seed)
        results.append([first[0], second[0], first[3], *second[1:], half[3]])
    for ours, theirs in zip(*results):
        tolerance = {torch.float64: EXACT, torch.float32: CLOSE}.get(ours.dtype, {"rtol": 0.05, "atol": 0.02})
        torch.testing.assert_close(ours, theirs, **tolerance)


@EACH
def test_tensor_learning_rate(name):
    results = []
    for kind in PAIRS[name]:
        params = parameters()
        options = {"foreach": False} if name == "SGD" else {}
        optimizer = kind(params, lr=torch.tensor(0.01, dtype=torch.float64), **options)
        train(optimizer, params, 3)
        optimizer.param_groups[0]["lr"].fill_(0.5)
        train(optimizer, params, 3, seed=2)
        results.append(params)
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_tensor_betas(name):
    results = []
    for kind in PAIRS[name]:
        params = parameters()
        betas = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
        optimizer = kind(params, betas=betas, foreach=False)
        train(optimizer, params, 3)
        betas[0].fill_(0.5)
        train(optimizer, params, 3, seed=2)
        results.append(params)
    torch.testing.assert_close(*results, **EXACT)


@EACH
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(name, fused):
    if fused and "fused" not in PAIRS[name][0]([torch.ones(1)]).defaults:
        with pytest.raises(TypeError):
            PAIRS[name][0](parameters(), fused=True)
        return
    results = []
    for kind in PAIRS[name]:
        params = parameters(torch.float32)
        optimizer = kind(params, lr=0.01, **({"fused": True} if fused else {}))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator) * scaler.get_scale()
            if seed == 3:
                params[0].grad[0, 0] = float("inf")
            scaler._lazy_init_scale_growth_tracker(torch.device("cpu")) if scaler._scale is None else None
            scaler.step(optimizer)
            scaler.update()
        results.append((params, scaler.get_scale()))
    torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)
    assert results[0][1] == results[1][1]
    assert all(p.isfinite().all() for p in results[0][0])


@pytest.mark.parametrize("name", TORCHS)
def test_differentiable(name):
    gradients, steps = [], 1 if name == "Adamax" else 3  # torch's Adamax overwrites what its first step has saved
    for kind in PAIRS[name]:
        start = torch.ones(4, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        optimizer = kind([p], lr=0.1, differentiable=True)
        for _ in range(steps):
            p.grad = p.detach().clone() * start
            optimizer.step()
        (gradient,) = torch.autograd.grad(p.sum(), start)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "RAdam", "Adamax", "Adadelta", "Lion"])
def test_compiled_step(name):
    results = []
    for kind in PAIRS[name]:
        params = parameters(torch.float32)
        optimizer = kind(params, lr=torch.tensor(0.01), **({"momentum": 0.9} if name == "SGD" else {}))
        ours = kind is PAIRS[name][0]
        step = torch.compile(optimizer.step, backend="eager") if ours else optimizer.step
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step()
        results.append(params)
    torch.testing.assert_close(*results, **CLOSE)


@EACH
def test_compiled_step_of_single_numbers_in_double(name):
    """Which torch.compile takes for Python numbers, and loses what is written to them as to other tensors."""
    results = []
    torch.set_default_dtype(torch.float64)  # that of the step counts
    try:
        for compiled in (True, False):
            torch._dynamo.reset()
            params = parameters(shapes=[(), (3,)])
            optimizer = PAIRS[name][0](params)
            step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
            for seed in range(4):
                for p, grad in zip(params, parameters(shapes=[(), (3,)], seed=seed + 1)):
                    p.grad = grad.detach()
                step()
            results.append((params, [optimizer.state[p] for p in params if p in optimizer.state]))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize("name", [n for n in TORCHS if "capturable" in PAIRS[n][1]([torch.ones(1)]).defaults])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_capturable(name, lr):
    """With the counts as tensors, in single precision; torch has no CPU where it can be captured."""
    results = []
    for kind, capturable in zip(PAIRS[name], (True, False)):
        params = parameters(torch.float32)
        optimizer = kind(params, lr=lr if capturable else 0.01, capturable=capturable)
        train(optimizer, params, 20)
        results.append((params, optimizer.state[params[0]]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_rectification_that_is_not_used_has_no_gradient():
    """In its first steps RAdam takes no root of the average of squares, which is 0 where the gradient is."""
    gradients = []
    for kind, options in zip(PAIRS["RAdam"], ({"capturable": True}, {})):
        start = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        optimizer = kind([p], lr=0.1, differentiable=True, **options)
        for _ in range(2):
            p.grad = start * start
            optimizer.step()
        gradients += torch.autograd.grad(p.sum(), start)
    torch.testing.assert_close(*gradients)
    assert gradients[0].isfinite().all()


@EACH
def test_named_parameters_and_warnings(name):
    model = torch.nn.Linear(3, 2)
    optimizer = PAIRS[name][0](model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        PAIRS[name][0]([])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        PAIRS[name][0]([model.weight, model.weight])


@EACH
def test_a_real_network_learns(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    x = torch.randn(200, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = PAIRS[name][0](model.parameters(), lr=RATES.get(name, 0.02))
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.95


def test_lion_refuses_what_is_out_of_range():
    refused = {
        "Tensor lr must be 1-element": {"lr": torch.ones(2)},
        "Invalid learning rate: -1": {"lr": -1},
        "Invalid beta parameter at index 1: 1": {"betas": (0.9, 1)},
        "Invalid weight_decay value: -0.1": {"weight_decay": -0.1},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            optim.Lion(parameters(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_adagrad_starts_late_parameters_at_the_initial_value(dtype):
    results = []
    for library in (optim, torch.optim):
        a, b = (torch.nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
        optimizer = library.Adagrad([a], lr=1.0, initial_accumulator_value=3.0)
        optimizer.add_param_group({"params": [b]})
        for _ in range(2):
            a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
            optimizer.step()
        results.append([a.detach(), b.detach(), optimizer.state[b]["sum"]])
    torch.testing.assert_close(*results)


def test_weight_decay_can_be_differentiated_through():
    results = []
    for library in (optim, torch.optim):
        rate = torch.tensor(0.1, requires_grad=True)
        p = torch.ones(3, requires_grad=True).clone()
        p.grad = torch.ones(3)
        library.AdamW([p], lr=rate, differentiable=True, foreach=False).step()
        results.append(torch.autograd.grad(p.sum(), rate))
    torch.testing.assert_close(*results)


def test_several_threads_step_one_optimizer():
    import threading

    params = [torch.nn.Parameter(torch.zeros(20, 20)) for _ in range(8)]
    optimizer, failures = optim.Adam(params), []

    for p in params:  # fixed ones: torch itself does not bear a gradient that is replaced while it is read
        p.grad = torch.ones_like(p)

    def work():
        try:
            for _ in range(100):
                optimizer.step()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(p.isfinite().all() for p in params)


@EACH
@pytest.mark.parametrize("momentum", [0.9, 0.0], ids=["momentum", "none"])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_is_updated_twice(name, momentum):
    if momentum and name not in ("SGD", "RMSprop"):
        pytest.skip("has no momentum of this name")
    options = {"momentum": momentum, "weight_decay": 0.1} if momentum else {}
    if momentum and name == "SGD":
        options["dampening"] = 0.5
    results = []
    for kind in PAIRS[name]:
        w, other = parameters(shapes=[(3,), (4,)])
        optimizer = kind([w, other, w], lr=0.1, **options)
        for seed in range(4):
            train(optimizer, [w, other], 1, seed=seed)
        results.append([w, other, optimizer.state[w]])
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_plan_is_kept_beside_a_parameter_that_is_listed_twice():
    w, other = parameters(shapes=[(3,), (4,)])
    optimizer = optim.Adam([w, other, w])
    train(optimizer, [w, other], 3)
    kept = optimizer._plan.shares[0]
    assert [bucket.positions for bucket in kept.buckets] == [[1]]
    train(optimizer, [w, other], 3)
    assert optimizer._plan.shares[0] is kept


@pytest.mark.parametrize("views", [False, True], ids=["one tensor", "views of one"])
@pytest.mark.parametrize("name", [n for n in TORCHS if n != "SGD"])
def test_parameters_that_share_a_step_count(name, views):
    """Each of them counts, as in torch."""
    results = []
    for kind in PAIRS[name]:
        params = parameters(shapes=[(3,), (4,), (5,)])
        optimizer = kind(params, **({} if name == "NAdam" else {"foreach": False}))
        train(optimizer, params, 2)
        for key in optimizer.state[params[0]].keys() & {"step", "mu_product"}:
            shared = optimizer.state[params[0]][key]
            for p in params[:2]:
                optimizer.state[p][key] = shared.view(()) if views else shared
        train(optimizer, params, 4, seed=2)
        results.append([params, [optimizer.state[p]["step"] for p in params]])
    assert [step.item() for step in results[0][1]] == [10, 10, 6]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@EACH
def test_a_gradient_whose_conjugation_is_pending(name):
    results = []
    for pending in (True, False):
        w = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128))
        optimizer = PAIRS[name][0]([w], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (w.conj() * torch.tensor([2 + 1j, -1j], dtype=torch.complex128)).real.sum().backward()
            assert w.grad.is_conj()
            w.grad = w.grad if pending else w.grad.resolve_conj()
            optimizer.step()
        results.append(w.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0].ne(torch.tensor([1 + 2j, 3 - 1j])).all()


@EACH
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_integer_parameters_are_refused_where_numbers_would_be_cut(name, dtype):
    for kind in PAIRS[name][: 1 if name == "Lion" else 2]:
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        optimizer = kind([p], lr=0.5)
        p.grad = torch.ones(3, dtype=dtype)
        with pytest.raises(RuntimeError):  # NotImplementedError is one
            optimizer.step()
        assert p.eq(1).all()


def test_integer_parameters_take_integer_steps():
    for kind in PAIRS["SGD"]:
        p = torch.nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
        p.grad = torch.ones(3, dtype=torch.int64)
        kind([p], lr=2).step()
        assert p.tolist() == [-2, -2, -2]


@pytest.mark.parametrize("value", ["0.1", None, [0.1]], ids=repr)
@pytest.mark.parametrize("way", ["list", "one by one"])
@pytest.mark.parametrize(
    ("name", "key"), [("SGD", "lr"), ("SGD", "momentum"), ("Adam", "lr"), ("Adam", "eps"), ("Lion", "weight_decay")]
)
def test_a_number_that_is_none_is_named(name, key, way, value):
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = PAIRS[name][0]([p], **({"momentum": 0.9} if name == "SGD" else {}))
    p.grad = torch.ones(2, 3) if way == "list" else torch.ones(3, 2).t()
    optimizer.param_groups[0][key] = value
    with pytest.raises(TypeError, match=rf"^{name}: {key} must be a number, got .*{re.escape(str(value))}"):
        optimizer.step()
    assert p.eq(1).all()
    assert not optimizer.state[p]


def test_other_errors_of_a_rule_are_its_own():
    class Broken(optim.SGD):
        @staticmethod
        def rule(*tensors, **scalars):
            raise TypeError("something else")

        rule.__func__.formula = optim.SGD.rule.formula

    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(3, 2).t()
    with pytest.raises(TypeError, match=r"^something else$"):
        Broken([p], lr=0.1).step()


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_first_step_with_momentum_is_differentiated(nesterov):
    """Where torch detaches the buffer, and with it all or part of the gradient."""
    found = []
    for library in (optim, torch.optim):
        gradient = torch.ones(2, dtype=torch.float64, requires_grad=True)
        p = torch.zeros(2, dtype=torch.float64)
        optimizer = library.SGD([p], lr=0.1, momentum=0.9, nesterov=nesterov, differentiable=True)
        q = torch.zeros(2, dtype=torch.float64, requires_grad=True).clone()
        optimizer.param_groups[0]["params"][0] = q
        q.grad = gradient.clone()
        optimizer.step()
        found.append(torch.autograd.grad(q.sum(), gradient, allow_unused=True)[0])
    torch.testing.assert_close(found[0], torch.full((2,), -0.19 if nesterov else -0.1, dtype=torch.float64))
    if nesterov:
        torch.testing.assert_close(found[1], torch.full((2,), -0.1, dtype=torch.float64))
    else:
        assert found[1] is None


def test_what_torch_refuses_runs():
    """Documented in `torch_bp.optim`."""
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    table = torch.nn.Embedding(6, 3, sparse=True)
    for library in (optim, torch.optim):
        p.grad = torch.ones_like(p)
        table.zero_grad()
        table(torch.tensor([1])).sum().backward()
        for params in ([p], table.parameters()):
            optimizer = library.SGD(params, lr=0.1, fused=True)
            if library is optim:
                optimizer.step()
            else:
                with pytest.raises(RuntimeError):
                    optimizer.step()
    q = torch.nn.Parameter(torch.ones(2))
    q.grad = torch.ones(2)
    optim.Adam([q], capturable=True).step()
    assert q.lt(1).all()
    with pytest.raises(AssertionError):
        torch.optim.Adam([q], capturable=True).step()
