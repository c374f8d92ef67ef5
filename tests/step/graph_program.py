"""Run by `test_device_line.py` in a process of its own: graphs of a device on the CPU, list kernels interpreted.

`StandIn` is in the place of CUDA's graph: it is captured without effect, and a replay runs the captured functions again
over the same memory. All else is what runs on CUDA.
"""

import copy
import sys

import torch

import torch_bp
from torch_bp import nn, optim
from torch_bp.kernels import use
from torch_bp.step import device_line


class StandIn:
    """A graph that is captured by running its functions and taking back what they did."""

    watched = ()  # tensors that the functions write to
    replays = 0

    def __init__(self, pool, device, generators=()):
        self.generators = generators

    def capture(self, first, then):
        before = [t.detach().clone() for t in self.watched]
        random, own = torch.get_rng_state(), [g.get_state() for g in self.generators]
        self.first, self.then, self.made = first, then, first()
        then(self.made)
        with torch.no_grad():
            for t, value in zip(self.watched, before):
                t.copy_(value)
        torch.set_rng_state(random)
        for generator, state in zip(self.generators, own):
            generator.set_state(state)
        return self.made

    def replay(self):
        StandIn.replays += 1
        loss, gradients, output = self.first()
        self.made[0].copy_(loss)
        for target, g in zip(self.made[1], gradients):
            target.copy_(g)
        if output is not None:
            self.made[2].copy_(output)
        self.then(self.made)


class HostNorm(device_line.Norm):
    """Counts how often the host asks for a norm."""

    calls = 0

    def __call__(self):
        HostNorm.calls += 1
        return super().__call__()


device_line.Graph, device_line.Norm = StandIn, HostNorm
on_the_host = device_line.serves


class Noisy(torch.nn.Module):
    """Draws from a generator of its own, and keeps a frozen mean of its inputs."""

    def __init__(self):
        super().__init__()
        self.linear, self.mean = nn.Linear(5, 3), torch.nn.Parameter(torch.zeros(5), requires_grad=False)
        self.generator = torch.Generator().manual_seed(7)

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0))
        return self.linear(x + 0.1 * torch.rand(x.shape, generator=self.generator))


def model_of(kind):
    torch.manual_seed(3)
    if kind == "noisy":
        return Noisy()
    if kind == "norm":
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    return nn.MLP([5, 8, 3], dropout=0.3 if kind == "dropout" else 0.0)


def watch(model, optimizer):
    StandIn.watched = [*model.parameters(), *model.buffers()]
    StandIn.watched += [p.grad for p in model.parameters() if p.grad is not None]
    StandIn.watched += [t for state in optimizer.state.values() for t in state.values() if t.dim()]


def trained(kind, make, on_device, steps=8, spoil=None, schedule=True, **options):
    """Losses, parameters, buffers and step counts after some steps, and the TrainStep."""
    device_line.serves = (lambda _: True) if on_device else on_the_host
    model = model_of(kind)
    optimizer = make(model.parameters())
    scheduled = optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if schedule else None
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optimizer, **options)
    torch.manual_seed(0)
    losses, refused = [], []
    for number in range(steps):
        x, y = torch.randn(6, 5), torch.randint(3, (6,))
        if number == spoil:
            x[2, 1] = float("nan")
        watch(model, optimizer)
        try:
            with use("triton" if on_device else "torch"):
                losses.append(step(x, y))
        except FloatingPointError as error:
            refused.append(str(error))
        if scheduled is not None and (number + 1) % options.get("accumulate", 1) == 0:
            scheduled.step()
    try:
        step.check()
    except FloatingPointError as error:
        refused.append(str(error))
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return losses, [*model.parameters()], [*model.buffers()], counts, step, refused


def same(ours, theirs):
    torch.testing.assert_close(ours[1:4], theirs[1:4], rtol=1e-5, atol=1e-6)


MAKERS = {
    "adam": lambda params: optim.Adam(params, lr=1e-2),
    "sgd": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda params: optim.RMSprop(params, lr=1e-3, centered=True),
}


