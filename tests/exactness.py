"""How exact a row's results are: ours and torch's errors against the same operation of torch in float64.

All three get the same numbers, what comes from above included, rounded to the dtype before they are widened.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import torch

from tests.tables import Row

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORST = 1.5  # ratio that any result may have
DRAWS = 64
FEW, LARGE = 8, 10**5  # among so many numbers the largest error is much the same in every draw


@dataclass(frozen=True)
class Exactness:
    """Of one result, an output or a gradient: root mean squares over draws of the largest errors, and of half an ulp.

    One draw compares the luck of two roundings. The ulp, the unit in the last place, is that of the largest element.
    """

    result: str
    ours: float
    theirs: float
    half_ulp: float

    @property
    def ratio(self) -> float:
        """Ours over torch's, which count as half an ulp where they are less: that much rounding once may cost."""
        return inf if self.ours == inf else self.ours / max(self.theirs, self.half_ulp)


def measure(row: Row, dtype: torch.dtype) -> Iterator[Exactness]:
    """Yield how exact the output is, and the gradient by each differentiable argument."""
    numbers = sum(v.numel() for v in row.draw().values() if isinstance(v, torch.Tensor))
    draws = zip(*(_draw(row, dtype, number) for number in range(FEW if numbers > LARGE else DRAWS)))
    for name, results in zip(("output", *row.differentiable), draws, strict=True):
        yield compare(name, *(torch.stack(found) for found in zip(*results)))


def compare(result: str, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> Exactness:
    """Compare draws, stacked. Where both overflow, or are NaN, there is nothing to compare; one's NaN is all wrong."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    limits = torch.finfo(ours.dtype)
    alike = ~ours.isfinite() & ((ours == theirs) | (ours.isnan() & theirs.isnan()))
    errors = []
    for found in (ours, theirs):
        error = (found.double() - exact).abs().nan_to_num(nan=inf, posinf=inf)
        errors.append(_largest(torch.where(alike | (found == exact), 0, error)))
    size = _largest(exact.nan_to_num(nan=0).abs()).clamp(limits.smallest_normal, limits.max)
    half_ulp = torch.ldexp(torch.full_like(size, limits.eps / 2), torch.frexp(size).exponent - 1)
    return Exactness(result, *(float(values.square().mean().sqrt()) for values in (*errors, half_ulp)))


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(len(values), -1).amax(1)


def _draw(row: Row, dtype: torch.dtype, number: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield ours, torch's and the exact one of each result."""
    drawn = row.draw(dtype, number=number)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in drawn.items()}
    sides = ((row.ours, drawn), (row.theirs, drawn), (row.theirs, wide))
    return zip(*(_results(row, function, arguments, dtype, number) for function, arguments in sides))


def _results(
    row: Row, function: Callable[..., torch.Tensor], arguments: dict[str, Any], dtype: torch.dtype, number: int
) -> tuple[torch.Tensor, ...]:
    torch.default_generator.manual_seed(number)  # for dropout; `torch.manual_seed` takes longer than all the rest
    tensors = [arguments[k].detach().requires_grad_() for k in row.differentiable]
    output = row.function(function, arguments)(*tensors)
    upstream = row.upstream(output.shape, torch.Generator().manual_seed(number)).to(dtype)
    return output.detach(), *torch.autograd.grad(output, tensors, upstream.to(output.dtype))
