"""The optimizer in the backward makes the steps of an unchanged loop, to the bit, with one gradient alive at a time."""

import copy
from itertools import accumulate

import pytest
import torch

import torch_bp
from tests.optim.table import PAIRS
from torch_bp import optim
from torch_bp.optim import apply_in_backward, param_groups

EACH = pytest.mark.parametrize("name", PAIRS)
OPTIONS = {
    "SGD": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
}
SAME = {"rtol": 0, "atol": 0}
generator = torch.Generator().manual_seed(0)
x = torch.randn(8, 16, 6, generator=generator)  # step, example, feature
labels = torch.randint(4, (8, 16), generator=generator)


class Tied(torch.nn.Module):
    """One weight used twice, one that is never used, one that is frozen, and one in every second step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch_bp.nn.Linear(6, 33)
        self.middle = torch_bp.nn.Linear(33, 33)
        self.norm = torch_bp.nn.LayerNorm(33)
        self.last = torch_bp.nn.Linear(33, 4)
        self.unused, self.at_times = torch.nn.Linear(2, 2), torch.nn.Linear(33, 33)
        self.first.bias.requires_grad_(False)
        self.calls = 0

    def forward(self, input):
        self.calls += 1
        hidden = self.middle(torch.tanh(self.middle(torch.tanh(self.first(input)))))
        if self.calls % 2:
            hidden = hidden + self.at_times(hidden)
        return self.last(self.norm(hidden))


def loss_of(model, step):
    return torch.nn.functional.cross_entropy(model(x[step]), labels[step])


def train(model, optimizer, steps=range(8), scheduler=None):
    """A loop that knows nothing of what is applied where."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def pair(name="Adam", groups=lambda model: model.parameters(), **options):
    """Two models and their optimizers, alike."""
    models = [Tied(), Tied()]
    return models, [PAIRS[name][0](groups(m), lr=0.01, **{**OPTIONS.get(name, {}), **options}) for m in models]


def assert_same(models, optimizers):
    torch.testing.assert_close(*[list(m.parameters()) for m in models], **SAME)
    states = [o.state_dict() for o in optimizers]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], **SAME)


@EACH
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_the_same_to_the_bit(name, engine):
    models, optimizers = pair(name)
    apply_in_backward(models[1], optimizers[1])
    with torch_bp.kernels.use(engine):
        for model, optimizer in zip(models, optimizers):
            train(model, optimizer)
    assert_same(models, optimizers)
    assert all(p.grad is None for p in models[1].parameters())


def test_one_gradient_at_a_time():
    """Of those that ordinary training holds all."""

    def count(model, counts):
        counts.append(sum(p.grad is not None for p in model.parameters()))

    alive = []
    for applied in (False, True):
        model = Tied()
        counts = []
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda _, model=model, counts=counts: count(model, counts))
        optimizer = optim.Adam(model.parameters())
        if applied:
            apply_in_backward(model, optimizer)
        train(model, optimizer, range(1))
        alive.append(max(counts))
    assert alive == [9, 1]


def test_memory_of_gradients():
    """The most that a backward holds beyond what was there before it, in matrices of one layer."""
    peaks = []
    for applied in (False, True):
        model = torch.nn.Sequential(*(torch.nn.Linear(300, 300, bias=False) for _ in range(10)))
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        if applied:
            apply_in_backward(model, optimizer)
        train_one = model(torch.ones(1, 300)).sum()
        with torch.profiler.profile(profile_memory=True) as profile:
            train_one.backward()
        changes = [e.self_cpu_memory_usage for e in sorted(profile.events(), key=lambda e: e.time_range.start)]
        peaks.append(max(accumulate(changes)) / (4 * 300 * 300))
    assert peaks[0] > 9.9
    assert peaks[1] < 2.1


def test_the_kernel_serves_and_its_plan_is_kept():
    model = Tied()
    optimizer = optim.Adam(model.parameters())
    handle = apply_in_backward(model, optimizer)
    train(model, optimizer, range(3))
    member = next(m for m in handle._members if m.name == "middle.weight")
    (bucket,) = member.plan.shares[0].buckets
    train(model, optimizer, range(3, 6))
    assert member.plan.shares[0].buckets == [bucket]
    assert bucket.table.elements == 33 * 33


@pytest.mark.parametrize("early", [True, False], ids=["scheduler first", "applied first"])
def test_schedules_groups_and_changes_of_rates(early):
    models, optimizers = pair("SGD", lambda m: param_groups(m, lr={"middle": 0.2, "*": 0.1}))
    if not early:
        apply_in_backward(models[1], optimizers[1])
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in optimizers]
    if early:
        apply_in_backward(models[1], optimizers[1])
    for model, optimizer, scheduler in zip(models, optimizers, schedulers):
        train(model, optimizer, range(5), scheduler)
        optimizer.param_groups[0]["lr"] = 0.3
        optimizer.param_groups[0]["momentum"] = 0.0
        train(model, optimizer, range(5, 8), scheduler)
    assert_same(models, optimizers)


