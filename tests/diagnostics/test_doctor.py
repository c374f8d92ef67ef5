"""`torch-bp doctor`: runs and checkpoints, sick, well, torn and foreign ones."""

import json
import shutil

import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torch_bp
from torch_bp.cli import main
from torch_bp.diagnostics import Reading, examine, write_readings


def train(folder, steps=30, bias=0.0, lr=1e-2):
    """A small run that is watched."""
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    nn.init.constant_(model[0].bias, bias)
    optimizer, loss_fn = torch.optim.Adam(model.parameters(), lr=lr), nn.CrossEntropyLoss()
    x = torch.randn(32 * steps, 8)
    y = x[:, :3].argmax(1)
    with torch_bp.watch(model, optimizer, folder, loss_fn=loss_fn, every=1, budget=None):
        for inputs, target in zip(x.split(32), y.split(32)):
            optimizer.zero_grad()
            loss_fn(model(inputs), target).backward()
            optimizer.step()
    return model, optimizer


def kinds(path, **options):
    return [found.kind for found in examine(path, **options).findings]


def test_a_run_that_is_well(tmp_path, capsys):
    train(tmp_path / "run")
    assert main(["doctor", str(tmp_path / "run")]) == 0
    assert "run of 30 readings, steps 0 to 29\nNothing was found." in capsys.readouterr().out
    assert main(["doctor", str(tmp_path)]) == 0  # the only run below it


