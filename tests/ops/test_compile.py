"""`torch.compile` takes operations whole, forward and backward."""

import pytest
import torch

from tests.ops.test_values import assert_same, gradients
from tests.tables import ROWS

# Dynamo instantiates torch's own Function for its context
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
IDS = [
    "tanh-matrix",
    "relu-matrix",
    "leaky_relu-matrix negative_slope -0.5",
    "elu-matrix alpha -0.5",
    "softplus-matrix beta 2.0 threshold 1.5",
    "silu-matrix",
    "gelu-matrix",
    "gelu-matrix approximate tanh",
    "hardtanh-matrix min_val -0.3 max_val 1.0",
    "batch_norm-length",
    "batch_norm-evaluation length",
    "layer_norm-two dimensions",
    "layer_norm-without parameters",
    "linear-leading dimensions",
    "linear_relu-batch",
    "linear_leaky_relu-no bias",
    "softmax-(2, 3, 2) along 1",
    "log_softmax-(4, 3) along 1",
    "mse_loss-matrix mean",
    "half_mse_loss-(4, 3)",
    "binary_cross_entropy-weight mean",
    "binary_cross_entropy_with_logits-both weights mean",
    "nll_loss-weight ignored mean",
    "cross_entropy-all smoothing mean",
    "cross_entropy-probabilities weight mean",
]
ROWS_BY_ID = {row.id: row for row in ROWS}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", IDS)
def test_whole_graph(name):
    mine, other, tensors = ROWS_BY_ID[name].pair(requires_grad=True)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, tensors), gradients(other, tensors), torch.float64)
    with torch.no_grad():  # another way through Dynamo
        torch.testing.assert_close(compiled(*tensors), other(*tensors))


def test_under_autocast():
    row = ROWS_BY_ID["linear-batch"]
    mine, other, tensors = row.pair(torch.float32, requires_grad=True)

    def cast(*tensors, function):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*tensors)

    compiled = torch.compile(cast, fullgraph=True, backend="aot_eager")
    got = gradients(lambda *t: compiled(*t, function=mine), tensors)
    assert_same(got, gradients(lambda *t: cast(*t, function=other), tensors), torch.float32)