@EACH
def test_state_is_loaded_in_mid_training(name):
    models, optimizers = pair(name)
    apply_in_backward(models[1], optimizers[1])
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer, range(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, range(3, 5))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        model.calls = 3
        optimizer.param_groups[0]["lr"] = 0.02  # in the group that was loaded
        train(model, optimizer, range(3, 8))
    assert_same(models, optimizers)


def test_what_is_not_applied_is_stepped():
    """A parameter of another model, a later group, and one that is thawed."""
    models, others = [Tied(), Tied()], [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    late = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [optim.Adam([*m.parameters(), other]) for m, other in zip(models, others)]
    apply_in_backward(models[1], optimizers[1])
    for model, optimizer, other, added in zip(models, optimizers, others, late):
        for step in range(4):
            optimizer.zero_grad()
            (loss_of(model, step) + other.square().sum() + added.square().sum()).backward()
            optimizer.step()
            if step == 1:
                optimizer.add_param_group({"params": [added]})
                model.first.bias.requires_grad_(True)
    assert_same(models, optimizers)
    torch.testing.assert_close(*others, **SAME)
    torch.testing.assert_close(*late, **SAME)
    assert late[0][0] != 1


def test_closures_and_hooks():
    models, optimizers = pair()
    apply_in_backward(models[1], optimizers[1])
    called = []
    for model, optimizer in zip(models, optimizers):
        optimizer.register_step_post_hook(lambda *a: called.append("stepped"))
        for step in range(3):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            called.append(optimizer.step(closure).item())
    assert_same(models, optimizers)
    assert called[:6] == called[6:]
    assert called[0] == "stepped"


def test_sparse_and_complex_gradients():
    found = []
    for applied in (False, True):
        torch.manual_seed(0)
        layers = [torch.nn.Embedding(9, 3, sparse=True), torch.nn.Linear(3, 2, dtype=torch.complex64)]
        model = torch.nn.ModuleList(layers)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        if applied:
            apply_in_backward(model, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model[1](model[0](torch.tensor([1, 1, 4])).to(torch.complex64)).abs().sum().backward()
            optimizer.step()
        found.append(list(model.parameters()))
    torch.testing.assert_close(*found, **SAME)


def test_a_rule_of_ones_own():
    from torch_bp.kernels import formula

    @formula(updates=("param",))
    def scaled(param, grad, *, lr):
        return param - lr * grad

    class Own(optim.RuleOptimizer):
        rule = scaled

    models = [Tied(), Tied()]
    optimizers = [Own(m.parameters(), {"lr": 0.1}) for m in models]
    apply_in_backward(models[1], optimizers[1])
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer)
    assert_same(models, optimizers)


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_by_the_norm_of_all(max_norm):
    models, optimizers = pair("SGD")
    handle = apply_in_backward(models[1], optimizers[1])
    for step in range(4):
        loss_of(models[0], step).backward()
        norm = torch.nn.utils.clip_grad_norm_(models[0].parameters(), max_norm)
        optimizers[0].step()
        optimizers[0].zero_grad()
        torch.testing.assert_close(handle.backward(loss_of(models[1], step), max_norm), norm, **SAME)
        optimizers[1].step()
    assert_same(models, optimizers)


def test_clipping_each_by_itself():
    def clip(p):
        torch.nn.utils.clip_grad_norm_(p, 0.01)

    models, optimizers = pair("SGD")
    for p in models[1].parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(clip)
    apply_in_backward(models[1], optimizers[1])
    for step in range(4):
        optimizers[0].zero_grad()
        loss_of(models[0], step).backward()
        for p in models[0].parameters():
            torch.nn.utils.clip_grad_norm_(p, 0.01)
        optimizers[0].step()
    train(models[1], optimizers[1], range(4))
    assert_same(models, optimizers)


def test_a_second_backward_is_refused():
    model = Tied()
    optimizer = optim.Adam(model.parameters())
    apply_in_backward(model, optimizer)
    loss_of(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"must be called after each backward, got a second gradient for last"):
        loss_of(model, 1).backward()
    torch.testing.assert_close(model.state_dict(), before, **SAME)


class OwnScaler(torch.amp.GradScaler):
    """As the one for sharded models, it scales by itself."""

    def scale(self, outputs):
        self._lazy_init_scale_growth_tracker(outputs.device)
        return outputs * self._scale


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_that_is_not_seen_is_refused_in_its_step(unscale, fused):
    model = Tied()
    optimizer = optim.Adam(model.parameters(), fused=fused)
    handle = apply_in_backward(model, optimizer)
    scaler = OwnScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="must be unscaled when they come, got a GradScaler"):
        scaler.step(optimizer)
    handle.remove()
    assert getattr(optimizer, "_step_supports_amp_scaling", None) is fused
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("several", [lambda loss: loss, lambda loss: [loss.detach(), (loss,)]], ids=["one", "several"])
def test_a_scaled_loss_is_refused_before_its_backward(several):
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    scaler, plain = torch.amp.GradScaler("cpu"), torch.amp.GradScaler.scale
    handles = [apply_in_backward(m, optim.Adam(m.parameters())) for m in (model, Tied())]
    with pytest.raises(RuntimeError, match=r"got a GradScaler, .* and a loss of \w+\.\w+; nothing was updated"):
        scaler.scale(several(loss_of(model, 0))).backward()
    torch.testing.assert_close(model.state_dict(), before, **SAME)
    handles[0].remove()
    with pytest.raises(RuntimeError, match="got a GradScaler"):
        scaler.scale(sum(p.sum() for p in handles[1].names))
    scaler.scale(loss_of(model, 0)).backward()
    assert model.last.weight.grad is not None
    handles[1].remove()
    assert torch.amp.GradScaler.scale is plain


