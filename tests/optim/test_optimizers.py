"""Each optimizer takes torch's steps, over torch's own table of inputs, and keeps torch's state."""

import copy
import functools
import pickle

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import torch_bp.optim
from tests.benchmarks.memory import peak
from tests.optim.table import INFO, INPUTS, PAIRS, TORCHS, assert_same_state, parameters, train
from torch_bp.kernels import use

EXACT = {"rtol": 1e-12, "atol": 1e-13}
CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # float32 over 100 steps, rounded in another order
OPTIONS = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
    "Adagrad": {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1},
    "NAdam": {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 0.01},
    "RAdam": {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.8, 0.9)},
    "Adamax": {"weight_decay": 0.1},
    "Adadelta": {"weight_decay": 0.1, "rho": 0.8},
    "Lion": {"lr": 0.01, "weight_decay": 0.1},
}
EACH = pytest.mark.parametrize("name", PAIRS)
EACH_OF_TORCH = pytest.mark.parametrize("name", TORCHS)


def named(value):
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()) or "default"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
@pytest.mark.parametrize(("name", "options"), INPUTS, ids=named)
def test_hundred_steps(name, options, dtype):
    tolerance = CLOSE if dtype is torch.float32 else EXACT
    trained = []
    for kind in PAIRS[name]:
        if options.get("capturable") and kind is PAIRS[name][1]:
            options = {**options, "capturable": False}  # torch refuses it on the CPU; ours need not
        params = parameters(dtype)
        optimizer = kind(params, **options)
        train(optimizer, params, 100, missing=1)
        trained.append((params, optimizer))
    (ours, our_optimizer), (theirs, their_optimizer) = trained
    torch.testing.assert_close(ours, theirs, **tolerance)
    if "capturable" not in options:
        assert_same_state(our_optimizer, their_optimizer, **tolerance)


@EACH
def test_engines_in_lock_step(name):
    kind, _ = PAIRS[name]
    runs = []
    for engine in ("torch", "numba"):
        params = parameters()
        optimizer = kind(params, **OPTIONS[name])
        with use(engine):
            train(optimizer, params, 30)
        runs.append((params, optimizer))
    torch.testing.assert_close(runs[0][0], runs[1][0], **EXACT)
    assert_same_state(runs[0][1], runs[1][1], **EXACT)


@EACH
def test_the_list_kernel_serves(name):
    params = list(parameters(torch.float32))
    optimizer = PAIRS[name][0](params, **OPTIONS[name])
    train(optimizer, params, 3)
    (bucket,) = optimizer._plan.shares[0].buckets
    assert bucket.table.elements == sum(p.numel() for p in params)
    train(optimizer, params, 3)
    assert optimizer._plan.shares[0].buckets == [bucket], "the plan was not kept"


@EACH
@pytest.mark.parametrize("direction", ["torch to ours", "ours to torch", "ours to ours"])
def test_state_moves_both_ways_and_training_goes_on(name, direction):
    ours, theirs = PAIRS[name]
    first, second = {"torch to ours": (theirs, ours), "ours to torch": (ours, theirs), "ours to ours": (ours, ours)}[
        direction
    ]
    reference = parameters()
    uninterrupted = theirs(reference, **OPTIONS[name])
    train(uninterrupted, reference, 10)
    train(uninterrupted, reference, 10, seed=2)
    params = parameters()
    before = first(params, **OPTIONS[name])
    train(before, params, 10)
    after = second(params)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(after, params, 10, seed=2)
    torch.testing.assert_close(params, reference, **EXACT)
    if (name, direction) == ("NAdam", "ours to torch"):  # torch loads a float32 product in the dtype of the parameter
        assert_same_state(after, uninterrupted, rtol=1e-6, atol=1e-13, check_dtype=False)
    else:
        assert_same_state(after, uninterrupted, **EXACT)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_resume_is_bitwise(name, dtype, tmp_path):
    kind = PAIRS[name][0]
    reference = parameters(dtype)
    uninterrupted = kind(reference, **OPTIONS[name])
    train(uninterrupted, reference, 7)
    torch.save({"params": reference, "optimizer": uninterrupted.state_dict()}, tmp_path / "checkpoint")
    train(uninterrupted, reference, 7, seed=2)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    params = saved["params"]
    resumed = kind(params, **OPTIONS[name])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, params, 7, seed=2)
    torch.testing.assert_close(params, reference, rtol=0, atol=0)


@EACH
def test_copies_go_on_alone(name):
    params = parameters()
    optimizer = PAIRS[name][0](params, **OPTIONS[name])
    train(optimizer, params, 3)
    for other_params, other in (copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))):
        assert_same_state(other, optimizer, rtol=0, atol=0)
        before = [p.detach().clone() for p in params]
        train(other, other_params, 3, seed=2)
        torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)
        assert not torch.equal(other_params[0], params[0])


