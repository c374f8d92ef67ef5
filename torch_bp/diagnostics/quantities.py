"""What is measured, each a function of tensors: sums that one pass gives, and what follows from sums.

Shapes: a layer's input a_before (N, *, I), its pre-activation z, activation a and error signal dz, each (N, *, O); N
examples, and * any dimensions in between, such as the steps of a sequence. Sums are in float64 and add up over the
micro-batches of a step; all that is not a sum follows from sums when they are complete.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_bp.kernels import Table, formula, row_sum, total, where, zeros_like

BINS = 30

SUMS = ("sum", "square", "nan", "inf")  # columns of `sums`


@formula
def sums_of(x):
    """Of the finite values of a tensor their sum and the sum of their squares; how many are NaN; how many infinite."""
    number, finite = x == x, x - x == 0
    nothing = zeros_like(x)
    return (
        total(where(finite, x, 0)),
        total(where(finite, x * x, 0)),
        total(where(number, nothing, 1)),
        total(where(finite, nothing, where(number, 1 + nothing, 0))),
    )


@formula
def moments_of(x):
    """The sum of a tensor and the sum of its squares; not finite where a value is not, or a square is too large."""
    return total(x), total(x * x)


def sums(tensors: Sequence[Tensor], table: Table | None = None) -> Tensor:
    """`SUMS` of each of the tensors, (n, 4) in float64; those of one kind by one call of a list kernel.

    Args:
        tensors: floating-point tensors of any shapes, complex ones too, which count as pairs of numbers.
        table: kept for the next call with tensors of the same kinds and shapes.
    """
    tensors = [plain(t) for t in tensors]
    first = tensors[0]
    if all(t.dtype is first.dtype and t.device == first.device and type(t) is type(first) for t in tensors):
        return torch.stack(sums_of.foreach_(tensors, table=table), dim=1)
    return torch.stack([torch.stack(sums_of.foreach_([t]), dim=1)[0].to(first.device) for t in tensors])


def plain(x: Tensor) -> Tensor:
    """The numbers of any tensor there is: sparse, complex, distributed (of this rank)."""
    x = x.detach()
    x = x.to_local() if hasattr(x, "to_local") else x
    x = x.coalesce().values() if x.layout is torch.sparse_coo else x
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.contiguous() if x.dim() and x.stride()[-1] == 0 else x


def mean_and_variance(count: float, total_: float, square: float) -> tuple[float, float]:
    """Mean and biased variance of `count` finite values, from their sum and the sum of their squares."""
    if not count:
        return math.nan, math.nan
    mean = total_ / count
    return mean, max(square / count - mean * mean, 0.0)


@formula(per_row=())
def row_squares(x):
    """The sum of squares of each row of (R, C): (R, 1)."""
    return row_sum(x * x)


@formula(per_row=())
def row_not_finite(x):
    """How many numbers of each row of (R, C) are NaN or infinite: (R, 1)."""
    return row_sum(where(x - x == 0, zeros_like(x), 1))


def examples_not_finite(x: Tensor) -> Tensor:
    """How many numbers of each example of x (N, *) are NaN or infinite (N)."""
    x = plain(x)
    if not x.numel():
        return x.new_zeros(len(x) if x.dim() else 1)
    return row_not_finite(x.reshape(len(x) if x.dim() else 1, -1)).reshape(-1)


def first_of(marked: Tensor, most: int) -> Tensor:
    """Where the first `most` numbers above 0 lie in each row of (R, N), in order, in float64; infinite for none."""
    places = torch.arange(marked.shape[1], dtype=torch.float64, device=marked.device)
    places = torch.where(marked > 0, places, math.inf)
    return places.topk(min(most, marked.shape[1]), largest=False, sorted=True).values


def per_example_squares(before: Tensor, dz: Tensor, bias: bool) -> Tensor:
    """Squared norms (N) of the gradients that single examples contribute to a linear layer, which are never formed.

    Example i contributes the sum over * of d a^T to dW and the sum of d to db, so that

        |dW_i|^2 = |d_i|^2 |a_i|^2             without dimensions between,
        |dW_i|^2 = sum_st (d_s d_t) (a_s a_t)  with them: the product of two Gram matrices, element by element.

    Args:
        before: the layer's input (N, *, I).
        dz: its error signal (N, *, O).
        bias: whether the layer has one, whose gradient counts too.
    """
    before, dz = before.detach(), dz.detach()
    if dz.dim() == 2:
        return (row_squares(dz) * (row_squares(before) + bias)).reshape(-1)
    if dz.dim() < 2:  # one example, or none of its own
        before, dz = before.reshape(1, -1), dz.reshape(1, -1)
        return per_example_squares(before, dz, bias)
    before, dz = (
        t.reshape(t.shape[0], -1, t.shape[-1]).to(torch.promote_types(t.dtype, torch.float32)) for t in (before, dz)
    )
    squares = ((before @ before.mT) * (dz @ dz.mT)).sum((1, 2))
    return squares + dz.sum(1).square().sum(1) if bias else squares


def noise(mean_square: float, batch_square: float, batch: int) -> tuple[float, float]:
    """Unbiased estimates of tr(S) and |G|^2, whose ratio is the simple noise scale, McCandlish et al. (2018), sec. 2.2.

    G is the true gradient and S the covariance of single examples' gradients g_i around it. The mean of B of them has
    E |mean g|^2 = |G|^2 + tr(S) / B, and E |g_i|^2 = |G|^2 + tr(S), of which these are the solution (appendix A.1).

    Args:
        mean_square: mean of |g_i|^2 over the batch.
        batch_square: |mean of g_i|^2.
        batch: B, at least 2.
    """
    spread = (mean_square - batch_square) * batch / (batch - 1)
    return spread, (batch * batch_square - mean_square) / (batch - 1)


def predicted_decrease(gradients: Sequence[Tensor], updates: Sequence[Tensor]) -> Tensor:
    """-g . u in float64: by how much the loss would fall by the updates u, were it linear, eq. 6."""
    return -torch.stack([_product(g, u) for g, u in zip(gradients, updates)]).sum()


def _product(g: Tensor, u: Tensor) -> Tensor:
    if g.layout is torch.sparse_coo:  # 0 but for these rows
        g = g.detach().coalesce()
        u = u.detach()[tuple(g.indices())]
    return (plain(g).double() * plain(u).double()).sum()


def histogram(x: Tensor, bins: int = BINS) -> Tensor:
    """In float64 the least and largest finite value, the counts of `bins` bins between, mean, mean square, nan, inf.

    It waits for nothing on the host, and what is not finite is in no bin.
    """
    x = plain(x).reshape(-1)
    x = x if x.dtype is torch.float64 else x.float()
    finite = x.isfinite()
    low = torch.where(finite, x, math.inf).amin() if x.numel() else x.new_tensor(math.inf)
    high = torch.where(finite, x, -math.inf).amax() if x.numel() else x.new_tensor(-math.inf)
    some = low <= high
    low, high = low.where(some, 0), high.where(some, 0)
    # halves, as the width of all that float32 can hold is more than it can hold
    place = (x / 2 - low / 2) / (high / 2 - low / 2) * bins
    place = torch.where(finite, place.nan_to_num(0.0), bins).clamp(0, bins).long()
    place = torch.where(finite, place.clamp(max=bins - 1), bins)
    counts = torch.zeros(bins + 1, dtype=torch.float64, device=x.device)
    counts.index_add_(0, place, torch.ones_like(place, dtype=torch.float64))
    found = sums([x])[0]
    number = finite.sum().clamp(min=1)
    ends = torch.stack([low.double(), high.double()])
    return torch.cat([ends, counts[:bins], found[:2] / number, found[2:]])