def test_a_scaler_of_other_parameters_or_that_is_off_is_let_be():
    model, other = Tied(), Tied()
    scaler = torch.amp.GradScaler("cpu")
    optimizers = [optim.Adam(m.parameters()) for m in (model, other)]
    with apply_in_backward(model, optimizers[0]):
        scaler.scale(loss_of(other, 0)).backward()
        scaler.step(optimizers[1])
        before = copy.deepcopy(model.state_dict())
        off = torch.amp.GradScaler("cpu", enabled=False)
        off.scale(loss_of(model, 0)).backward()
        off.step(optimizers[0])
        assert not torch.equal(model.last.weight, before["last.weight"])


def test_a_scaler_that_another_has_wrapped_since():
    model = Tied()
    scaler, scale = torch.amp.GradScaler("cpu"), torch.amp.GradScaler.scale
    handle = apply_in_backward(model, optim.Adam(model.parameters()))
    ours = torch.amp.GradScaler.scale
    torch.amp.GradScaler.scale = wrapper = lambda self, outputs: ours(self, outputs)
    try:
        handle.remove()
        assert torch.amp.GradScaler.scale is wrapper
        scaler.scale(loss_of(model, 0))
        with apply_in_backward(model, handle._optimizer), pytest.raises(RuntimeError, match="got a GradScaler"):
            scaler.scale(loss_of(model, 0))
        torch.amp.GradScaler.scale = ours
        apply_in_backward(model, handle._optimizer).remove()
        assert torch.amp.GradScaler.scale is scale
    finally:
        torch.amp.GradScaler.scale = scale


def test_removed():
    models, optimizers = pair()
    before = [set(vars(optimizers[1])), len(optimizers[1]._optimizer_step_pre_hooks)]
    with apply_in_backward(models[1], optimizers[1]) as handle:
        with pytest.raises(RuntimeError, match="applied in the backward already"):
            apply_in_backward(models[1], optimizers[1])
        train(models[1], optimizers[1], range(4))
    handle.remove()
    train(models[0], optimizers[0], range(4))
    assert [set(vars(optimizers[1])) - {"_plan"}, len(optimizers[1]._optimizer_step_pre_hooks)] == before
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer, range(4, 6))
    assert_same(models, optimizers)
    assert models[1].last.weight.grad is not None
    assert not models[1]._forward_pre_hooks
    apply_in_backward(models[1], optimizers[1])


def test_errors():
    model = Tied()
    with pytest.raises(TypeError, match=r"one of torch_bp.optim's own, with its step, got torch.optim.lbfgs.LBFGS"):
        apply_in_backward(model, torch.optim.LBFGS(model.parameters()))

    class Own(optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    with pytest.raises(TypeError, match=r"with its step, got .*Own"):
        apply_in_backward(model, Own(model.parameters()))
    with pytest.raises(ValueError, match="differentiable must be False, got True"):
        apply_in_backward(model, optim.Adam(model.parameters(), differentiable=True))
    with pytest.raises(ValueError, match="must have parameters of the optimizer that require gradients, got none"):
        apply_in_backward(model, optim.Adam(Tied().parameters()))
    optimizer = optim.Adam(model.parameters())
    apply_in_backward(model, optimizer)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p is not model.last.bias]
    with pytest.raises(RuntimeError, match=r"last.bias must stay in the optimizer"):
        loss_of(model, 0).backward()


