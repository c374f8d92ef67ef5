"""Processes that work together over gloo on the CPU, started once for all cases of a file.

A case is a function of the rank. It compares by itself and raises in its process; what was raised is what the test
reports.
"""

import datetime
import importlib
import multiprocessing
import traceback
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed

WORLD = 2
folder = Path()  # of this test, the same in all processes


def cases(table, **named):
    """Enter a function in the table of cases: one case of every value, which it gets first; of none, one without."""

    def decorate(function):
        table.update({f"{function.__name__}-{name}": partial(function, choice) for name, choice in named.items()})
        if not named:
            table[function.__name__] = function
        return function

    return decorate


def connect(rank, world, name="store"):
    """Make the process group; `name` must be new each time."""
    store = distributed.FileStore(f"{folder}/{name}", world)
    patience = datetime.timedelta(seconds=20)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)


def work(rank, world, path, module):
    """What a process does: all cases of a module, and a report of each."""
    global folder
    folder = Path(path)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    connect(rank, world)
    reports = {}
    for name, function in importlib.import_module(module).CASES.items():
        torch.manual_seed(0)
        try:
            function(rank)
            reports[name] = ""
        except (Exception, pytest.fail.Exception):  # the latter is no Exception
            reports[name] = traceback.format_exc()
        torch.save(reports, folder / str(rank))
        distributed.barrier()
    distributed.destroy_process_group()


def run(module, path, world=WORLD, seconds=60):
    """Run all `CASES` of a module in `world` processes, and fail with what they report."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=work, args=(r, world, str(path), module), daemon=True) for r in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(seconds)
    hung = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
    reports = [torch.load(path / str(rank)) for rank in range(world)]
    failures = [f"{name}, rank {r}:\n{found[name]}" for r, found in enumerate(reports) for name in found if found[name]]
    assert not failures, "\n".join(failures)
    assert not hung, f"ranks {hung} still ran after {seconds} s"
    assert [*reports[0]] == [*reports[1]] == [*importlib.import_module(module).CASES]
