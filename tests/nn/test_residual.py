"""A skip connection adds, passes the error signal on whole, and refuses what would be silently wrong."""

import pytest
import torch
from torch.func import grad, vmap

from torch_bp.nn import BatchNorm1d, Linear, ReLU, Residual, Sequential, Tanh

x = torch.randn(4, 3)


def test_sum_and_gradients():
    block = Residual(Sequential(Linear(3, 3), Tanh()))
    results = []
    for function in (block, lambda z: z + block.module(z)):
        z = x.clone().requires_grad_()
        output = function(z)
        results.append((output, *torch.autograd.grad(output.sin().sum(), [z, *block.parameters()])))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_error_signal_passes_a_stack_of_dead_blocks_whole():
    stack = Sequential(*(Residual(Linear(3, 3)) for _ in range(50)))
    for parameter in stack.parameters():
        torch.nn.init.zeros_(parameter)
    z, upstream = x.clone().requires_grad_(), torch.randn(4, 3)
    assert torch.equal(torch.autograd.grad(stack(z), z, upstream)[0], upstream)


def test_state_and_text():
    block = Residual(Linear(3, 3))
    assert [*block.state_dict()] == ["module.weight", "module.bias"]
    assert repr(block) == "Residual(\n  (module): Linear(in_features=3, out_features=3, bias=True)\n)"


def test_further_arguments_reach_the_module():
    attention = torch.nn.MultiheadAttention(4, 1)

    class First(torch.nn.Module):
        def forward(self, query, key, *, mask):
            return attention(query, key, key, attn_mask=mask)[0]

    query, key, mask = torch.randn(2, 4), torch.randn(3, 4), torch.zeros(2, 3)
    expected = query + First()(query, key, mask=mask)
    assert torch.equal(Residual(First())(query, key, mask=mask), expected)


def test_another_shape_is_named():
    with pytest.raises(ValueError, match=r"Residual: .*shape of input, \(4, 3\), got \(4, 1\).*Linear"):
        Residual(Linear(3, 1))(x)  # which broadcasting would hide


def test_an_input_that_is_altered_is_named():
    block = Residual(Sequential(ReLU(inplace=True), Linear(3, 3)))
    with pytest.raises(RuntimeError, match=r"Residual: .*Sequential altered it in place.*inplace=False"):
        block(x.clone())
    Residual(Sequential(Linear(3, 3), ReLU(inplace=True)))(x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_transforms_modes_and_compilation():
    block = Residual(Sequential(Linear(3, 3), BatchNorm1d(3), Tanh())).eval()
    expected = block(x)
    with torch.inference_mode():
        assert torch.equal(block(x.clone()), expected)
    torch.testing.assert_close(vmap(block)(x.view(4, 1, 3)).view(4, 3), expected)
    assert grad(lambda z: block(z).sum())(x).shape == x.shape
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)
    torch._dynamo.reset()
