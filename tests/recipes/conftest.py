"""The recipes' command line, run in this process with a temporary folder as working folder."""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import recipes
from recipes.cli import main


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are faster on one thread, and do not slow down beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """`cli("fit", "digits", *flags)`; runs go to `tmp_path / "logs"`. A path of a YAML file will do for a name."""
    monkeypatch.setattr(sys, "argv", ["recipes"])
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seed_everything sets them
        monkeypatch.setenv(name, "0")

    def run(command: str, recipe: str, *flags: str) -> None:
        path = recipe if recipe.endswith(".yaml") else str(Path(recipes.__file__).parent / f"{recipe}.yaml")
        main([command, "--config", path, "--trainer.enable_model_summary", "false", *flags])

    yield run
    # A run that ends in an error leaves its writer open, whose thread would write later, in another working folder.
    for writer in [thing for thing in gc.get_objects() if type(thing) is SummaryWriter]:
        writer.close()
