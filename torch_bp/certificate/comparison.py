"""How far two sides are from each other, and how far they may be."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from torch_bp.certificate.subject import Tensors

# Largest deviation by dtype. The units of rounding are 1e-16, 6e-8, 5e-4 and 4e-3. Sums in another order and a few
# operations more or less cost tens of them, wrong mathematics nearly all digits; where two sides do the same they
# agree far better than this. Float64 has digits to spare: its limit leaves them for badly conditioned models.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
FLOOR = 1e-2


def coarsest(tensors: Iterable[Tensor | None]) -> torch.dtype | None:
    """Return the dtype with the fewest digits, or None if no tensor holds real or complex numbers."""
    found = {t.dtype.to_real() for t in tensors if t is not None and (t.is_floating_point() or t.is_complex())}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def tolerance(dtype: torch.dtype | None) -> float:
    """Return the largest deviation that holds for numbers of a dtype, 0 where there are none."""
    return 0.0 if dtype is None else TOLERANCES.get(dtype, 16 * torch.finfo(dtype).eps)


def mismatch(got: Tensors, expected: Tensors) -> tuple[str, str] | None:
    """Return the name of the first tensor that cannot be measured by a number, and why; None if there is none."""
    for name in (*expected, *got):
        if name not in got or name not in expected:
            return name, f"only {'torch' if name in expected else 'torch_bp'} has it"
        mine, other = got[name], expected[name]
        if mine is None or other is None:
            if mine is not other:
                return name, f"None in {'torch_bp' if mine is None else 'torch'} only"
            continue
        for what in ("shape", "dtype", "layout", "device"):
            a, b = getattr(mine, what), getattr(other, what)
            if a != b:
                return name, f"{what} {_written(a)} should be {_written(b)}"
        if coarsest([mine]) is None and not torch.equal(mine, other):
            return name, f"{int((mine != other).sum())} of {mine.numel()} entries differ"
    return None


def deviations(got: Tensors, expected: Tensors) -> dict[str, float]:
    """Return, for every tensor of real or complex numbers, max |got - expected| over its scale.

    The scale is the largest expected number of the tensor. Where a gradient is zero but for rounding that would
    compare noise with noise: a scale is at least 1/100 of the largest of its kind. NaN and infinities must be in
    the same places.
    """
    named = {k: (got[k], t) for k, t in expected.items() if t is not None and coarsest([t]) is not None}
    wide = {k: (_wide(mine), _wide(other)) for k, (mine, other) in named.items() if mine is not None}
    sizes = {k: _largest(other) for k, (_, other) in wide.items()}
    kinds: dict[str, float] = {}
    for name, size in sizes.items():
        kinds[_kind(name)] = max(size, kinds.get(_kind(name), 0.0))
    return {k: _relative(*pair, max(sizes[k], FLOOR * kinds[_kind(k)])) for k, pair in wide.items()}


def _relative(got: Tensor, expected: Tensor, scale: float) -> float:
    if not torch.equal(got.isfinite(), expected.isfinite()):
        return math.inf
    odd = ~expected.isfinite()
    if not torch.equal(got[odd].nan_to_num(), expected[odd].nan_to_num()):
        return math.inf
    difference = _largest(got - expected)
    return difference / scale if scale else math.inf if difference else 0.0


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value of the finite entries."""
    finite = tensor[tensor.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def _wide(tensor: Tensor) -> Tensor:
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    return dense.to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)


def _kind(name: str) -> str:
    return name.partition(":")[0]


def _written(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
