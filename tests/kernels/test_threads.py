"""Kernels obey torch's thread count, run in any thread, and survive fork."""

import os
import subprocess
import sys
import textwrap
import threading

import numba
import pytest
import torch

from tests.kernels.formulas import averaged, product_rule
from torch_bp.kernels import cpu, cpu_text, use

LARGE = cpu.PARALLEL_FROM * 4


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_thread_count_is_torchs(threads, restored_threads, monkeypatch):
    before = numba.get_num_threads()  # starts Numba's threads, which would set torch's count as well
    torch.set_num_threads(threads)
    x, y = torch.randn(LARGE), torch.rand(LARGE)
    with use("numba"):
        entry = product_rule.formula.prepare(x, 0b11, {}).entry
        seen, parallel = [], entry._parallel
        monkeypatch.setattr(entry, "_parallel", lambda threads, *a: (seen.append(threads), parallel(threads, *a))[1])
        torch.testing.assert_close(product_rule(x, y), x * y * (1 - y))
    assert seen == ([] if threads == 1 else [min(threads, numba.config.NUMBA_NUM_THREADS)])
    assert numba.get_num_threads() == before


@pytest.mark.parametrize("threads", [1, 2])
def test_a_parallel_kernel_sets_the_number_it_is_given(threads):
    """Asked inside the kernel, of Numba itself."""
    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("there is only one thread")
    cpu._start_threads(torch.get_num_threads())
    expression = product_rule.formula._program("numba", torch.float64, (), {}).expression
    text = cpu_text.function(expression, torch.float64, ["place"], ["int64"], True)
    text += "    pointer(place)[0] = get_num_threads()\n    for i in prange(1):\n        pass\n"
    text += "    set_num_threads(before)\n"
    seen, before = torch.zeros(1, dtype=torch.float64), numba.get_num_threads()
    cpu.compiled("count_parallel", text).run(threads, seen.data_ptr())
    assert seen.item() == threads
    assert numba.get_num_threads() == before


def test_small_tensors_wake_no_threads(monkeypatch):
    x = torch.rand(cpu.PARALLEL_FROM - 1)
    with use("numba"):
        entry = product_rule.formula.prepare(x, 0b11, {}).entry
        monkeypatch.setattr(entry, "_parallel", None)
        product_rule(x, x)


def test_any_thread(restored_threads):
    """Eight Python threads at once, each on two threads of its own."""
    torch.set_num_threads(2)
    x, y = torch.randn(LARGE), torch.rand(LARGE)
    expected, failures = x * y * (1 - y), []

    def work(seed):
        for _ in range(20):
            param, average = torch.ones(LARGE), torch.zeros(LARGE)
            averaged.foreach_([param], [torch.ones(LARGE)], [average], rate=0.1, beta=0.5)
            fine = torch.allclose(param, torch.full((), 1 - 0.1 / 0.5**0.5)) and average.eq(0.5).all()
            if not (fine and torch.allclose(product_rule(x, y), expected)):
                failures.append(seed)

    with use("numba"):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
    import os, torch
    from tests.kernels.formulas import averaged, product_rule
    x, y = torch.randn({large}), torch.rand({large})
    expected = x * y * (1 - y)
    torch.set_num_threads(2)
    assert torch.allclose(product_rule(x, y), expected)
    for generation in range(2):
        param, grad, average = torch.ones({large}), torch.ones({large}), torch.zeros({large})
        child = os.fork()
        if child == 0:
            result = product_rule(x, y)
            averaged.foreach_([param], [grad], [average], rate=0.1, beta=0.5)
            torch.set_num_threads(1)  # torch's own parallel operations hang in a forked child
            os._exit(0 if torch.allclose(result, expected) and average.eq(0.5).all() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.allclose(product_rule(x, y), expected)
    print("both lived")
"""


def test_a_forked_child_computes():
    assert "both lived" in run(FORK.format(large=LARGE))


WORKQUEUE = """
    import threading, torch
    from tests.kernels.formulas import product_rule
    x, y = torch.randn({large}), torch.rand({large})
    torch.set_num_threads(2)
    expected, wrong = x * y * (1 - y), []
    def work():
        for _ in range(50):
            wrong.extend([] if torch.allclose(product_rule(x, y), expected) else [1])
    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong
    import numba
    print(numba.threading_layer())
"""


def test_numbas_own_thread_pool_is_not_entered_twice():
    """It aborts the process when two threads use it at once; the serial kernel serves instead."""
    assert "workqueue" in run(WORKQUEUE.format(large=LARGE), NUMBA_THREADING_LAYER="workqueue")