@EACH_OF_TORCH
def test_error_inputs(name):
    for error in INFO[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        data = error.optimizer_error_input
        messages = []
        for kind in PAIRS[name]:
            with pytest.raises(error.error_type) as caught:
                kind(data.params, **data.kwargs).step()
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


@EACH_OF_TORCH
def test_is_torchs_class_with_torchs_signature(name):
    import inspect

    ours, theirs = PAIRS[name]
    assert issubclass(ours, theirs)
    added = {"eps_inside_sqrt"} if name == "RMSprop" else set()
    signature = inspect.signature(ours)
    same = [parameter for key, parameter in signature.parameters.items() if key not in added]
    assert signature.replace(parameters=same) == inspect.signature(theirs)
    params = parameters()
    assert repr(ours(params, **OPTIONS[name])) == repr(theirs(params, **OPTIONS[name]))
    assert ours(params).defaults == theirs(params).defaults


@EACH
def test_closure_and_hooks(name):
    params = parameters()
    optimizer = PAIRS[name][0](params)
    called = []
    optimizer.register_step_pre_hook(lambda *a: called.append("before"))
    optimizer.register_step_post_hook(lambda *a: called.append("after"))

    def closure():
        called.append(torch.is_grad_enabled())
        loss = sum(p.square().sum() for p in params)
        optimizer.zero_grad()
        loss.backward()
        return loss

    expected = sum(p.square().sum() for p in params).item()
    with torch.no_grad():
        loss = optimizer.step(closure=closure)
    assert loss.item() == expected
    assert called == ["before", True, "after"]
    assert sum(p.square().sum() for p in params).item() < expected


def test_hooks_of_every_kind_run_once_and_in_order():
    called = []

    class Logging(PAIRS["Adam"][0]):
        def step(self, closure=None):
            called.append("own step")
            return super().step(closure)

    for kind in (PAIRS["Adam"][0], Logging):
        params = parameters()
        optimizer = kind(params)
        everywhere = [
            register_optimizer_step_pre_hook(lambda *a: called.append("all before")),
            register_optimizer_step_post_hook(lambda *a: called.append("all after")),
        ]
        handles = [
            optimizer.register_step_pre_hook(lambda *a: called.append("before")),
            optimizer.register_step_post_hook(lambda *a: called.append("after")),
        ]
        train(optimizer, params, 1)
        for handle in everywhere + handles:
            handle.remove()
        train(optimizer, params, 1)
    plain = ["all before", "before", "after", "all after"]
    assert called == [*plain, *plain[:2], "own step", *plain[2:], "own step"]


@EACH
def test_the_profiler_sees_a_step(name):
    params = parameters()
    optimizer = PAIRS[name][0](params)
    train(optimizer, params, 1)
    with torch.profiler.profile() as profile:
        train(optimizer, params, 1)
    assert f"Optimizer.step#{name}.step" in {event.key for event in profile.key_averages()}


def _closure():
    return 42


LIBRARIES = pytest.mark.parametrize("library", [torch_bp.optim, torch.optim], ids=["ours", "torch's"])
HOOKED = {
    "positional": (lambda self, args, kwargs: ((self, _closure), {}), lambda o: o.step()),
    "by name": (lambda self, args, kwargs: (args, {"closure": _closure}), lambda o: o.step()),
    "given by name": (lambda self, args, kwargs: (args, {"closure": _closure}), lambda o: o.step(closure=_closure)),
}


@LIBRARIES
@pytest.mark.parametrize("how", HOOKED)
def test_a_hook_may_change_the_arguments(how, library):
    hook, call = HOOKED[how]
    optimizer = library.SGD(parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda self, args, kwargs: seen.append((len(args), [*kwargs])))
    optimizer.register_step_pre_hook(hook)
    assert call(optimizer) == 42
    assert seen == [(1, ["closure"] if how == "given by name" else [])]


@LIBRARIES
def test_hooks_run_whoever_wraps_the_step(library, monkeypatch):
    called = []
    library.AdamW(parameters())  # torch wraps a step in its hooks when the first optimizer of a class is made
    library.Adam(parameters())
    whole = library.AdamW.step

    class Wrapping(library.Adam):
        @functools.wraps(library.Adam.step)
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    monkeypatch.setattr(library.AdamW, "step", lambda self, *args, **kwargs: whole(self, *args, **kwargs))
    library.AdamW.step.hooked = True
    for kind in (Wrapping, library.AdamW):
        optimizer = kind(parameters())
        optimizer.register_step_post_hook(lambda *a: called.append("after"))
        optimizer.step()
    assert called == ["after", "after"]


@LIBRARIES
def test_a_hook_registered_by_the_closure_runs(library):
    optimizer, called = library.SGD(parameters()), []
    optimizer.step(lambda: optimizer.register_step_post_hook(lambda *a: called.append("after")))
    assert called == ["after"]


@EACH
def test_a_step_takes_no_memory(name):
    """Beyond parameters, gradients and state, of which it takes less than a hundredth at any moment."""
    params = parameters(torch.float32, shapes=[(256, 256)] * 4)
    optimizer = PAIRS[name][0](params, **OPTIONS[name])
    train(optimizer, params, 2)
    kept = [*params, *(p.grad for p in params), *(t for state in optimizer.state.values() for t in state.values())]
    assert peak(optimizer.step) <= sum(t.numel() * t.element_size() for t in kept) / 100
