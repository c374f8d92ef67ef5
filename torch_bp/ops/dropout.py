"""Dropout: in training y = x k, with k = 1 / (1 - p) for a random share 1 - p of the elements and 0 for the rest.

    dx = dy k

The factor 1 / (1 - p) keeps the mean of y that of x, so that nothing need be done in evaluation.

Shapes: x, k and y alike, of any shape. Saved: whether an element was kept, one bit each, eight to a byte, which is a
thirty-second of the k in float32 that torch keeps on the CPU. Forward mode is the same line with a tangent for dy.
"""

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from torch_bp.autograd.function import Function, overridden, save


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device).unsqueeze(1)


def pack(kept: torch.Tensor) -> torch.Tensor:
    """Return `kept` (bool, any shape) as bits: the k-th bits of all bytes hold the k-th eighth of the elements."""
    flat = kept.reshape(-1).to(torch.uint8)
    rows = torch.nn.functional.pad(flat, (0, -flat.shape[0] % 8)).view(8, -1)
    return (rows << _places(rows.device)).sum(0, dtype=torch.uint8)


def unpack(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return what `pack` was given, of this shape, as the numbers 0 and 1."""
    return (bits >> _places(bits.device) & 1).view(-1)[: shape.numel()].view(shape)


class Dropout(Function):
    """y = x k, of a k that is given."""

    equations = ("y = x k", "dx = dy k")

    @staticmethod
    def forward(x: torch.Tensor, k: torch.Tensor, p: float) -> torch.Tensor:
        return x * k

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, k, ctx.p = inputs
        if getattr(ctx, "explicit", False):  # memory that is there anyway: no bits
            save(ctx, k)
        else:
            save(ctx, pack(k != 0) if ctx.p < 1 else None)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        if kept is None:
            kept = dy.new_zeros(())
        elif kept.dtype is torch.uint8:
            kept = unpack(kept, dy.shape).to(dy.dtype).div(1 - ctx.p)
        return dy * kept, None, None

    @staticmethod
    def jvp(ctx: Any, dx: torch.Tensor, *_: None) -> torch.Tensor:
        return Dropout.backward(ctx, dx)[0]


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.dropout`, with torch's random numbers: on the CPU both drop the same elements.

    Without `training`, and for p = 0, the input itself is returned. `inplace=True` writes the result to `input`.

    Raises:
        ValueError: `p`, the share that is dropped, is not between 0 and 1.

    Example:
        >>> dropout(torch.ones(3), p=1.0)
        tensor([0., 0., 0.])
    """
    if has_torch_function_unary(input) and overridden():
        return handle_torch_function(dropout, (input,), input, p=p, training=training, inplace=inplace)
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not isinstance(input, torch.Tensor) or input.is_nested:  # torch's alone: its error, and ragged rows
        return torch.nn.functional.dropout(input, p, training, inplace)
    if not training or p == 0 or not input.numel():
        return input
    k = input.new_zeros(()) if p == 1 else torch.empty_like(input).bernoulli_(1 - p).div_(1 - p)
    result = Dropout.apply(input, k, p)
    return input.copy_(result) if inplace else result
