"""Skip connections, sec. 9.3, remedy 4."""

from typing import Any

import torch


class Residual(torch.nn.Module):
    """y = x + F(x), with F any module whose output has the shape of its input; sec. 9.3.

    The error signal at x is dy + F'(x)^T dy. Its first term does not pass through F: over a stack of such blocks the
    signal at the output reaches every one of them whole, where without the skip it arrives as the product of all
    F'(x), which vanishes if they are small.

    Args:
        module: F. It must not alter its input in place, since x is added afterwards.

    Shapes:
        input and output (*), as F takes them.

    Raises:
        ValueError: F(x) has another shape than x.
        RuntimeError: F has altered x.

    Example:
        >>> block = Residual(torch.nn.Linear(3, 3))
        >>> block(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
        >>> [*block.state_dict()]
        ['module.weight', 'module.bias']
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Add to `input` what the module makes of it and of any further arguments."""
        version = _version(input)
        output = self.module(input, *args, **kwargs)
        if output.shape != input.shape:
            raise ValueError(
                f"Residual: module(input) must have the shape of input, {tuple(input.shape)}, got "
                f"{tuple(output.shape)}; let {type(self.module).__name__} return as many features as it takes."
            )
        if _version(input) != version:
            raise RuntimeError(
                f"Residual: module must leave its input as it is, but {type(self.module).__name__} altered it in "
                "place, and it is still to be added; use inplace=False in its first layer."
            )
        return input + output


def _version(tensor: torch.Tensor) -> int:
    """How often the tensor has been written to, where that is counted."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