def test_a_run_that_is_not(tmp_path, capsys):
    train(tmp_path, bias=-50.0)
    assert main(["doctor", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "layer 0, steps 0 to 29: dead units" in out
    assert main(["doctor", str(tmp_path / "readings.jsonl"), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    found = next(each for each in said["findings"] if each["kind"] == "dead units")
    assert (found["layer"], found["step"], found["value"], found["severity"]) == ("0", 0, 1.0, "error")


def test_events_alone_tell_what_scalars_can(tmp_path):
    train(tmp_path, lr=3.0)
    (tmp_path / "readings.jsonl").unlink()
    assert "rate too high" in kinds(tmp_path)


def test_events_of_another_loop(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(60):
            writer.add_scalar("train_loss", 2.3 if step < 50 else float("nan"), step)
            writer.add_scalar("lr-Adam", 1e-3, step)
            writer.add_scalar("accuracy", 0.1, step)
    found = examine(tmp_path)
    assert (found.findings[0].kind, found.findings[0].step) == ("NaN or Inf", 50)
    assert found.subject == "run of 60 readings, steps 0 to 59"


def test_layers_of_events_are_in_the_order_of_the_model(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            for name, signal in (("z", 1e-9), ("m", 1e-4), ("a", 1.0)):
                writer.add_scalar(f"delta/{name}", signal, step)
    (found,) = examine(tmp_path).findings
    assert (found.kind, found.layer) == ("vanishing gradient", "z")


def test_a_resumed_run_counts_once(tmp_path):
    first = [Reading(step, loss=1.0) for step in range(10)]
    write_readings(tmp_path / "readings.jsonl", first + [Reading(step, loss=0.9) for step in range(5, 12)])
    assert examine(tmp_path).subject == "run of 12 readings, steps 0 to 11"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "got none of that name"),
        (lambda d: d.mkdir(), "got nothing"),
        (lambda d: (d.mkdir(), (d / "notes.txt").touch()), "got notes.txt"),
        (lambda d: (d.mkdir(), (d / "readings.jsonl").touch()), "it holds no whole line"),
        (lambda d: (d.mkdir(), (d / "readings.jsonl").write_text('{"step": 1, "lo')), "it holds no whole line"),
        (
            lambda d: (d.mkdir(), (d / "x.jsonl").write_text('{"epoch": 1}\n')),
            "line must be what Reading.to_json writes",
        ),
        (lambda d: (d.mkdir(), (d / "x.jsonl").write_text("[1, 2]\n")), "line must be what Reading.to_json writes"),
        (lambda d: (d.mkdir(), (d / "x.jsonl").write_bytes(b"\xff\xfe\x00\n")), "must be text"),
        (lambda d: (d.mkdir(), [(d / f"{n}.jsonl").touch() for n in "ab"]), "got a.jsonl, b.jsonl"),
        (lambda d: (d.mkdir(), (d / "events.out.tfevents.1").write_bytes(b"no events")), "no scalar that is known"),
        (lambda d: d.touch(), "got an empty one"),
        (lambda d: d.write_bytes(b"PK\x03\x04 cut off"), "must be a whole file of torch.save"),
        (lambda d: d.write_text("a text\n"), "got something else"),
        (lambda d: torch.save({"loss": 1.0}, d), "must hold a state_dict, got loss"),
        (lambda d: torch.save([1, 2], d), "must hold a state_dict, got list"),
        (lambda d: torch.save(nn.Linear(2, 2), d), "Pass --trust"),
    ],
)
def test_what_cannot_be_read(tmp_path, capsys, make, message):
    make(tmp_path / "it")
    assert main(["doctor", str(tmp_path / "it")]) == 2
    assert message in capsys.readouterr().err


def test_several_runs_are_to_be_chosen_from(tmp_path, capsys):
    for name in ("version_0", "version_1"):
        (tmp_path / name).mkdir()
        write_readings(tmp_path / name / "readings.jsonl", [Reading(0, loss=1.0)])
    assert main(["doctor", str(tmp_path)]) == 2
    assert "got 2: version_0, version_1. Name one of them." in capsys.readouterr().err


def test_half_a_checkpoint(tmp_path, capsys):
    torch.save(nn.Linear(100, 100).state_dict(), tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
    assert main(["doctor", str(tmp_path / "half.pt")]) == 2
    assert "must be a whole file of torch.save" in capsys.readouterr().err


@pytest.fixture
def trained(tmp_path):
    return train(None)


@pytest.mark.parametrize("form", ["state_dict", "lightning", "usual", "optimizer", "module"])
def test_checkpoints_that_are_well(tmp_path, trained, form):
    model, optimizer = trained
    content = {
        "state_dict": model.state_dict(),
        "lightning": {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 7},
        "usual": {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "loss": 0.1},
        "optimizer": optimizer.state_dict(),
        "module": model,
    }[form]
    torch.save(content, tmp_path / "it.ckpt")
    found = examine(tmp_path / "it.ckpt", trust=form == "module")
    assert found.findings == ()
    assert ("step 7" in found.subject) == (form in ("lightning", "usual"))


def set_weight(value):
    def change(model, optimizer):
        with torch.no_grad():
            model[0].weight[:] = value

    return change


def scale_weight(factor):
    def change(model, optimizer):
        with torch.no_grad():
            model[0].weight.mul_(factor)

    return change


@torch.no_grad()
def one_nan(model, optimizer):
    model[0].weight[1, 2] = float("nan")


@torch.no_grad()
def lower_bias(model, optimizer):
    model[0].bias[:20] = -1000.0


@torch.no_grad()
def no_rows(model, optimizer):
    model[0].weight[:20] = 0.0


def rate(value):
    def change(model, optimizer):
        optimizer.param_groups[0]["lr"] = value

    return change


def nan_in_state(model, optimizer):
    optimizer.state[model[0].weight]["exp_avg"][0, 0] = float("nan")


def no_gradient(model, optimizer):
    optimizer.state[model[0].weight]["exp_avg_sq"].zero_()


def never_used(model, optimizer):
    del optimizer.state[model[0].bias]


@pytest.mark.parametrize(
    ("change", "kind", "layer", "words"),
    [
        (one_nan, "NaN or Inf", "0", "1 of 256 values of 0.weight"),
        (set_weight(0.0), "bad initialization", "0", "all weights are 0"),
        (set_weight(0.1), "bad initialization", "0", "same weights"),
        (scale_weight(1000.0), "bad initialization", "0", "too large"),
        (scale_weight(1e-4), "bad initialization", "0", "too small"),
        (lower_bias, "dead units", "0", "20 of 32 units"),
        (no_rows, "dead units", "0", "20 of 32 units"),
        (rate(0.0), "rate too low", "", "is 0"),
        (rate(3.0), "rate too high", "", "a rate of 3"),
        (nan_in_state, "NaN or Inf", "", "exp_avg of parameter 0"),
        (no_gradient, "no gradient", "", "gradients of parameter 0"),
        (never_used, "unused parameters", "", "parameter 1 never"),
    ],
)
def test_checkpoints_that_are_not(tmp_path, trained, capsys, change, kind, layer, words):
    change(*trained)
    torch.save({"state_dict": trained[0].state_dict(), "optimizer_states": [trained[1].state_dict()]}, tmp_path / "it")
    (found,) = examine(tmp_path / "it").findings
    assert (found.kind, found.layer) == (kind, layer)
    assert words in found.cause
    assert main(["doctor", str(tmp_path / "it")]) == 1
    assert kind in capsys.readouterr().out


def test_names_of_parameters_that_the_optimizer_knows(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.named_parameters())
    model[1](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "it")
    assert examine(tmp_path / "it").subject.endswith(", 1 optimizer")
    (found,) = examine(tmp_path / "it").findings
    assert (found.kind, found.layer) == ("unused parameters", "0")
    assert "0.weight, 0.bias never had a gradient" in found.cause


def test_embeddings_and_norms_are_no_linear_maps(tmp_path):
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4096), "norm": nn.LayerNorm(8), "norm2": nn.BatchNorm1d(8)})
    torch.save(model.state_dict(), tmp_path / "it")
    assert kinds(tmp_path / "it") == []


def test_a_run_without_tensorboard(tmp_path, monkeypatch, capsys):
    (tmp_path / "events.out.tfevents.1").touch()
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.backend.event_processing.event_accumulator", None)
    assert main(["doctor", str(tmp_path)]) == 2
    assert 'pip install "torch_bp[tensorboard]"' in capsys.readouterr().err
    shutil.rmtree(tmp_path)


def sick_run():
    """What `train` trains with a bias that kills its rectifiers."""
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    nn.init.constant_(model[0].bias, -50.0)
    x = torch.randn(128, 8)
    batches = list(zip(x.split(32), x[:, :3].argmax(1).split(32)))
    return model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=1e-2), batches


