"""Steps as graphs of a device: with a stand-in for CUDA's graph, and on a present GPU."""

import copy
import os
import subprocess
import sys

import pytest
import torch

import torch_bp
from torch_bp import nn, optim


@pytest.mark.parametrize("part", ["agreement", "not_finite", "changes", "watched"])
def test_with_a_stand_in_for_the_graph(part, tmp_path):
    pytest.importorskip("triton", reason="Triton is published for Linux and Windows only")
    done = subprocess.run(
        [sys.executable, "-m", "tests.step.graph_program", part],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "TORCH_BP_CACHE": str(tmp_path)},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = {"agreement": "agreed 13", "not_finite": "refused", "changes": "changed", "watched": "watched"}
    assert said[part] in done.stdout


def batches(count, device="cuda"):
    torch.manual_seed(1)
    return [(torch.randn(32, 20, device=device), torch.randint(5, (32,), device=device)) for _ in range(count)]


def model_of(kind):
    torch.manual_seed(0)
    if kind == "norm":
        return nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5)).cuda()
    return nn.MLP([20, 64, 64, 5], activation=kind).cuda()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["relu", "tanh", "gelu", "norm"])
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.1}, {"accumulate": 3}], ids=str)
@pytest.mark.parametrize("maker", [optim.Adam, optim.SGD, torch.optim.Adam])
def test_graphs_train_as_autograd_does(kind, options, maker):
    trained = []
    for explicit in (True, False):
        model = model_of(kind)
        optimizer = maker(model.parameters(), lr=1e-2)
        schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        step, loss_fn = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optimizer, **options), nn.CrossEntropyLoss()
        per, losses = options.get("accumulate", 1), []
        for number, (x, y) in enumerate(batches(12)):
            if explicit:
                losses.append(step(x, y))
            else:
                loss = loss_fn(model(x), y)
                (loss / per).backward()
                losses.append(loss.detach())
                if (number + 1) % per == 0:
                    if "clip_grad_norm" in options:
                        torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_grad_norm"])
                    optimizer.step()
                    optimizer.zero_grad()
            if (number + 1) % per == 0:
                schedule.step()
        step.check()
        trained.append((torch.stack(losses), model.state_dict()))
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("level", [None, "summary", "layers"])
def test_a_step_does_not_wait_for_the_device(level):
    model = model_of("relu")
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()), clip_grad_norm=1.0)
    if level is not None:  # each second step is recorded, and written at the end
        torch_bp.watch(step, level=level, every=2, budget=None, write_every=1000)
    made = batches(20)
    for x, y in made[:6]:
        step(x, y)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for x, y in made[6:]:
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.check()
    assert step.steps == 20


@pytest.mark.cuda
def test_a_batch_with_nan_changes_nothing_on_the_device():
    model = model_of("norm")
    optimizer = optim.Adam(model.parameters())
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    made = batches(6)
    for x, y in made[:5]:
        step(x, y)
    torch.cuda.synchronize()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    made[5][0][3, 2] = float("nan")
    step(*made[5])
    with pytest.raises(FloatingPointError, match=r"at step 6 .* it is in the input"):
        step.check()
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.cuda
def test_dropout_draws_anew_in_a_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1)).cuda()
    step = torch_bp.TrainStep(model, nn.MSELoss(), optim.SGD(model.parameters(), lr=0.0))
    x, y = torch.randn(16, 64, device="cuda"), torch.randn(16, 1, device="cuda")
    losses = torch.stack([step(x, y) for _ in range(8)])
    assert len(losses.unique()) == 8


class Noisy(torch.nn.Module):
    """Draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 1)
        self.generator = torch.Generator("cuda").manual_seed(5)

    def forward(self, x):
        return self.linear(x + torch.rand(x.shape, generator=self.generator, device=x.device))


@pytest.mark.cuda
def test_a_generator_of_the_models_own_goes_on_in_a_graph():
    x, y = torch.randn(16, 64, device="cuda"), torch.randn(16, 1, device="cuda")
    losses = []
    for capture in (True, False):
        torch.manual_seed(0)
        model = Noisy().cuda()
        step = torch_bp.TrainStep(model, nn.MSELoss(), optim.SGD(model.parameters(), lr=0.0), capture=capture)
        losses.append(torch.stack([step(x, y) for _ in range(8)]))
    assert len(losses[0].unique()) == 8
    torch.testing.assert_close(*losses)
