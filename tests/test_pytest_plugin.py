"""The fixture `gradcheck`: a right gradient passes, a wrong one fails with the report."""

pytest_plugins = ["pytester"]

CONFTEST = """
pytest_plugins = ["torch_bp.pytest_plugin"]
"""
TESTS = """
import torch


class Off(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return x * dy


def test_right(gradcheck):
    report = gradcheck(torch.nn.Linear(3, 2), torch.randn(4, 3), second=True)
    assert [row.name for row in report.rows] == ["input 0", "parameter weight", "parameter bias"]


def test_given(gradcheck):
    report = gradcheck(torch.mul, (torch.ones(2, requires_grad=True), torch.ones(2)), full=True)
    assert [row.name for row in report.rows] == ["input 0"]


def test_wrong(gradcheck):
    gradcheck(Off, torch.randn(4))


class Once(Off):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


def test_once(gradcheck):
    gradcheck(Once, torch.randn(4))
    gradcheck(Once, torch.randn(4), second=True)
"""


def test_the_fixture(pytester):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:torch_bp")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(["*it is 0.5 times the numeric gradient in every entry.*"])
    result.stdout.fnmatch_lines(["*second derivatives: gradcheck failed*"])
