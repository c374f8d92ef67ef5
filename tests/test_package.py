"""The house as a whole: torch's names, what importing loads, and which room may import which."""

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_bp

ROOT = Path(torch_bp.__file__).parent
MIRRORED = ["nn", "nn.functional", "nn.init", "nn.utils", "optim", "optim.lr_scheduler", "autograd"]
# A room, and the rooms that it may import; `step`, `diagnostics` and the files above them come last.
ROOMS = {
    "kernels": set(),
    "autograd": {"kernels"},
    "ops": {"autograd", "kernels"},
    "nn": {"ops", "autograd", "kernels"},
    "optim": {"kernels"},
    "step": {"nn", "ops", "autograd", "kernels", "optim"},
    "diagnostics": {"autograd", "ops", "kernels"},
    "lightning": {"optim", "config", "chart", "step", "diagnostics"},
    "lr_commands": {"cli", "chart", "config", "optim", "lightning"},
    "pytest_plugin": {"autograd"},
    "doctor_command": {"cli", "cure", "diagnostics"},
    "chart": set(),
    "config": set(),
}
EVERYONE = {"_json", "_mirror", "_version"}
ONLY_IN = {
    "numba": "kernels/",
    "triton": "kernels/",
    "lightning": "lightning/",
    "jsonargparse": "lightning/",
    "matplotlib": ("chart.py", "optim/range_test.py", "step/figure.py"),
    "yaml": "config.py",
    "pytest": "pytest_plugin.py",
    "tensorboard": ("diagnostics/writers.py", "diagnostics/event_file.py"),
}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def imported(path):
    """Full names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(name):
    """The room of an imported name, or of a file; '' for names outside of the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "torch_bp" and len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=str)
def test_rooms_import_downwards(path):
    room = path.parts[0].removesuffix(".py")
    if room in ROOMS:
        allowed = ROOMS[room] | EVERYONE | {room, ""}
        assert {room_of(name) for name in imported(path)} <= allowed


@pytest.mark.parametrize("path", FILES, ids=str)
def test_optional_packages_have_one_home(path):
    for name in imported(path):
        home = ONLY_IN.get(name.split(".")[0], "")
        assert path.as_posix().startswith(home), f"{path} imports {name}"


def test_the_rooms_are_seen():
    """The tests above read something."""
    assert {path.parts[0] for path in FILES} >= {"kernels", "autograd", "ops", "nn", "optim"}
    assert any(name.startswith("numba") for path in FILES for name in imported(path))
    assert room_of("torch_bp.ops.linear") == "ops"
    assert "torch_bp.kernels.formula" in imported(Path("ops/squared_error.py"))


@pytest.mark.parametrize("path", MIRRORED)
def test_every_public_name_of_torch_is_there(path):
    ours, theirs = importlib.import_module(f"torch_bp.{path}"), importlib.import_module(f"torch.{path}")
    public = [name for name in dir(theirs) if not name.startswith("_")]
    assert len(public) > 10
    for name in public:
        found, torchs = getattr(ours, name), getattr(theirs, name)
        module = getattr(found, "__module__", None) or getattr(found, "__name__", "")
        assert found is torchs or module.startswith("torch_bp")
        assert name in dir(ours)
        assert name in ours.__all__
        if isinstance(torchs, type) and found is not torchs:
            assert issubclass(found, torchs)


@pytest.mark.parametrize("path", MIRRORED)
def test_a_name_that_is_nowhere(path):
    module = importlib.import_module(f"torch_bp.{path}")
    with pytest.raises(AttributeError, match=f"module 'torch_bp.{path}' has no attribute 'nowhere'"):
        _ = module.nowhere


def test_sub_modules_of_torch_can_be_imported_under_our_name():
    from torch_bp.nn.utils.parametrizations import weight_norm
    from torch_bp.nn.utils.rnn import pad_sequence

    from torch_bp.nn import utils

    assert pad_sequence is torch.nn.utils.rnn.pad_sequence
    assert weight_norm is torch.nn.utils.parametrizations.weight_norm
    assert utils.rnn is torch.nn.utils.rnn
    assert pickle.loads(pickle.dumps(torch_bp.nn.Linear)) is torch_bp.nn.Linear
    assert torch_bp.nn.Linear is not torch.nn.Linear
    assert torch_bp.nn.Sequential is torch.nn.Sequential


def test_import_loads_nothing_heavy():
    """In a process of its own: what is there after each of three imports."""
    heavy = ["numba", "triton", "lightning", "jsonargparse", "matplotlib", "rich", "yaml", "tensorboard"]
    heavy += ["torch_bp.optim", "torch_bp.nn", "torch_bp.kernels"]
    code = "import sys\n"
    for room in ("torch_bp", "torch_bp.nn", "torch_bp.optim"):
        code += f"import {room}\nprint(*[m for m in {heavy} if m in sys.modules])\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    nn = {"torch_bp.nn", "torch_bp.kernels"}
    assert [set(line.split()) for line in done.stdout.split("\n")] == [set(), nn, {*nn, "torch_bp.optim"}, set()]


def test_importing_the_lightning_room_leaves_the_optimizers_alone():
    """Else `LightningCLI --optimizer SGD` would be ambiguous."""
    code = "import sys, torch_bp.lightning\nassert 'torch_bp.optim' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_rooms_are_found_as_attributes():
    for name in torch_bp.__all__:
        assert name in dir(torch_bp)
        assert getattr(torch_bp, name) is not None
    with pytest.raises(AttributeError, match="nowhere"):
        _ = torch_bp.nowhere
