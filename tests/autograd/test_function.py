"""The base of hand-written derivatives: what it adds to torch's Function, and that it adds nothing else."""

import inspect

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jvp, vmap

from torch_bp.autograd import Function
from torch_bp.autograd.function import cast_apply
from torch_bp.kernels import formula
from torch_bp.nn import functional as F
from torch_bp.ops import activation, saves_input

dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class Product(Function):
    """x y, in terms that can be differentiated again."""

    @staticmethod
    def forward(x, y):
        return x * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dz):
        x, y = ctx.saved_tensors
        return (dz * y if ctx.needs_input_grad[0] else None), (dz * x if ctx.needs_input_grad[1] else None)

    @staticmethod
    def jvp(ctx, dx, dy):
        x, y = ctx.saved_tensors
        return (0 if dx is None else dx * y) + (0 if dy is None else dy * x)


class NegativeProduct(Product):
    """Another value and backward; jvp comes from the class above and is then wrong, which shows that it is called."""

    @staticmethod
    def forward(x, y):
        return -x * y

    @staticmethod
    def backward(ctx, dz):
        dx, dy = Product.backward(ctx, dz)
        return -dx, -dy


class WithoutJvp(Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


class OldStyle(Function):
    """`forward` with a context, as torch allows outside of transforms."""

    @staticmethod
    def forward(ctx, x, power=2):
        ctx.save_for_backward(x)
        ctx.power = power
        return x**power

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return ctx.power * x ** (ctx.power - 1) * dy, None


def torch_apply(function, *args):
    """What `torch.autograd.Function.apply` does, binding of the signature included."""
    return torch.autograd.Function.apply.__func__(function, *args)


def two(requires_grad=False):
    return tuple(torch.randn(3, dtype=torch.float64, requires_grad=requires_grad) for _ in range(2))


def test_apply_equals_torchs():
    tensors = two(requires_grad=True)
    results = []
    for apply in (Product.apply, lambda *args: torch_apply(Product, *args)):
        output = apply(*tensors)
        slopes = torch.autograd.grad(output.sum(), tensors, create_graph=True)
        again = torch.autograd.grad(slopes[0].square().sum(), tensors[1])
        results.append((output, *slopes, *again))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_every_derivative_of_a_function_with_jvp():
    tensors = two(requires_grad=True)
    assert gradcheck(Product.apply, tensors, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(Product.apply, tensors, check_fwd_over_rev=True)
    x, y = two()
    cube = lambda x: Product.apply(Product.apply(x, x), x).sum()  # noqa: E731
    for second in (hessian(cube), jacfwd(jacfwd(cube)), jacfwd(grad(cube))):
        torch.testing.assert_close(second(x), (6 * x).diag())
    torch.testing.assert_close(vmap(grad(Product.apply))(x, y), y)


def test_a_subclass_inherits_jvp():
    x, y = two()
    assert gradcheck(NegativeProduct.apply, two(requires_grad=True))
    value, change = jvp(NegativeProduct.apply, (x, y), (torch.ones(3).double(), torch.zeros(3).double()))
    torch.testing.assert_close((value, change), (-x * y, y))


def test_jvp_is_called_in_a_dual_level():
    x, y = two()
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(Product.apply(forward_ad.make_dual(x, torch.ones_like(x)), y))
    torch.testing.assert_close(tuple(output), (x * y, y))


def test_without_jvp_forward_mode_raises_torchs_error():
    class Theirs(torch.autograd.Function):
        generate_vmap_rule = True
        forward, backward = staticmethod(WithoutJvp.forward), staticmethod(WithoutJvp.backward)
        setup_context = staticmethod(WithoutJvp.setup_context)

    x, _ = two()
    messages = []
    for function in (WithoutJvp, Theirs):
        with forward_ad.dual_level(), pytest.raises(RuntimeError) as caught:
            function.apply(forward_ad.make_dual(x, x))
        messages.append(str(caught.value).replace(function.__name__, ""))
        with pytest.raises(RuntimeError) as caught:
            jvp(function.apply, (x,), (x,))
        messages.append(str(caught.value).replace(function.__name__, ""))
    assert messages[:2] == messages[2:]


def test_the_old_style_of_forward():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    output = OldStyle.apply(x, 3)
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], 3 * x.detach() ** 2)
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(lambda x: OldStyle.apply(x, 3).sum())(x.detach())


def test_a_tensor_that_escaped_from_a_transform():
    escaped = []
    grad(lambda x: escaped.append(x) or x.sum())(torch.ones(3))
    output = F.tanh(*escaped)
    torch.testing.assert_close(output, torch.ones(3).tanh())
    assert output.grad_fn is None


def test_nodes_in_the_graph_have_names():
    x, y = two(requires_grad=True)
    assert Product.apply(x, y).grad_fn.name() == "ProductBackward"
    nodes = {
        "SigmoidBackward": F.sigmoid(x),
        "LeakyReluBackward": F.leaky_relu(x),
        "LinearBackward": F.linear(x, y.expand(2, 3)),
        "LogSoftmaxBackward": F.log_softmax(x, 0),
        "SquaredErrorBackward": F.half_mse_loss(x, y),
        "BinaryCrossEntropyWithLogitsBackward": F.binary_cross_entropy_with_logits(x, y.sigmoid()),
        "CrossEntropyBackward": F.cross_entropy(x, torch.tensor(1)),
        "NegativeLogLikelihoodBackward": F.nll_loss(x, torch.tensor(1)),
    }
    assert [output.grad_fn.name() for output in nodes.values()] == list(nodes)


def test_classes_can_be_looked_at():
    assert inspect.getdoc(Product) == "x y, in terms that can be differentiated again."
    assert Product.__module__ == __name__
    assert issubclass(Product, torch.autograd.Function)


def test_cast_apply_casts_real_tensors_of_its_device():
    seen = []

    class Look(Function):
        @staticmethod
        def forward(*args):
            seen.extend(args)
            assert not torch.is_autocast_enabled("cpu")
            return args[0]

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

    args = (torch.ones(1), torch.ones(1).double(), torch.ones(1).long(), None, 2.0, torch.ones(1, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_apply(Look, None, *args)
    assert [getattr(a, "dtype", a) for a in seen] == [
        *(torch.bfloat16, torch.float64, torch.int64, None, 2.0, torch.float32),
    ]


@formula
def cubed(z):
    return z * z * z


@formula
def cubed_backward(dy, z, *, weight):
    return dy * 3 * weight * z * z


def weighted_cube():
    value = lambda z, weight: weight * cubed(z)  # noqa: E731
    return activation("weighted_cube", value, cubed_backward, saves=saves_input, parameters=("weight",))


def test_an_activation_of_ones_own():
    function = weighted_cube()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert function.__name__ == "weighted_cube"
    assert function(x, 2.0).grad_fn.name() == "WeightedCubeBackward"
    assert gradcheck(lambda x: function(x, 2.0), x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda x: function(x, 2.0), x, check_fwd_over_rev=True)
    with pytest.raises(TypeError, match="weight"):
        function(x)


@dynamo
def test_compile_takes_functions_whole():
    torch._dynamo.reset()
    cube = weighted_cube()

    def both(x, y):
        return Product.apply(cube(x, 2.0), y)

    tensors = two(requires_grad=True)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(*tensors).sum(), tensors) for f in (compiled, both))
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    torch._dynamo.reset()