def agreement():
    checked = 0
    cases = [("plain", name, {}) for name in MAKERS]
    cases += [("dropout", "adam", {}), ("norm", "sgd", {"clip_grad_norm": 0.05}), ("norm", "sgd", {"accumulate": 3})]
    cases += [
        ("plain", "sgd", {"clip_grad_value": 0.01}),
        ("plain", "adam", {"clip_grad_value": 0.01, "clip_grad_norm": 0.02}),
    ]
    cases += [("noisy", "adam", {}), ("plain", "adam", {"keep_output": True}), ("plain", "adamw", {"capture": False})]
    for kind, name, options in cases:
        StandIn.replays = 0
        ours = trained(kind, MAKERS[name], True, **options)
        replays = StandIn.replays
        theirs = trained(kind, MAKERS[name], False, **options)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
        same(ours, theirs)
        # the first of a kind is eager; of three batches in a window, the first, the middle and the last are kinds
        expected = 0 if options.get("capture") is False else 5 if "accumulate" in options else 7
        assert replays == expected, (kind, name, options, replays)
        assert ours[4].steps == theirs[4].steps
        if "keep_output" in options:
            torch.testing.assert_close(ours[4].output, theirs[4].output, rtol=1e-5, atol=1e-6)
        checked += 1
    print("agreed", checked + float16())


def float16():
    """Gradients that overflow for their scale are left out, on the device and without an error."""
    trained = []
    for on_device in (True, False):
        device_line.serves = (lambda _: True) if on_device else on_the_host
        model = model_of("plain")
        optimizer = optim.Adam(model.parameters(), lr=1e-2)
        step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optimizer, precision="fp16")
        step.load_state_dict({"steps": 0, "loss_scale": {"scale": 2.0**22, "healthy": 0}})
        torch.manual_seed(0)
        StandIn.replays = 0
        for _ in range(12):
            x, y = torch.randn(6, 5), torch.randint(3, (6,))
            watch(model, optimizer)
            StandIn.watched += [step._loss_scale.value, step._loss_scale._healthy]
            with use("triton" if on_device else "torch"):
                step(x, y)
        step.check()
        counts = [state["step"] for state in optimizer.state.values()]
        trained.append((step.state_dict(), counts, [p.detach() for p in model.parameters()]))
        assert (StandIn.replays > 5) == on_device
    assert trained[0][:2] == trained[1][:2]
    assert trained[0][0]["loss_scale"]["scale"] < 2.0**22
    torch.testing.assert_close(trained[0][2], trained[1][2], rtol=1e-2, atol=1e-3)
    return 1


def not_finite():
    """A bad batch changes nothing, and the error comes when the next step looks."""
    for kind, options in (("plain", {}), ("norm", {"clip_grad_norm": 1.0}), ("norm", {"accumulate": 2})):
        per = options.get("accumulate", 1)
        good = trained(kind, MAKERS["adam"], True, steps=4 * per, schedule=False, **options)
        assert not good[5]
        spoil = 3 * per + per - 1
        model_before = trained(kind, MAKERS["adam"], True, steps=spoil - per + 1, schedule=False, **options)
        spoiled = trained(kind, MAKERS["adam"], True, steps=4 * per, spoil=spoil, schedule=False, **options)
        assert len(spoiled[5]) == 1, spoiled[5]
        assert "at step 4" in spoiled[5][0]
        assert "it is in the input" in spoiled[5][0]
        # parameters and step counts as before the window
        torch.testing.assert_close(spoiled[1], model_before[1], rtol=0, atol=0)
        torch.testing.assert_close(spoiled[3], model_before[3], rtol=0, atol=0)
        if per == 1:
            torch.testing.assert_close(spoiled[2], model_before[2], rtol=0, atol=0)
    # NaN in a batch that is not the last of its window: told of that batch, and statistics are not NaN
    spoiled = trained("norm", MAKERS["adam"], True, steps=8, spoil=6, schedule=False, accumulate=2)
    assert len(spoiled[5]) == 1
    assert "at step 4" in spoiled[5][0]
    assert "it is in the input" in spoiled[5][0]
    assert all(b.isfinite().all() for b in spoiled[2])
    # and training goes on
    losses, *_, refused = trained("plain", MAKERS["adam"], True, steps=10, spoil=4)
    assert len(refused) == 1
    assert torch.stack(losses[-3:]).isfinite().all()
    print("refused")


