"""The memory that cross-entropy takes beyond its logits, forward and backward, counted to the byte."""

import pytest
import torch

import torch_bp.nn.functional as ours
from tests.benchmarks.memory import peak
from torch_bp.kernels import use

ROWS, CLASSES = 64, 512
LOGITS = 4 * ROWS * CLASSES


def run(library, **options):
    logits, target = torch.randn(ROWS, CLASSES, requires_grad=True), torch.randint(CLASSES, (ROWS,))
    return lambda: torch.autograd.grad(library.cross_entropy(logits, target, **options), logits)


def test_the_count_itself():
    """Two tensors at once, though three in all; what was there before does not count."""
    kept = torch.zeros(7)

    def function():
        first = torch.zeros(1000)
        del first
        return torch.zeros(100), torch.zeros(300), kept

    assert peak(function) == 4000
    assert peak(lambda: (torch.zeros(10), torch.zeros(20))) == 120
    assert peak(lambda: kept) == 0


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"ignore_index": 3}], ids=str)
def test_cross_entropy_takes_one_tensor_of_the_size_of_its_logits(options):
    """The gradient; besides it two numbers of each row, its maximum and a sum. Torch has three such tensors."""
    mine, theirs = peak(run(ours, **options)), peak(run(torch.nn.functional, **options))
    assert 0 <= mine - LOGITS - 2 * 4 * ROWS <= 32
    assert 0 <= theirs - 3 * LOGITS <= 512
    assert mine <= 0.35 * theirs


def test_the_count_is_the_same_every_time():
    function = run(ours)
    assert len({peak(function) for _ in range(3)}) == 1


def test_without_a_kernel_there_is_more_to_keep():
    """What the two tests above would say if no kernel served."""
    with use("torch"):
        assert peak(run(ours)) > 2 * LOGITS
