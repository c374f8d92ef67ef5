"""The commands `torch-bp lr-preview` and `lr-find`: what they print, their files, and their exit codes."""

import builtins
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_bp
from torch_bp.cli import main
from torch_bp.optim import lr_scheduler

ROOT = Path(torch_bp.__file__).parent.parent
PATH = "torch_bp.optim.lr_scheduler."
STEP = ["--lr_scheduler", PATH + "StepLR", "--init_args", "step_size=2"]
NESTED = """
optimizer: {class_path: torch_bp.optim.AdamW, init_args: {lr: 2e-3}}
lr_scheduler:
  class_path: torch_bp.optim.lr_scheduler.warmup
  init_args:
    steps: 3
    start_factor: 0.5
    schedule:
      class_path: torch_bp.optim.lr_scheduler.ChainedScheduler
      init_args:
        schedulers:
        - {class_path: torch_bp.optim.lr_scheduler.StepLR, init_args: {step_size: 2, gamma: 0.5}}
        - {class_path: torch_bp.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.9}}
"""
FIND = """
import torch
from torch_bp import nn

def model():
    return nn.Linear(4, 1)

def batches():
    x = torch.randn(32, 4)
    return [(x, x.sum(1, keepdim=True))]

def nothing():
    return []

class Rising(torch.nn.Module):
    calls = 0
    def forward(self, output, target):
        self.calls += 1
        return output.sum() * 0 + self.calls
"""
FIND_CONFIG = """
model: their_parts.model
loss: torch_bp.nn.MSELoss
optimizer: {class_path: torch_bp.optim.SGD, init_args: {lr: 0.1}}
batches: their_parts.batches
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "their_parts.py").write_text(FIND)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("their_parts", None)


def previewed(capsys, *arguments):
    assert main(["lr-preview", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["lr"]


def test_flags(capsys):
    rates = previewed(capsys, *STEP, "gamma=5e-1", "--steps=5")
    assert rates == {"StepLR": [0.1, 0.1, 0.05, 0.05, 0.025]}
    rates = previewed(
        capsys, "--lr_scheduler", PATH + "LinearLR", "--init_args", "total_iters=4", "--lr=3", "--steps", "5"
    )
    assert rates["LinearLR"] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])


def test_a_file_with_composites(folder, capsys):
    (folder / "a.yaml").write_text(NESTED)
    [rates] = previewed(capsys, "a.yaml", "--steps", "9").values()
    assert rates == pytest.approx(
        [2e-3 * f for f in (0.5, 2 / 3, 5 / 6, *(0.9**t * 0.5 ** (t // 2) for t in range(6)))]
    )
    [again] = previewed(capsys, "a.yaml", "--steps", "9", "--lr", "0.02").values()
    assert again == pytest.approx([10 * lr for lr in rates])


@pytest.mark.parametrize("recipe", ["digits", "breast_cancer", "diabetes"])
def test_recipes(recipe, capsys):
    [(name, rates)] = previewed(capsys, str(ROOT / "recipes" / f"{recipe}.yaml"), "--steps", "50").items()
    assert len(rates) == 50
    assert hasattr(lr_scheduler, name)


def test_json_files_and_a_metric_that_stands_still(folder, capsys):
    item = {"class_path": PATH + "ReduceLROnPlateau", "init_args": {"patience": 1, "factor": 0.5}}
    (folder / "a.json").write_text(json.dumps({"lr_scheduler": item}))
    assert previewed(capsys, "a.json", "--steps", "6")["ReduceLROnPlateau"] == [0.1, 0.1, 0.1, 0.05, 0.05, 0.025]
    arguments = ["a.json", "--steps", "6", "--init_args", "patience=0"]
    assert previewed(capsys, *arguments)["ReduceLROnPlateau"][3] == 0.025


@pytest.mark.parametrize(("name", "length"), [("OneCycleLR", "total_steps"), ("CosineAnnealingLR", "T_max")])
def test_a_length_that_is_left_out_is_that_of_the_preview(name, length, capsys):
    more = ["max_lr=0.1"] if name == "OneCycleLR" else ["eta_min=0"]
    command = ["--lr_scheduler", PATH + name, "--steps", "8", "--init_args", *more]
    assert previewed(capsys, *command) == previewed(capsys, *command, f"{length}=8")
    assert main(["lr-preview", *command]) == 0
    assert capsys.readouterr().out.startswith(f"{name}, lr in 8 steps, {length}=8\n")
    assert main(["lr-preview", *command, f"{length}=8"]) == 0
    assert capsys.readouterr().out.startswith(f"{name}, lr in 8 steps\n")


def test_labels_below_a_narrow_chart(capsys):
    for steps, labels in (("1", ["0"]), ("2", ["0", "1"]), ("12", ["0", "11"])):
        assert main(["lr-preview", *STEP, "--steps", steps]) == 0
        assert capsys.readouterr().out.splitlines()[-1].split() == labels


def test_chart_and_picture(folder, capsys):
    pytest.importorskip("matplotlib")
    assert main(["lr-preview", *STEP, "gamma=0.9", "--png", "a.png"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "StepLR, lr in 100 steps"
    assert lines[1].startswith("       0.1 |")
    assert lines[-1] == "a.png"
    assert out.isascii()
    assert "\x1b" not in out
    assert (folder / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_sheet_of_the_recipes_has_every_schedule(capsys):
    rates = previewed(capsys, str(ROOT / "recipes" / "schedules.yaml"))
    missing = [n for n in torch.optim.lr_scheduler.__all__ if n not in " ".join(rates) and n != "LRScheduler"]
    assert not missing
    assert (ROOT / "recipes" / "figures" / "schedules.png").stat().st_size < 300_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a schedule must be named, got none. Give a file"),
        (["nowhere.yaml"], "nowhere.yaml: No such file"),
        (["list.yaml"], "the file must hold a mapping, got list"),
        (["broken.yaml"], "broken.yaml: not valid YAML or JSON"),
        (["several.yaml", "--init_args", "a=1"], "`schedules` has several"),
        (["keys.yaml"], "only class_path and init_args may stand beside it, got ['gamma']"),
        (["--lr_scheduler", "StepLR"], "'StepLR' must be a full path"),
        (["--lr_scheduler", PATH + "Nothing"], "must have the name Nothing, got none."),
        (["--lr_scheduler", PATH + "CosineLR"], "name CosineLR, got none; the nearest are .*CosineAnnealingLR"),
        (["--lr_scheduler", "no.where.StepLR"], "no.where.StepLR cannot be imported: ModuleNotFoundError"),
        (["--lr_scheduler", PATH + "StepLR"], "StepLR: init_args must have step_size, got none."),
        (["key.yaml"], "lr_schedular: there is no such key. Write lr_scheduler instead."),
        (["empty.yaml"], "a schedule must be named, got none in empty.yaml, which has seed, lr. Give"),
        (
            ["--lr_scheduler", PATH + "StepLR", "--init_args", "stepsize=3"],
            "StepLR: there is no argument stepsize; the nearest are step_size; accepted are step_size, gamma, last_",
        ),
        (
            ["--lr_scheduler", PATH + "StepLR", "--init-args", "step_size=thirty"],
            "StepLR: step_size must be a number, got 'thirty'.",
        ),
        (
            ["--lr-scheduler", PATH + "LambdaLR", "--init_args", "lr_lambda=lambda t: 0.5**t"],
            "lr_lambda must be a function, which a file cannot hold, got .*Give the class_path",
        ),
        (["--lr_scheduler", PATH + "CosineAnnealingLR", "--init_args", "T_max=0"], "T_max must not be 0, got 0."),
        (["nested.yaml"], "CosineAnnealingLR: init_args must have T_max, got none."),
        (
            ["--lr_scheduler", PATH + "ExponentialLR", "--init_args", "gamma=[1]"],
            "ExponentialLR: .*TypeError.*init_args: gamma=\\[1\\]",
        ),
        (
            ["--lr_scheduler", PATH + "MultiStepLR", "--init_args", "milestones=3"],
            "not iterable; init_args: milestones=3",
        ),
        (["--lr_scheduler", PATH + "StepLR", "--init_args", "step_size"], "'step_size' must be NAME=VALUE"),
        (["--lr_scheduler", PATH + "LinearLR", "--init_args", "start_factor=0"], "Starting multiplicative factor"),
        (
            ["--lr_scheduler", PATH + "OneCycleLR", "--init_args", "max_lr=1", "total_steps=9"],
            "OneCycleLR: Tried to step 10 times. The specified number of total steps is 9. Take fewer --steps.",
        ),
        ([*STEP, "--png", "no/where.png"], "No such file"),
        (
            ["--lr_scheduler", PATH + "ExponentialLR", "--init_args", "gamma=1e200"],
            "ExponentialLR: the rate must be finite, got inf at step 2",
        ),
        (
            ["--lr_scheduler", PATH + "ExponentialLR", "--init_args", "gamma=1e200", "--json"],
            "ExponentialLR: the rate must be finite, got inf at step 2",
        ),
        (
            [
                "--lr_scheduler",
                PATH + "CyclicLR",
                "--init_args",
                "base_lr=1",
                "max_lr=2",
                "mode=exp_range",
                "gamma=1e9",
            ],
            "CyclicLR: .*Take fewer --steps",
        ),
        ([*STEP, "--lr=nan"], "StepLR: the rate must be finite, got nan at step 0"),
        ([*STEP, "--lr=inf"], "StepLR: the rate must be finite, got inf at step 0"),
        ([*STEP, "--png", "no/where.png"], "--png: no/where.png must lie in a folder, got none; No such file"),
        ([*STEP, "--png", "."], "preview: .*: Is a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_preview_refuses_with_exit_code_2(arguments, message, folder, capsys):
    (folder / "list.yaml").write_text("[1, 2]")
    (folder / "broken.yaml").write_text("a: [1")
    (folder / "several.yaml").write_text(f"schedules: {{a: {PATH}StepLR}}")
    (folder / "keys.yaml").write_text(f"lr_scheduler: {{class_path: {PATH}ExponentialLR, gamma: 0.9}}")
    (folder / "key.yaml").write_text(f"lr_schedular: {PATH}ExponentialLR")
    (folder / "empty.yaml").write_text("seed: 1\nlr: 2")
    inner = {"class_path": PATH + "CosineAnnealingLR"}
    nested = {"class_path": PATH + "warmup", "init_args": {"steps": 3, "schedule": inner}}
    (folder / "nested.yaml").write_text(json.dumps({"lr_scheduler": nested}))
    assert main(["lr-preview", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("torch-bp lr-preview: ")
    assert __import__("re").search(message, err) or message in err
    assert not out


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        (
            "matplotlib.figure",
            "recipes",
            [*STEP, "--png", "a"],
        ),
        ("yaml", "lightning", ["a.yaml"]),
    ],
)
def test_a_missing_package_names_its_extra(package, extra, arguments, folder, monkeypatch, capsys):
    (folder / "a.yaml").write_text(NESTED)
    known = builtins.__import__

    def without(name, *rest):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return known(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["lr-preview", *arguments]) == 2
    assert f'pip install "torch_bp[{extra}]"' in capsys.readouterr().err


@pytest.mark.parametrize("command", ["lr-preview", "lr-find"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"Example: torch-bp {command} " in " ".join(capsys.readouterr().out.split())
    for bad in (["--steps", "0"], ["--steps", "x"]):
        with pytest.raises(SystemExit) as caught:
            main([command, "a.yaml", *bad])
        assert caught.value.code == 2


def test_find(folder, capsys):
    (folder / "a.yaml").write_text(FIND_CONFIG)
    assert main(["lr-find", "a.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.01 < found["suggestions"]["steepest"] < 1
    assert len(found["lr"]) == len(found["losses"]) <= 100
    assert main(["lr-find", "a.yaml", "--steps", "60"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("smoothed loss over the learning rate")
    assert out.splitlines()[-4].startswith("Begin with lr = 0.")
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["steepest", "minimum", "valley"]
    assert out.isascii()


def test_find_in_a_recipe(folder, capsys):
    pytest.importorskip("lightning")
    pytest.importorskip("sklearn")
    arguments = [str(ROOT / "recipes" / "digits.yaml"), "--json", "--steps", "30", "--min_lr", "1e-5", "--png", "a.png"]
    assert main(["lr-find", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 1e-4 < found["suggestions"]["steepest"] < 1
    assert (folder / "a.png").exists()
    assert not (folder / "logs").exists()


def test_a_loss_that_only_rises_is_exit_code_1(folder, capsys):
    (folder / "a.yaml").write_text(FIND_CONFIG.replace("torch_bp.nn.MSELoss", "their_parts.Rising"))
    assert main(["lr-find", "a.yaml"]) == 1
    out = capsys.readouterr().out
    assert "the loss must fall somewhere" in out
    assert "number 1. Take a smaller min_lr." in out
    assert main(["lr-find", "a.yaml", "--steps", "3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("Take more steps: the rates are apart by a factor of 1e+04.")
    assert lines[-3].split() == ["1e-07", "10"]  # as far apart as they need


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("their_parts.batches", "their_parts.nothing", "batches must hold at least one batch"),
        ("their_parts.model", "their_parts.none", "their_parts must have the name none"),
        ("loss:", "los:", "got no loss; it has model, los, optimizer, batches. For loss the nearest is los"),
        ("torch_bp.optim.SGD", "torch_bp.optim.SDG", "SDG, got none; the nearest are SGD"),
        ("{lr: 0.1}", "{l: 0.1}", "SGD: there is no argument l; the nearest are lr; accepted are lr, momentum"),
        ("their_parts.batches", "their_parts.Rising", "lr-find: TypeError: lr_find: batches must be"),
        ("loss:", "data:\nloss:", "TypeError"),
        (
            "model:",
            "data:\nmodle:",
            "got no model; it has data, modle, loss, optimizer, batches. For model the nearest is",
        ),
    ],
)
def test_find_refuses_with_exit_code_2(old, new, message, folder, capsys):
    (folder / "a.yaml").write_text(FIND_CONFIG.replace(old, new))
    assert main(["lr-find", "a.yaml"]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out


LIGHTNING = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule

class Data(LightningDataModule):
    def __init__(self, size: int = 8):
        super().__init__()
        self.size = size

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(self.size, 2), 4)

class Model(LightningModule):
    def __init__(self, loss: bool = True):
        super().__init__()
        self.linear, self.loss = torch.nn.Linear(2, 1), loss

    def training_step(self, batch, batch_idx):
        return self.linear(batch).square().mean() if self.loss else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*returned `None`", "ignore:.*is zero")
@pytest.mark.parametrize(("size", "loss"), [(8, True), (0, True), (8, False)])
def test_find_without_batches_or_losses_is_exit_code_2(size, loss, folder, capsys):
    pytest.importorskip("lightning")
    (folder / "their_parts.py").write_text(LIGHTNING)
    parts = {"data": {"size": size}, "model": {"loss": loss}}
    classes = {"data": "their_parts.Data", "model": "their_parts.Model"}
    config = {key: {"class_path": classes[key], "init_args": parts[key]} for key in parts}
    (folder / "a.json").write_text(json.dumps(config | {"trainer": {"accelerator": "cpu"}}))
    assert main(["lr-find", "a.json", "--steps", "20", "--json"]) == (0 if size and loss else 2)
    out, err = capsys.readouterr()
    assert bool(out) == bool(size and loss)
    if not out:
        message = "torch-bp lr-find: data: it must give at least one batch with a loss, got none"
        assert message in err


def test_as_a_process(folder):
    command = [sys.executable, "-m", "torch_bp", "lr-preview", "--lr_scheduler", PATH + "StepLR", "--init_args"]
    done = subprocess.run(
        [*command, "step_size=30"], capture_output=True, cwd=folder, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert not done.stderr