CURE = ["--cure", "tests.diagnostics.test_doctor:sick_run"]


def test_cures_are_tried(tmp_path, capsys):
    train(tmp_path, bias=-50.0)
    assert main(["doctor", str(tmp_path), *CURE]) == 1
    said = capsys.readouterr().out
    assert "dead units: weights drawn anew by torch_bp.nn.init.auto_, 20 steps on a copy" in said
    assert "  it helps" in said
    assert main(["doctor", str(tmp_path), *CURE, "--json", "--steps", "5"]) == 1
    content = json.loads(capsys.readouterr().out)
    trial = next(each for each in content["cures"] if each["kind"] == "dead units")
    assert (trial["layer"], trial["action"], trial["cured"], trial["reason"]) == ("0", "init", True, "")
    assert trial["values"] == {"before": 1.0}
    assert [len(losses) for losses in trial["losses"].values()] == [5, 5]
    assert trial["losses"]["after"][-1] < trial["losses"]["before"][-1]
    assert len(content["cures"]) == len(content["findings"])


def test_cures_of_what_is_well(tmp_path, capsys):
    train(tmp_path)
    assert main(["doctor", str(tmp_path), *CURE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cures"] == []


def no_batches():
    return (*sick_run()[:3], [])


def three():
    return sick_run()[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cure", "tests.diagnostics.test_doctor:nothing"], "nothing"),
        (["--cure", "tests.diagnostics.test_doctor:three"], "model, loss_fn, optimizer and batches, got 3 values"),
        (["--cure", "tests.diagnostics.test_doctor:no_batches"], "batches must be a list of pairs"),
        ([*CURE, "--steps", "0"], "steps must be a whole number of 1 or more, got 0"),
    ],
)
def test_cures_that_cannot_be_tried(tmp_path, capsys, arguments, message):
    train(tmp_path, bias=-50.0)
    assert main(["doctor", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_readings_of_several_runs_at_once(tmp_path):
    path = tmp_path / "readings.jsonl"
    write_readings(path, [Reading(step) for step in range(5) for _ in range(2)])
    with pytest.raises(ValueError, match="must hold one run, got lines of several at once, as steps go back 5 times"):
        examine(tmp_path)
    path.unlink()
    write_readings(path, [Reading(step) for step in (*range(9), *range(4, 9), *range(2, 12))])  # resumed twice
    assert examine(tmp_path).subject
