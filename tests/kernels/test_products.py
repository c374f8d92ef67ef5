"""Small products on one thread: which they are, what they leave behind, and that a step and autograd agree on them."""

import threading

import pytest
import torch

import torch_bp
from torch_bp import nn
from torch_bp.kernels import library, products
from torch_bp.step import program

pytestmark = pytest.mark.skipif(library.quick(products.SYMBOL) is None, reason="torch multiplies by another library")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def mkl_threads() -> int:
    """How many threads MKL would take on this thread."""
    return int(library._library().MKL_Get_Max_Threads())


def test_products_of_a_context_have_one_thread_and_others_have_all():
    before = mkl_threads()
    with products.on_threads_that_pay(torch.ones(32, 64), 32):
        assert mkl_threads() == 1
        seen = []
        other = threading.Thread(target=lambda: seen.append(mkl_threads()))
        other.start()
        other.join()
    assert seen == [before]  # of the calling thread alone
    assert mkl_threads() == before == torch.get_num_threads() == 2
    with products.on_threads_that_pay(torch.ones(512, 64), 32):
        assert mkl_threads() == before


def test_threads_are_given_back_after_an_error():
    with pytest.raises(RuntimeError, match="shapes"):
        nn.functional.linear(torch.ones(2, 3), torch.ones(4, 5))
    assert mkl_threads() == 2


@pytest.mark.parametrize("capture", [True, False])
def test_a_step_leaves_the_threads_as_they_were(capture):
    model = torch_bp.nn.MLP([8, 16, 3])
    step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), torch_bp.optim.SGD(model.parameters()), capture=capture)
    for _ in range(2):
        step(torch.randn(7, 8), torch.randint(3, (7,)))
    assert mkl_threads() == 2


def test_chains_switch_only_where_products_of_both_kinds_meet(monkeypatch):
    from torch_bp.kernels import sequence

    records = [sequence.Record(1, [], [], alone) for alone in (None, True, None, True, False, None, True)]
    done = sequence._with_threads(records)
    assert [each.words[0] for each in done if each.words] == [1, 0, 1, 0]
    assert [each.alone for each in done if not each.words] == [None, True, None, True, False, None, True]


# Shapes for which MKL's result depends on the number of threads.
@pytest.mark.parametrize(("batch", "width"), [(7, 127), (10, 100), (7, 65), (10, 33)])
def test_a_step_and_autograd_agree_to_the_bit(batch, width, monkeypatch):
    torch.manual_seed(0)
    x, y = torch.randn(batch, width), torch.randint(10, (batch,))
    results = []
    for kind in ("autograd", "uncaptured", "captured", "captured, called from Python"):
        torch.manual_seed(1)
        if kind.endswith("Python"):
            monkeypatch.setattr(program, "record", lambda *_: None)
        model = nn.MLP([width, width, 10])
        loss_fn, optimizer = nn.CrossEntropyLoss(), torch_bp.optim.SGD(model.parameters(), lr=0.1)
        step = torch_bp.TrainStep(model, loss_fn, optimizer, capture=kind.startswith("captured"))
        for _ in range(5):
            if kind == "autograd":
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
            else:
                step(x, y)
        results.append([p.detach().clone() for p in model.parameters()])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
