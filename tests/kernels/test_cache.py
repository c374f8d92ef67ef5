"""Kernels on disk: found again by the next process, safe to share, never stale, and never needed."""

import os
import subprocess
import sys
import textwrap

import pytest

from torch_bp.kernels import cache

PROGRAM = """
    import torch
    from torch_bp.kernels import formula, use

    @formula(updates=("x",))
    def shrink(x, y, *, rate):
        return x - rate * y * {factor}

    @formula
    def product(x, y):
        return x * y * {factor}

    x = torch.ones(100)
    with use("numba"):
        shrink(x, torch.ones(100), rate=0.25)
        assert x.eq(1 - 0.25 * {factor}).all(), x
        shrink.foreach_([x], [torch.ones(100)], rate=0.25)
        assert product(x, x).eq(x * x * {factor}).all()
    programs = [next(iter(f.formula._programs.values())) for f in (shrink, product)]
    stats = [kernel.stats for kernel in (programs[0].single.serial, programs[1].entry.serial)]
    print("hits", sum(sum(s.cache_hits.values()) for s in stats), end=" ")
    print("misses", sum(sum(s.cache_misses.values()) for s in stats))
"""


def run(folder, factor=1, program=PROGRAM, **environment):
    text = textwrap.dedent(program).format(factor=factor)
    environment = {**os.environ, "TORCH_BP_CACHE": str(folder), "NUMBA_CACHE_DIR": "", **environment}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_second_process_compiles_nothing_and_a_changed_rule_meets_no_stale_kernel(tmp_path):
    assert "hits 0 misses 2" in run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert before
    assert "hits 2 misses 0" in run(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert "hits 0 misses 2" in run(tmp_path, factor=2)


def test_the_log_says_what_is_compiled_and_where_it_is_kept(tmp_path):
    program = "import logging\nlogging.basicConfig(level=logging.INFO)\n" + textwrap.dedent(PROGRAM)
    said = run(tmp_path, program=program)
    line = "INFO:torch_bp.kernels.cpu:compiling the kernel product_serial_entry, a second or so; it is kept in "
    assert said.count(line + str(tmp_path)) == 1
    assert "compiling the kernel native_entries" in said
    assert "compiling" not in run(tmp_path, program=program)
    occupied = tmp_path / "file"
    occupied.touch()
    assert "it is not kept, as the cache folder cannot be used" in run(occupied, program=program)
    assert "compiling" not in run(occupied)  # nothing unasked


def test_an_optimizers_first_step_compiles_what_it_needs_alone(tmp_path):
    run(
        tmp_path,
        program="""
        import torch, torch_bp.optim
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        torch_bp.optim.SGD([weight], lr=0.1).step()
    """,
    )
    names = sorted(path.name.rsplit("_", 1)[0] for path in tmp_path.glob("*.py"))
    assert names == ["native", "sgd_serial_run"]
    assert not [path for path in tmp_path.rglob("*.nbi") if "alike" in path.name]


def test_torn_files_are_replaced(tmp_path):
    run(tmp_path)
    for path in [*tmp_path.glob("*.py"), *tmp_path.rglob("*.nb?")]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run(tmp_path)
    run(tmp_path)


def test_several_processes_at_once(tmp_path):
    text = textwrap.dedent(PROGRAM).format(factor=1)
    environment = {**os.environ, "TORCH_BP_CACHE": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", text], env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    assert "hits 2 misses 0" in run(tmp_path)
    assert not list(tmp_path.glob(".*")), "temporary files were left behind"


def test_without_a_folder_kernels_live_in_memory(tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    assert "hits 0" in run(occupied)
    assert occupied.read_text() == ""


def test_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_BP_CACHE", str(tmp_path / "a" / "b"))
    assert cache.folder() == tmp_path / "a" / "b"
    (tmp_path / "a" / "b").chmod(0o777)  # others could plant code there
    assert cache.folder() is None
    monkeypatch.delenv("TORCH_BP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "torch_bp"


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_module_is_loaded_from_its_text(tmp_path, monkeypatch, on_disk):
    import inspect

    monkeypatch.setenv("TORCH_BP_CACHE", str(tmp_path))
    module = cache.load("answer", "def run():\n    return 42\n", on_disk=on_disk)
    assert module.run() == 42
    assert on_disk is module.ON_DISK
    assert "return 42" in inspect.getsource(module.run)
    assert on_disk == bool(list(tmp_path.glob("answer_*.py")))


def test_without_numba_the_formulas_run_and_one_line_is_logged(tmp_path):
    """The whole of a small training runs; the log says once what is missing and what to do."""
    said = run(
        tmp_path,
        program="""
        import sys, logging
        sys.modules["numba"] = None
        logging.basicConfig(level=logging.INFO)
        import torch, torch_bp.nn as nn, torch_bp.optim as optim
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        x, y = torch.randn(64, 4), torch.randint(3, (64,))
        for kind in (optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adam, optim.AdamW):
            optimizer = kind(model.parameters(), lr=1e-2)
            first = None
            for _ in range(20):
                optimizer.zero_grad()
                loss = nn.CrossEntropyLoss()(model(x), y)
                first = first or loss.item()
                loss.backward()
                optimizer.step()
            assert loss.item() < first, kind
        print("trained {factor}")
    """,
    )
    assert "trained 1" in said
    assert said.count("Numba cannot be used") == 1
    assert "pip install --upgrade numba" in said


def test_numba_starts_without_scipy_and_finds_it_when_asked():
    pytest.importorskip("scipy")
    program = """
        import sys, numba, numpy, torch
        from torch_bp.kernels import cpu, native
        assert cpu.usable() and native.functions()
        assert "scipy.linalg" not in sys.modules
        product = numba.njit(lambda a, b: numpy.dot(a, b))
        assert product(numpy.eye(2), numpy.eye(2)).sum() == 2
    """
    run(cache.folder(), program=program)


@pytest.mark.parametrize("variables", [{"NUMBA_DISABLE_JIT": "1"}, {"NUMBA_THREADING_LAYER": "tbb"}])
def test_numbas_own_settings_stop_nothing(tmp_path, variables):
    """No compiler, or a threading layer that is not installed."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch, torch_bp.nn as nn\ntorch.set_num_threads(2)\n"
            "x = torch.randn(400, 300, requires_grad=True)\nnn.functional.tanh(x).sum().backward()\n"
            "print(bool(torch.allclose(x.grad, 1 - x.tanh() ** 2, atol=1e-6)))",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **variables, "TORCH_BP_CACHE": str(tmp_path)},
    )
    assert done.stdout.strip() == "True", done.stderr[-2000:]
