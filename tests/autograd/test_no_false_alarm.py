"""Nothing healthy is flagged: torch's activations, losses and layers, smooth and kinked, and our own, many seeds."""

import warnings

import pytest
import torch
from torch import nn

import torch_bp.nn as ours
from torch_bp.autograd import gradcheck

NAMES = """
CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 SELU SiLU Sigmoid
Softmax2d Softplus Softshrink Softsign Tanh Tanhshrink
"""
ACTIVATIONS = {name: getattr(nn, name) for name in NAMES.split()} | {
    "Softmax": lambda: nn.Softmax(-1),
    "Softmin": lambda: nn.Softmin(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(-1),
    "Threshold": lambda: nn.Threshold(0.1, -0.3),
    "Dropout": lambda: nn.Dropout().eval(),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(2),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "Conv2d": lambda: nn.Conv2d(4, 3, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 2, 3),
    "Upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
}
ACTIVATIONS |= {
    f"ours {name}": getattr(ours, name)
    for name in ("ReLU", "LeakyReLU", "Tanh", "Sigmoid", "ELU", "GELU", "SiLU", "Softplus", "Hardtanh")
}
SEEDS = 12
SHAPE = (2, 4, 6, 6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_layers(name):
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        dtype = (torch.float32, torch.float64)[seed % 2]
        x = torch.randn(SHAPE, dtype=dtype) * (1, 10)[seed % 3 == 0]
        if seed % 4 == 0:
            x = x.round(decimals=1)  # ties, and values at kinks
        module = ACTIVATIONS[name]().to(dtype)
        report = gradcheck(module, x.requires_grad_(), raise_exception=False)
        assert report, f"seed {seed}: {report}"


def _unit(*shape):
    return torch.rand(shape).clamp(0.05, 0.95)


LOSSES = {
    "L1Loss": lambda: (torch.randn(5, 4), torch.randn(5, 4)),
    "SmoothL1Loss": lambda: (torch.randn(5, 4) * 2, torch.randn(5, 4)),
    "HuberLoss": lambda: (torch.randn(5, 4) * 2, torch.randn(5, 4)),
    "MSELoss": lambda: (torch.randn(5, 4), torch.randn(5, 4)),
    "SoftMarginLoss": lambda: (torch.randn(5, 4), torch.randn(5, 4).sign()),
    "HingeEmbeddingLoss": lambda: (torch.randn(5, 4), torch.randn(5, 4).sign()),
    "MultiMarginLoss": lambda: (torch.randn(5, 4), torch.randint(4, (5,))),
    "MultiLabelMarginLoss": lambda: (torch.randn(5, 4), torch.tensor([[0, 2, -1, -1]] * 5)),
    "MultiLabelSoftMarginLoss": lambda: (torch.randn(5, 4), torch.randint(2, (5, 4))),
    "CosineEmbeddingLoss": lambda: (torch.randn(5, 4), torch.randn(5, 4), torch.randn(5).sign()),
    "MarginRankingLoss": lambda: (torch.randn(5), torch.randn(5), torch.randn(5).sign()),
    "TripletMarginLoss": lambda: (torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4)),
    "KLDivLoss": lambda: (torch.randn(5, 4).log_softmax(-1), torch.randn(5, 4).softmax(-1)),
    "PoissonNLLLoss": lambda: (torch.randn(5, 4), torch.rand(5, 4)),
    "GaussianNLLLoss": lambda: (torch.randn(5, 4), torch.randn(5, 4), torch.rand(5, 4) + 0.1),
    "CrossEntropyLoss": lambda: (torch.randn(5, 4), torch.randint(4, (5,))),
    "NLLLoss": lambda: (torch.randn(5, 4), torch.randint(4, (5,))),
    "BCELoss": lambda: (_unit(5, 4), _unit(5, 4)),
    "BCEWithLogitsLoss": lambda: (torch.randn(5, 4), _unit(5, 4)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    for reduction in ("none", "mean", "sum"):
        for source in (nn, ours):
            for seed in range(SEEDS // 2):
                torch.manual_seed(seed)
                first, *rest = LOSSES[name]()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what else "mean" might mean
                    loss = getattr(source, name)(reduction=reduction)
                    report = gradcheck(loss, (first.requires_grad_(), *rest), raise_exception=False)
                assert report, f"{source.__name__} {reduction} seed {seed}: {report}"


@pytest.mark.parametrize("activation", [nn.ReLU, ours.ReLU, nn.Hardtanh, ours.LeakyReLU], ids=lambda a: a.__name__)
@pytest.mark.parametrize("width", [8, 64, 256])
def test_deep_networks_with_many_kinks(activation, width):
    """A loss of thousands of kinks: some always lie within a step."""
    for seed in range(4):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(20, width), activation(), nn.Linear(width, width), activation())
        net.extend([nn.BatchNorm1d(width), nn.Linear(width, width), activation(), nn.Linear(width, 1)])
        report = gradcheck(_with_loss(net), torch.randn(128, 20, requires_grad=True), raise_exception=False)
        assert report, f"seed {seed}: {report}"


def _with_loss(net):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).abs().mean()

    return Loss()


def test_kinks_at_the_point_are_dropped_and_counted():
    x = torch.randn(10, 10).relu().requires_grad_()  # half of it lies at the kink
    report = gradcheck(torch.relu, x)
    assert report.rows[0].kinks == 1
    scalar = gradcheck(lambda x: torch.relu(x).sum(), x)
    assert 1 <= scalar.rows[0].kinks <= 9
    everywhere = gradcheck(torch.relu, torch.zeros(3, requires_grad=True), raise_exception=False)
    assert "could not be checked: the function has a kink at the point" in everywhere.failure
    assert not everywhere


def test_a_wrong_slope_is_found_also_at_kinks():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return dy * torch.where(x > 0, 1.1, 0.0)

    x = torch.randn(10, 10).relu().requires_grad_()
    assert not gradcheck(Wrong, x, raise_exception=False)
    assert "kink" not in gradcheck(lambda x: Wrong.apply(x).sum(), x, raise_exception=False).failure
    outside = gradcheck(
        lambda x: -2 * x.abs() + 5 * x.detach() - 5 * x,
        torch.zeros(3, requires_grad=True),
        full=True,
        raise_exception=False,
    )
    assert not outside


ALONG_THE_FIRST_AXIS = {
    "cumsum": lambda x: x.cumsum(0),
    "cumprod": lambda x: x.cumprod(0),
    "cummax": lambda x: x.cummax(0).values,
    "logcumsumexp": lambda x: x.logcumsumexp(0),
    "backwards": lambda x: x.flip(0).cumsum(0).flip(0),
    "the one before": lambda x: x + torch.cat([torch.zeros_like(x[:1]), x[:-1]]),
    "causal": lambda x: torch.ones(len(x), len(x), dtype=x.dtype).tril() @ x,
    "lu_factor": lambda x: torch.linalg.lu_factor(x)[0],
}


@pytest.mark.parametrize("name", ALONG_THE_FIRST_AXIS)
def test_entries_that_depend_on_those_before_them(name):
    """The first few give the same outputs alone, but not the same gradients."""
    assert gradcheck(ALONG_THE_FIRST_AXIS[name], torch.randn(6, 3, requires_grad=True))


def test_recurrent_layers_and_time_first():
    assert gradcheck(nn.GRU(3, 2), torch.randn(6, 2, 3, requires_grad=True))
    assert gradcheck(nn.LSTM(3, 2), torch.randn(5, 5, 3, requires_grad=True))


def test_a_table_as_long_as_the_batch():
    assert gradcheck(lambda index, w: w[index], (torch.tensor([0, 1, 1, 2]), torch.randn(4, 3, requires_grad=True)))


def test_a_view_into_something_larger_keeps_its_place():
    whole = torch.randn(20, dtype=torch.float64)
    x = whole[10:].requires_grad_()
    assert gradcheck(lambda x: x.as_strided((2, 2), (1, 2), 10), x)


def test_backwards_and_jvps_that_are_zero_but_for_rounding():
    assert gradcheck(lambda x: nn.functional.layer_norm(x, (1,)), torch.randn(3, 1, requires_grad=True))
    w = torch.randn(1, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, dtype=torch.float64)
    assert gradcheck(lambda w: torch.native_layer_norm(x, (1,), w, None, 0.5)[0], w)


UNSAFE = {"lu_unpack", "_segment_reduce", "normal"}  # reads out of bounds for part of a batch; has no slopes of its own


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32], ids=str)
def test_all_operations_of_torch(dtype):
    """No verdict is another than torch's, but that single precision is no fault here."""
    from torch.testing._internal.common_methods_invocations import op_db

    count, wrong = 0, []
    warnings.simplefilter("ignore")
    for op in op_db:
        if op.name in UNSAFE or not op.supports_autograd or dtype not in op.supported_backward_dtypes("cpu"):
            continue
        for f, tensors, options in _samples(op, dtype):
            count += 1
            if not _verdict(gradcheck, f, tensors, options) and _by_torch(op, f, tensors, options):
                wrong.append(f"{op.formatted_name} {[tuple(t.shape) for t in tensors]}")
    assert wrong == []
    assert count > 250


def _samples(op, dtype, limit=1):
    """Calls of an operation, as functions of the tensors to check."""
    from torch.utils._pytree import tree_flatten, tree_unflatten

    made = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    for sample in made[:: max(1, len(made) // limit)][:limit]:
        leaves, structure = tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not places or any(leaves[i].layout is not torch.strided for i in places):
            continue

        def f(*tensors, leaves=leaves, places=places, structure=structure, sample=sample):
            values = list(leaves)
            for i, t in zip(places, tensors):
                values[i] = t
            first, args, keywords = tree_unflatten(values, structure)
            return sample.output_process_fn_grad(op.gradcheck_wrapper(op.get_op(), first, *args, **keywords))

        yield f, tuple(leaves[i] for i in places), {"nondet_tol": op.gradcheck_nondet_tol}


def _by_torch(op, f, tensors, options):
    double = tuple(
        t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_() for t in tensors
    )
    return _verdict(torch.autograd.gradcheck, f, double, options | {"fast_mode": op.gradcheck_fast_mode is not False})


def _verdict(check, f, tensors, options):
    torch.manual_seed(0)
    try:
        return bool(check(f, tensors, **options))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
