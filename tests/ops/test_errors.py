"""Wrong arguments raise what torch raises, in its words."""

import pytest
import torch

import torch_bp.nn.functional as ours

x, row = torch.ones(4, 3), torch.ones(3)
classes = torch.tensor([0, 1, 2, 0])
AS_TORCH = [
    ("linear", (x, torch.ones(2, 4))),
    ("linear", (x, torch.ones(2, 3), torch.ones(3))),
    ("linear", (x, torch.ones(2, 3).double())),
    ("linear", (x, torch.ones(2, 3), torch.ones(2).double())),
    ("linear", (x.long(), torch.ones(2, 3))),
    ("linear", ([1.0, 2.0, 3.0], torch.ones(2, 3))),
    ("linear", (x, [[1.0, 2.0, 3.0]])),
    ("binary_cross_entropy_with_logits", (x, x.long())),
    ("linear", (torch.tensor(1.0), torch.ones(2, 3))),
    ("cross_entropy", ({"logits": x}, classes)),
    ("cross_entropy", ((x,), x)),
    ("layer_norm", ([1.0, 2.0], (2,))),
    ("dropout", ({"x": x},)),
    ("dropout", ([x], 0.5, False)),
    ("leaky_relu", (x.long(),)),
    ("leaky_relu", (x, "slope")),
    ("hardtanh", (x, 1.0, -1.0)),
    ("hardtanh", (x, "low", 1.0)),
    ("elu", (x, "alpha")),
    ("elu", (x.long(),)),
    ("softplus", (x, "beta")),
    ("softplus", (x.long(),)),
    ("silu", (x.long(),)),
    ("gelu", (x.long(),)),
    ("batch_norm", (x, None, None)),
    ("batch_norm", (x, row, None)),
    ("batch_norm", (x, row[:2], row[:2])),
    ("batch_norm", (x, row, row, torch.ones(2))),
    ("batch_norm", (x, row, row, None, torch.ones(2), True)),
    ("batch_norm", (x[:1], None, None, None, None, True)),
    ("batch_norm", (x, None, None, None, None, True, 0.1, 0.0)),
    ("batch_norm", (x, row, row, None, None, False, 0.1, -1.0)),
    ("batch_norm", (x, row.double(), row.double())),
    ("batch_norm", (x, row, row, row.double(), row.double())),
    ("batch_norm", (x, None, None, row.double(), row.double(), True)),
    ("batch_norm", (x.long(), row, row)),
    ("batch_norm", (row, row, row)),
    ("batch_norm", (torch.tensor(1.0), row, row)),
    ("layer_norm", (x, (4,))),
    ("layer_norm", (x, ())),
    ("layer_norm", (x, 3)),
    ("layer_norm", (x, (2, 4, 3))),
    ("layer_norm", (x, ("three",))),
    ("layer_norm", (x, (3,), torch.ones(4))),
    ("layer_norm", (x, (3,), row, torch.ones(3, 1))),
    ("layer_norm", (x, (3,), row.double(), row.double())),
    ("layer_norm", (x.long(), (3,))),
    ("dropout", (x, 2.0)),
    ("dropout", (x, "half")),
    ("dropout", (x.long(),)),
    ("softmax", (x, 2)),
    ("softmax", (x.long(), 1)),
    ("log_softmax", (x, -3)),
    ("log_softmax", (x.long(), 1)),
    ("mse_loss", (x, torch.ones(2, 4, 3, 5))),
    ("mse_loss", (x, x, None, None, "average")),
    ("mse_loss", (x, x, None, None, "mean", row)),
    ("mse_loss", (x.long(), x.long())),
    ("cross_entropy", (x, classes[:3])),
    ("cross_entropy", (x, classes, torch.ones(4))),
    ("cross_entropy", (x, classes + 1)),
    ("cross_entropy", (x, classes - 1)),
    ("cross_entropy", (x, classes.int())),
    ("cross_entropy", (x, classes.float())),
    ("cross_entropy", (x, classes, None, None, -100, None, "average")),
    ("cross_entropy", (x, x, None, None, 1)),
    ("cross_entropy", (x, classes, None, None, -100, None, "mean", 1.5)),
    ("cross_entropy", (x.long(), classes)),
    ("cross_entropy", (x, classes, row.double())),
    ("cross_entropy", (torch.tensor(1.0), torch.tensor(0))),
    ("nll_loss", (x, classes[:3])),
    ("nll_loss", (x, classes + 1)),
    ("nll_loss", (x, classes.float())),
    ("nll_loss", (x, classes, torch.ones(2))),
    ("nll_loss", (x, classes, None, None, -100, None, "average")),
    ("nll_loss", (torch.ones(2, 3, 4, 4), torch.zeros(2, 4, 5, dtype=torch.long))),
    ("binary_cross_entropy", (x, row)),
    ("binary_cross_entropy", (x, x * 2)),
    ("binary_cross_entropy", (x, -x)),
    ("binary_cross_entropy", (x * 2, x)),
    ("binary_cross_entropy", (x, x.double())),
    ("binary_cross_entropy", (x, x, torch.ones(5))),
    ("binary_cross_entropy", (x, x, None, None, None, "average")),
    ("binary_cross_entropy_with_logits", (x, row)),
    ("binary_cross_entropy_with_logits", (x, x, torch.ones(5))),
    ("binary_cross_entropy_with_logits", (x, x, None, None, None, "average")),
    ("binary_cross_entropy_with_logits", (x, x, None, None, None, "mean", torch.ones(5))),
]