def test_a_gradient_that_is_refused_is_not_applied_later():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch_bp.optim.SGD(model.parameters(), lr=1.0)
    with apply_in_backward(model, optimizer) as handle:
        model(torch.ones(1, 2)).sum().backward()
        after = model.weight.detach().clone()
        with pytest.raises(RuntimeError, match="second gradient"):
            model(1000 * torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert torch.equal(model.weight, after)
        model.weight.grad = torch.ones(1, 2)
        with pytest.raises(ValueError, match="no gradient before a backward that clips"):
            handle.backward(model(torch.ones(1, 2)).sum(), max_norm=1.0)


def test_frozen_after_it_was_applied():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    optimizer = torch_bp.optim.SGD(model.parameters(), lr=1.0)
    with apply_in_backward(model, optimizer) as handle:
        model[0].requires_grad_(False)
        before = model[1].weight.detach().clone()
        handle.backward(model(torch.ones(1, 2)).sum(), max_norm=1.0)
        optimizer.step()
        assert not torch.equal(model[1].weight, before)


class BrokenError(RuntimeError):
    """As when memory runs out in the middle of a backward."""


def fail(_):
    raise BrokenError


@pytest.mark.parametrize("clipped", [False, True])
def test_reset_after_a_backward_that_failed(clipped):
    model = Tied()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    handle = apply_in_backward(model, optimizer)
    go = (lambda loss: handle.backward(loss, 1e3)) if clipped else torch.Tensor.backward
    hook = model.middle.weight.register_hook(fail)
    with pytest.raises(BrokenError):
        go(loss_of(model, 0))
    hook.remove()
    if not clipped:  # whose first pass updates nothing
        with pytest.raises(RuntimeError, match=r"After a backward that failed, call reset\(\) of the handle"):
            go(loss_of(model, 1))
    handle.reset()
    twin = copy.deepcopy(model)
    go(loss_of(model, 2))
    optimizer.step()
    loss_of(twin, 2).backward()
    optim.SGD(twin.parameters(), lr=0.01).step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), **SAME)


def test_reset_drops_gradients_that_were_not_taken():
    """A hook of the user's may fail before the optimizer's is called."""
    model = torch.nn.Linear(2, 1, bias=False)
    other = torch.nn.Parameter(torch.ones(1))
    hook = model.weight.register_post_accumulate_grad_hook(fail)
    optimizer = optim.SGD([*model.parameters(), other], lr=1.0)
    handle = apply_in_backward(model, optimizer)
    other.grad = torch.ones(1)
    with pytest.raises(BrokenError):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    with pytest.raises(ValueError, match=r"after a backward that failed reset\(\)"):
        handle.backward(model(torch.ones(1, 2)).sum(), 1.0)
    handle.reset()
    hook.remove()
    assert model.weight.grad is None
    assert other.grad is None


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_trains_what_was_frozen_or_is_no_part_of_the_model(max_norm):
    models, others = [Tied(), Tied()], [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    late = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [optim.Adam([other, *m.parameters()]) for m, other in zip(models, others)]
    handle = apply_in_backward(models[1], optimizers[1])
    for step in range(4):
        norms = []
        for model, optimizer, other, added in zip(models, optimizers, others, late):
            optimizer.zero_grad()
            loss = loss_of(model, step) + other.square().sum() + added.square().sum()
            if model is models[1]:
                norms.append(handle.backward(loss, max_norm))
            else:
                loss.backward()
                params = [p for group in optimizer.param_groups for p in group["params"]]
                norms.append(torch.nn.utils.clip_grad_norm_(params, max_norm))
            optimizer.step()
            if step == 1:
                optimizer.add_param_group({"params": [added]})
                model.first.bias.requires_grad_(True)
        torch.testing.assert_close(*norms, **SAME)
    assert_same(models, optimizers)
    torch.testing.assert_close(*others, **SAME)
    torch.testing.assert_close(*late, **SAME)
    assert late[0][0] != 1
    assert models[1].first.bias.grad.norm() <= max_norm
    with pytest.raises(ValueError, match=r"got one of parameter 0 of group 0, first.bias, parameter 0 of group 1"):
        handle.backward(loss_of(models[1], 0), max_norm)


def test_a_removed_handle_does_not_clip():
    """Its two passes would leave twice the gradients."""
    model = Tied()
    handle = apply_in_backward(model, optim.Adam(model.parameters()))
    handle.remove()
    with pytest.raises(RuntimeError, match=r"must be in force, got backward\(\) after remove\(\)"):
        handle.backward(loss_of(model, 0), 1.0)
    assert model.last.weight.grad is None


def test_a_step_that_would_clip_finds_no_gradients_and_says_so():
    model = torch.nn.Linear(4, 4)
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    with optim.apply_in_backward(model, optimizer):
        model(torch.ones(1, 4)).sum().backward()
        for options in ({"max_norm": 1.0}, {"scale": 0.5}, {"norms": True}):
            with pytest.raises(RuntimeError, match=r"clip by the handle's backward"):
                optim.fused_step(optimizer, **options)
        optim.fused_step(optimizer, zero_grad=True)
