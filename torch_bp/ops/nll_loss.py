"""The negative log likelihood of class indices, on log-probabilities.

    l = -sum of r logp_target        dlogp = -r at the target's class, 0 elsewhere

r holds the class weight of the target, the reduction and what comes from above; rows of `ignore_index` have r = 0.
Saved: the input, which backward needs for its shape alone, and the target.
"""

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_variadic

from torch_bp.autograd.function import cast_apply, connected, overridden, under_autocast
from torch_bp.kernels import formula, one_hot, where
from torch_bp.kernels.program import HALF
from torch_bp.ops import pairing
from torch_bp.ops.class_loss import (
    ClassLoss,
    CountedLoss,
    class_dim,
    column,
    countable,
    counted_nll,
    from_above,
    label_tangent,
)
from torch_bp.ops.reduction import no_gradient, reduction_code
from torch_bp.ops.rows import from_rows, to_rows

_Optional = torch.Tensor | None


@formula(per_row=("rows",), labels=("target",))
def nll_slope(logp, target, rows=None, *, scale=1.0, count=1.0, ignored):
    """The gradient at log-probabilities: minus what comes from above at the target's class."""
    hit = one_hot(target, logp)
    slope = -(scale / count) * hit if rows is None else -rows * hit
    return where((hit > 0) & (target != ignored), slope, 0)  # 0 elsewhere, also where what comes from above is NaN


def nll_backward(
    dy: Any,
    z: torch.Tensor,
    target: Any,
    weight: _Optional,
    reduction: int,
    ignored: int,
    count: float | None = None,
) -> Any:
    """The gradient at log-probabilities of any shape."""
    dtype, dim = z.dtype, class_dim(z)
    if dtype in HALF:
        z, dy = z.float(), dy.float()
    rows, numbers, _ = from_above(dy, target, weight, reduction, ignored, count)
    labels, ignored = column(target, ignored)
    slope = nll_slope(to_rows(z, dim), labels, rows, **numbers, ignored=ignored)
    return from_rows(slope, z, dim).to(dtype)


class NegativeLogLikelihood(ClassLoss):
    """The loss on log-probabilities that eq. 4 ends with."""

    equations = ("L = mean of -logp[target]", "dlogp = -onehot dL / n")

    @staticmethod
    def forward(
        logp: torch.Tensor, target: torch.Tensor, weight: _Optional, reduction: int, ignored: int
    ) -> torch.Tensor:
        return torch._C._nn.nll_loss_nd(logp, target, weight, reduction, ignored)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[_Optional, ...]:
        logp, target, weight = ctx.saved_tensors
        slope = nll_backward(dy, logp, target, weight, *ctx.options)
        return connected(slope, logp), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dlogp: _Optional, _: None, dw: _Optional, *__: Any) -> Any:
        return label_tangent(NegativeLogLikelihood.forward, nll_backward, ctx, dlogp, dw)


class CountedNegativeLogLikelihood(CountedLoss):
    """The loss on log-probabilities, without class weights, where nobody watches."""

    equations = ("L = mean of -logp[target]", "dlogp = -onehot dL / n")

    @staticmethod
    def forward(logp: torch.Tensor, target: torch.Tensor, reduction: int, ignored: int) -> tuple[torch.Tensor, Any]:
        return counted_nll(logp, target, reduction, ignored)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, _: None) -> tuple[_Optional, ...]:
        logp, target = ctx.saved_tensors
        reduction, ignored, count = ctx.options
        return connected(nll_backward(dy, logp, target, None, reduction, ignored, count), logp), None, None, None


def nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: _Optional = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """As `torch.nn.functional.nll_loss`, on log-probabilities.

    Example:
        >>> nll_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]))
        tensor(2.)
    """
    if has_torch_function_variadic(input, target, weight) and overridden():
        return handle_torch_function(
            nll_loss,
            (input, target, weight),
            input,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
        )
    if pairing.enabled:
        pairing.check("nll_loss", input)
    code = reduction_code(size_average, reduce, reduction)
    no_gradient("nll_loss", weight=weight)
    if countable(input, target, weight):
        return CountedNegativeLogLikelihood.apply(input, target, code, ignore_index)[0]
    args = (input, target, weight, code, ignore_index)
    if under_autocast(input):
        return cast_apply(NegativeLogLikelihood, torch.float32, *args)
    return NegativeLogLikelihood.apply(*args)