def failure(function, args):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(*args)
    return caught.type, str(caught.value)


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("name", "args"), AS_TORCH)
def test_the_error_is_torchs(name, args, requires_grad):
    tracked = isinstance(args[0], torch.Tensor) and args[0].is_floating_point() and requires_grad
    args = (args[0].clone().requires_grad_(), *args[1:]) if tracked else args
    assert failure(getattr(ours, name), args) == failure(getattr(torch.nn.functional, name), args)


@pytest.mark.parametrize(
    ("name", "target", "weights"),
    [
        ("nll_loss", classes, ["weight"]),
        ("cross_entropy", classes, ["weight"]),
        ("binary_cross_entropy", x, ["weight"]),
        ("binary_cross_entropy_with_logits", x, ["weight", "pos_weight"]),
    ],
)
def test_weights_have_no_gradient(name, target, weights):
    """As in torch; ours says so without its internal names, and what to do."""
    for weight in weights:
        tracked = {weight: torch.ones(3, requires_grad=True)}
        for module, message in ((ours, f"{name}: .* '{weight}'.*detach"), (torch.nn.functional, "not differentiable")):
            with pytest.raises(RuntimeError, match=message):
                getattr(module, name)(x, target, **tracked)
            with torch.no_grad():
                assert getattr(module, name)(x, target, **tracked).isfinite()


def test_gelu_names_its_approximations():
    for module in (ours, torch.nn.functional):
        with pytest.raises(RuntimeError, match="approximate argument must be either none or tanh"):
            module.gelu(x, approximate="erf")


def test_half_mse_loss_names_both_shapes():
    with pytest.raises(ValueError, match=r"half_mse_loss: .*\(4,\).*\(4, 3\)"):
        ours.half_mse_loss(x, torch.ones(4))


def test_mse_loss_warns_of_broadcasting():
    for module in (ours, torch.nn.functional):
        with pytest.warns(UserWarning, match="Using a target size"):
            assert module.mse_loss(x, row) == 0


def test_negative_smoothing_is_none():
    for target in (classes, x / 3):
        logits = torch.randn(4, 3, requires_grad=True)
        got, expected = (
            torch.autograd.grad(module.cross_entropy(logits, target, label_smoothing=-0.5), logits)
            for module in (ours, torch.nn.functional)
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_without_a_dimension_warns(name):
    for shape, module in [((3,), ours), ((3,), torch.nn.functional), ((2, 3), ours), ((2, 3, 4), ours)]:
        z = torch.randn(shape)
        with pytest.warns(UserWarning, match=f"Implicit dimension choice for {name}") as caught:
            assert torch.equal(getattr(module, name)(z), getattr(torch, name)(z, 0 if z.dim() in (1, 3) else 1))
        assert caught[0].filename == __file__


def test_softmax_casts_before():
    z = torch.randn(4, 3, requires_grad=True)
    for name in ("softmax", "log_softmax"):
        got, expected = (getattr(m, name)(z, 1, dtype=torch.float64) for m in (ours, torch.nn.functional))
        assert got.dtype == torch.float64
        assert torch.equal(got, expected)
        got, expected = (torch.autograd.grad(y[:, 0].sum(), z) for y in (got, expected))
        assert got[0].dtype == torch.float32
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("legacy", [(True, None), (False, None), (None, False), (True, True), (False, False)])
def test_legacy_reductions(legacy):
    for name, args in {
        "mse_loss": (x, x / 2),
        "nll_loss": (x, classes, None),
        "cross_entropy": (x, classes, None),
        "binary_cross_entropy": (x / 2, x, None),
        "binary_cross_entropy_with_logits": (x, x, None),
    }.items():
        size_average, reduce = legacy
        arguments = {"size_average": size_average, "reduce": reduce}
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            expected = getattr(torch.nn.functional, name)(*args, **arguments)
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            assert torch.equal(getattr(ours, name)(*args, **arguments), expected)


@pytest.mark.parametrize("size", [4, 800])
@pytest.mark.parametrize("ignored", [-100, 2**40])
def test_labels_out_of_range_whatever_is_ignored(size, ignored):
    """Few logits and many, which different code serves."""
    target = torch.zeros(size, dtype=torch.int64)
    for wrong in (-1, size):
        target[0] = wrong
        for module in (ours, torch.nn.functional):
            with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
                module.cross_entropy(torch.randn(size, size), target, ignore_index=ignored)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_a_list_is_no_target(name):
    for module in (ours, torch.nn.functional):
        with pytest.raises(TypeError):
            getattr(module, name)(torch.randn(2, 3), [0, 1])
