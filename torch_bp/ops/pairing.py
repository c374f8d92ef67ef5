"""A word where a loss gets what it is not for: probabilities where logits are meant, or logits where probabilities are.

Cross-entropy (eq. 4) and binary cross-entropy on logits (eq. 5 on eq. 12) apply softmax or sigmoid themselves: after
another one they train all the same, badly. The loss on probabilities, and the one on log-probabilities, get no sense
out of logits. What the input is, the graph tells: the type of the node that made it, seen through a few views.

Each pair is told of once a process, by a `LossPairingWarning` that names the line to write instead. Nothing is said
where there is no graph, under `torch.compile` and inside `torch.func` transforms, and of pairs that are only wordy:
log-softmax before cross-entropy changes nothing.
"""

import functools
import sys
import warnings
from typing import Any

import torch

_is_compiling = torch.compiler.is_dynamo_compiling
_transforms_active = torch._C._are_functorch_transforms_active

# What a node of the graph makes, by its name without torch's number at the end: torch's nodes and ours.
_MADE_BY = {
    "SoftmaxBackward": "softmax",
    "SigmoidBackward": "sigmoid",
    "LinearBackward": "linear",
    "LinearSigmoidBackward": "sigmoid",
    "AddmmBackward": "linear",
    "MmBackward": "product",
    "ConvolutionBackward": "product",
}
# Nodes that hand on what they are given: other shapes, other dtypes, some of the entries.
_VIEWS = {
    f"{name}Backward"
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Clone", "ToCopy"),
        *("Squeeze", "Unsqueeze", "T", "Transpose", "Permute", "Expand"),
        *("Select", "Slice", "Index", "IndexSelect", "Gather", "Split", "Unbind"),
    )
}
_FARTHEST = 8  # nodes that are looked at
_CROSS_ENTROPY = "loss = nn.CrossEntropyLoss()(logits, target), without the softmax"
_ON_LOGITS = "loss = nn.BCEWithLogitsLoss()(logits, target), without a sigmoid"
# Loss and what it is given: why that is wrong, and what to write.
_WRONG = {
    ("cross_entropy", "softmax"): ("it applies softmax itself, so that softmax runs twice", _CROSS_ENTROPY),
    ("binary_cross_entropy_with_logits", "sigmoid"): (
        "it applies the sigmoid itself, so that it runs twice",
        _ON_LOGITS,
    ),
    ("binary_cross_entropy", "linear"): ("it expects probabilities, and a linear layer makes logits", _ON_LOGITS),
    ("nll_loss", "linear"): ("it expects log-probabilities, and a linear layer makes logits", _CROSS_ENTROPY),
    ("nll_loss", "softmax"): ("it expects log-probabilities, and softmax makes probabilities", _CROSS_ENTROPY),
}
_MODULES = {
    "cross_entropy": "CrossEntropyLoss",
    "nll_loss": "NLLLoss",
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
}

enabled = True  # losses ask before they call `check`: that costs next to nothing
_told: set[tuple[str, str]] = set()


class LossPairingWarning(UserWarning):
    """A loss is given what another loss is for. Filter it as any warning, or see `set_enabled`."""


def set_enabled(mode: bool) -> None:
    """Switch the look at what losses are given on (the default) or off, in this process.

    Switched on, it tells of each pair anew.

    Example:
        >>> from torch_bp.nn import pairing
        >>> pairing.set_enabled(False)
        >>> pairing.set_enabled(True)
    """
    global enabled
    enabled = mode
    _told.clear()


def check(loss: str, input: torch.Tensor) -> None:
    """Warn if the graph says that `input` is not what `loss`, one of torch's functions by name, is for."""
    if _is_compiling() or _transforms_active() or type(input) is not torch.Tensor:
        return
    node = input.grad_fn
    if node is None:
        return
    made = _made_by(node)
    if (loss, made) in _WRONG and (loss, made) not in _told and not torch.compiler.is_compiling():
        _told.add((loss, made))
        why, instead = _WRONG[loss, made]
        warnings.warn(
            f"{_MODULES[loss]} ({loss}): the input must not be the output of {made}, because {why}. Write: {instead}. "
            "(torch_bp.nn.pairing.set_enabled(False) turns this check off.)",
            LossPairingWarning,
            stacklevel=_users_level(),
        )


def _made_by(node: Any) -> str:
    """Return which operation made the output of a node, as `_MADE_BY` has it, or "" if it is none of these."""
    for _ in range(_FARTHEST):
        made = _kind(type(node).__name__)
        if made == "product":
            return "linear" if _by_a_parameter(node) else ""
        if made != "view":
            return made
        node = node.next_functions[0][0]
        if node is None:
            break
    return ""


@functools.cache
def _kind(name: str) -> str:
    name = name.rstrip("0123456789")
    return "view" if name in _VIEWS else _MADE_BY.get(name, "")


def _by_a_parameter(product: Any) -> bool:
    """True if the second factor of a product is a trained weight; a mixture of probabilities is a product too."""
    weight = product.next_functions[1][0]
    if type(weight).__name__ == "TBackward0":
        weight = weight.next_functions[0][0]
    return type(weight).__name__ == "AccumulateGrad"


def _users_level() -> int:
    """Return the `stacklevel`, for a `warn` in the caller, of the first frame outside of torch and this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "torch_bp"):
        level, frame = level + 1, frame.f_back
    return level
