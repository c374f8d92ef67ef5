"""The command `torch-bp`: what it prints, and its exit codes."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import torch_bp
from torch_bp.cli import main

ROOT = Path(torch_bp.__file__).parent.parent
MODELS = """
import torch
from torch import nn

example = nn.Linear(3, 2)
batch = torch.randn(4, 3)


class Known(nn.Sequential):
    example_input_array = torch.ones(5, 3)

    def __init__(self):
        super().__init__(nn.Linear(3, 2), nn.Sigmoid())


def make():
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh())


def pair():
    return nn.MSELoss(), {"input": torch.randn(4), "target": torch.zeros(4)}


def inputs():
    return (torch.randn(4, 3),)


def failing():
    raise RuntimeError("no such file")


def uncopied():
    model = make()
    model.lock = (number for number in range(3))
    return model


class Nested:
    make = staticmethod(make)
"""
FEW = ["--checks", "outputs,gradients,Adam"]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of the user's in the working folder."""
    (tmp_path / "their_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("their_models", None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["their_models:make", "--inputs", "their_models:inputs"],
        ["their_models:make", "--inputs", "their_models:batch"],
        ["their_models:example", "--inputs", "their_models:batch"],
        ["their_models:Nested.make", "--inputs", "their_models:batch", "--seed", "3"],
        ["their_models:Known"],
        ["their_models:pair"],
    ],
    ids=" ".join,
)
def test_models_and_inputs(arguments, models, capsys):
    assert main(["verify", *arguments, "--checks", "outputs,gradients"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["check", "outputs", "gradients"]
    assert out.endswith("It holds.\n")
    assert not err


def wrong_linear():
    class Linear(torch_bp.nn.Linear):
        def forward(self, input):
            return torch_bp.nn.functional.linear(input, self.weight, self.bias.detach())

    return Linear


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_difference_is_exit_code_1(options, models, monkeypatch, capsys):
    monkeypatch.setattr(torch_bp.nn, "Linear", wrong_linear())
    assert main(["verify", "their_models:Known", *FEW, *options]) == 1
    out = capsys.readouterr().out
    if options:
        read = json.loads(out)
        assert read["holds"] is False
        assert {row["check"]: row["verdict"] for row in read["rows"]} == {
            "outputs": "holds",
            "gradients": "differs",
            "Adam": "holds",
        }
    else:
        assert out.endswith("It does not hold: gradients.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["their_models"], "'their_models' must be MODULE:NAME, such as"),
        (["their_models:"], "must be MODULE:NAME"),
        (["nowhere_at_all:make"], "importing nowhere_at_all raised ModuleNotFoundError: No module named"),
        (["their_models:nowhere"], "their_models must have the name nowhere, got none"),
        (["their_models:failing"], "calling it without arguments raised RuntimeError: no such file"),
        (["their_models:make"], "inputs: their_models:make must come with example inputs, got none. Give --inputs"),
        (["their_models:make", "--inputs", "their_models:failing"], "raised RuntimeError: no such file"),
        (["their_models:batch", "--inputs", "their_models:batch"], "model must be a torch.nn.Module, got Tensor"),
        (["their_models:uncopied", "--inputs", "their_models:batch"], "TypeError: cannot pickle 'generator' object"),
        (["their_models:make", "--inputs", "their_models:example"], "the model must run on example_inputs"),
        (["their_models:Known", "--checks", "nothing"], "checks must be names from outputs, gradients"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_loaded_or_run_is_exit_code_2(arguments, message, models, capsys):
    assert main(["verify", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("torch-bp verify: ")
    assert message in err
    assert not out


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["verify"], ["verify", "a:b", "--seed", "x"]], ids=" ".join)
def test_a_command_that_is_not_understood_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: torch-bp" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "text"), [(["--version"], torch_bp.__version__), (["verify", "-h"], "Example:")])
def test_information(arguments, text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert text in capsys.readouterr().out


def test_as_a_process_from_the_users_folder(models):
    command = [sys.executable, "-m", "torch_bp", "verify", "their_models:Known", *FEW, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=models, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["modules"]["ours"] == {"0": "Linear", "1": "Sigmoid"}


def test_the_installed_command_is_this_one():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"torch-bp": "torch_bp.cli:main"}


def test_asking_for_help_loads_no_torch(models):
    code = (
        "import sys, torch_bp.cli\ntry: torch_bp.cli.main(['-h'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


CHECKED = """
import torch


class Off(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy


def layer():
    return torch.nn.Linear(3, 2), torch.randn(4, 3)


def named():
    return torch.nn.Bilinear(3, 2, 2), {"input1": torch.randn(4, 3), "input2": torch.randn(4, 2)}


class Halved(torch.nn.Linear):
    def forward(self, x):
        return Off.apply(super().forward(x))


def wrong():
    return Halved(3, 2), torch.randn(4, 3)


def numbers():
    return torch.randn(4)
"""


@pytest.fixture
def checked(tmp_path, monkeypatch):
    (tmp_path / "checked_models.py").write_text(CHECKED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "checked_models", raising=False)
    return "checked_models"


def test_gradcheck(checked, capsys):
    assert main(["gradcheck", f"{checked}:layer", "--second"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("gradcheck passed: relative errors are below 1e-07")
    assert "second derivatives: gradcheck passed" in printed
    assert main(["gradcheck", f"{checked}:named", "--full"]) == 0
    assert "parameter weight" in capsys.readouterr().out
    assert main(["gradcheck", f"{checked}:layer", "--as-is", "--rtol", "0.05"]) == 0
    assert "below 5e-02, with eps 1e-03" in capsys.readouterr().out


def test_gradcheck_finds(checked, capsys):
    assert main(["gradcheck", f"{checked}:wrong", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["gradcheck"]
    assert not found["passed"]
    assert "it is 0.5 times the numeric gradient" in found["failure"]
    assert {row["name"] for row in found["rows"]} == {"input 0", "parameter weight", "parameter bias"}
    assert main(["gradcheck", f"{checked}:Off", "--function", "--inputs", f"{checked}:numbers"]) == 1


@pytest.mark.parametrize("arguments", [["nowhere:x"], ["torch.nn:Tanh"], ["torch.nn:Tanh", "--inputs", "torch:pi"]])
def test_gradcheck_cannot_load(arguments, capsys):
    assert main(["gradcheck", *arguments]) == 2
    assert "torch-bp gradcheck: " in capsys.readouterr().err