def changes():
    """What a graph froze is looked at, and captured anew when it has changed."""
    device_line.serves = lambda _: True
    model = model_of("plain")
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    plain_model = copy.deepcopy(model)
    plain = optim.Adam(plain_model.parameters(), lr=1e-2)
    loss_fn = nn.CrossEntropyLoss()

    def both(x, y):
        watch(model, optimizer)
        with use("triton"):
            ours = step(x, y)
        plain.zero_grad()
        loss = loss_fn(plain_model(x), y)
        loss.backward()
        plain.step()
        torch.testing.assert_close(ours, loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close([*model.parameters()], [*plain_model.parameters()], rtol=1e-5, atol=1e-6)

    def batch(size=6):
        return torch.randn(size, 5), torch.randint(3, (size,))

    for _ in range(3):
        both(*batch())
    for group in (optimizer.param_groups[0], plain.param_groups[0]):
        group["lr"], group["betas"] = 0.03, (0.8, 0.95)
    StandIn.replays = 0
    both(*batch())
    assert StandIn.replays == 1, "rate and betas are numbers"
    with use("triton"):
        optimizer.step()  # by hand
    plain.step()
    both(*batch())
    assert StandIn.replays == 2, "a step by hand is no reason for a new graph"
    for group in (optimizer.param_groups[0], plain.param_groups[0]):
        group["weight_decay"] = 0.1  # another kernel
    for _ in range(3):
        both(*batch())
    for group in (optimizer.param_groups[0], plain.param_groups[0]):
        group["lr"] = torch.tensor(0.02)
    for _ in range(3):
        both(*batch())
    both(*batch(4))
    both(*batch(4))
    StandIn.replays = 0
    for _ in range(4):  # a smaller last batch in every epoch, and gradients that are cleared
        both(*batch())
        both(*batch(4))
        optimizer.zero_grad(set_to_none=True)
    assert StandIn.replays == 8, "neither is a reason for a new graph"
    assert len(step._runner.lines) <= 3
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    for _ in range(3):
        both(*batch())
    with torch.no_grad():
        for one in (model, plain_model):
            one[0].weight.requires_grad_(False)
    for _ in range(3):
        both(*batch())
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    both(*batch())
    both(*batch())
    assert len(seen) == 2, "hooks are called"
    # gradients by hand, added to those that are there
    x, y = batch()
    for p in (*model.parameters(), *plain_model.parameters()):
        p.grad = None
    for _ in range(3):
        watch(model, optimizer)
        with use("triton"):
            step.backward(x, y, 0.5)
        (0.5 * loss_fn(plain_model(x), y)).backward()
        wanted = [p.grad for p in plain_model.parameters() if p.grad is not None]
        torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], wanted)
    print("changed")


def watched():
    """What a monitor reads of graphs is what it reads on the CPU; it changes no weight, and other steps stay graphs."""
    for options in ({}, {"accumulate": 2}, {"clip_grad_norm": 0.05}):
        readings, weights = [], []
        for on_device, every in ((True, 2), (False, 2), (True, None)):
            device_line.serves = (lambda _: True) if on_device else on_the_host
            model = model_of("plain")
            optimizer = optim.Adam(model.parameters(), lr=1e-2)
            step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optimizer, **options)
            monitor = None if every is None else torch_bp.watch(step, level="full", every=every, budget=None)
            torch.manual_seed(0)
            StandIn.replays = HostNorm.calls = 0
            for _ in range(8 * options.get("accumulate", 1)):
                watch(model, optimizer)
                with use("triton" if on_device else "torch"):
                    step(torch.randn(6, 5), torch.randint(3, (6,)))
            # the host asks for a norm, and waits, in the first step of a kind alone: of a batch, watched or not
            assert not on_device or HostNorm.calls == (1 if every is None else 2) * options.get("accumulate", 1)
            step.check()
            weights.append([p.detach().clone() for p in model.parameters()])
            if monitor is not None:
                readings.append(monitor.readings)
                batches = 8 * options.get("accumulate", 1)
                assert not on_device or StandIn.replays == batches - HostNorm.calls, "the first of each kind is eager"
        assert [r.step for r in readings[0]] == [r.step for r in readings[1]] == [0, 2, 4, 6]
        for ours, theirs in zip(*readings):
            assert (ours.batch, ours.clipped) == (theirs.batch, theirs.clipped)
            for name, layer in theirs.layers.items():
                for field in ("signal_norm", "activation_mean", "grad_norm", "update_norm", "weight_factor"):
                    one, other = (getattr(each, field) for each in (ours.layers[name], layer))
                    assert one is not None or field == "weight_factor", (name, field)
                    assert one == other or abs(one - other) <= 1e-4 * abs(other) + 1e-7, (field, one, other)
        torch.testing.assert_close(weights[0], weights[2], rtol=1e-6, atol=1e-7)
    print("watched")


if __name__ == "__main__":
    {"agreement": agreement, "not_finite": not_finite, "changes": changes, "watched": watched}[sys.argv[1]]()
