"""How a loss per element or per row becomes what is returned: torch's `reduction` and what losses have in common."""

import torch
from torch.nn import _reduction

NONE, MEAN, SUM = (_reduction.get_enum(name) for name in ("none", "mean", "sum"))


def reduction_code(size_average: bool | None, reduce: bool | None, reduction: str) -> int:
    """Return NONE, MEAN or SUM, as the legacy arguments or `reduction` say, checked as torch checks it."""
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_enum(size_average, reduce)
    return _reduction.get_enum(reduction)


def no_gradient(name: str, **tensors: torch.Tensor | None) -> None:
    """Refuse, in torch's words, weights that ask for a gradient which is not defined."""
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: the derivative for '{argument}' is not implemented; pass {argument}.detach() or set "
                f"requires_grad=False on it."
            )
