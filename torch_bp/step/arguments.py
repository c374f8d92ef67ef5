"""What a step is made of and called with: checks, and what tells one kind of batch from another.

Two calls are of one kind if what was captured for the first may serve the second, as far as arguments and modes tell.
What the model tells is in `torch_bp.step.unchanged`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from torch_bp.kernels import engine
from torch_bp.kernels.plain import PLAIN_TYPES, unwatched

Inputs = tuple[tuple[Any, ...], tuple[Any, ...]]  # the arguments of the model, and the targets
_autocasting = torch._C._is_any_autocast_enabled
_is_neg, _is_conj, _is_zero = Tensor.is_neg, Tensor.is_conj, Tensor._is_zerotensor
_requires_grad = operator.attrgetter("requires_grad")
_place_of, _dtype_of = Tensor.data_ptr, operator.attrgetter("dtype")
_COMPLEX = frozenset({torch.complex32, torch.complex64, torch.complex128})
_CHOICES: dict[str, tuple[Any, ...]] = {
    "capture": ("auto", True, False),
    "fallback": ("error", "autograd"),
    "precision": (None, "bf16", "fp16"),
}
_plain_dispatch: Any = Tensor.__torch_dispatch__


def as_inputs(x: Any, y: Any) -> Inputs:
    """Return the arguments of model and loss, of which one alone need not be a tuple."""
    return x if isinstance(x, tuple) else (x,), y if isinstance(y, tuple) else (y,)


def _autocast_dtype(batch: Sequence[Tensor]) -> tuple[Any, ...]:
    kinds = {t.device.type for t in batch}
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds))


def _flat(inputs: Inputs) -> tuple[list[Tensor], Any]:
    """Return the tensors among the arguments of model and loss, and what else there is to them, None if it cannot be
    compared."""
    flat = [*inputs[0], *inputs[1]]
    if all(isinstance(value, Tensor) for value in flat):
        return flat, (len(inputs[0]), len(inputs[1]))
    flat, spec = tree_flatten(inputs)
    others = tuple((k, type(v), v) for k, v in enumerate(flat) if not isinstance(v, Tensor))
    try:
        hash(others)
    except TypeError:
        return [v for v in flat if isinstance(v, Tensor)], None
    return [v for v in flat if isinstance(v, Tensor)], (spec, others)


def kind_of(inputs: Inputs, add: bool, scale: float) -> tuple[Inputs, list[Tensor], Any]:
    """Return the inputs, the tensors among them, and their kind, None for what cannot be captured.

    Raises:
        ValueError: an input requires a gradient.
    """
    batch, form = _flat(inputs)
    if any(map(_requires_grad, batch)):
        shape = next(tuple(t.shape) for t in batch if t.requires_grad)
        raise ValueError(
            f"TrainStep: inputs must not require gradients, got one of shape {shape} that does, for which there are "
            "none here; detach it, or use loss.backward()."
        )
    if form is None or not unwatched():
        return inputs, batch, None
    try:
        places = list(map(_place_of, batch))
        forms = [(t.shape, t.stride(), t.dtype, t.device) for t in batch]
    except RuntimeError:  # sparse, nested or fake: no memory, or none with strides
        return inputs, batch, None
    complex_ = not _COMPLEX.isdisjoint(map(_dtype_of, batch))
    if (
        any(map(_is_neg, batch))
        or (complex_ and any(map(_is_conj, batch)))
        or (0 in places and any(map(_is_zero, batch)))
    ):
        return kind_of(tree_map_only(Tensor, _resolved, inputs), add, scale)
    autocast = _autocast_dtype(batch) if _autocasting() else None
    modes = engine.forced(), torch.get_default_dtype(), torch.is_inference_mode_enabled()
    kind: Any = (add, scale, form, modes, autocast, *forms)
    if not PLAIN_TYPES.issuperset(map(type, batch)):
        types: tuple[Any, ...] = (*map(type, batch),)
        kind = (*kind, *types) if all(_plain_dispatch is t.__torch_dispatch__ for t in types) else None
    return inputs, batch, kind


def _resolved(tensor: Tensor) -> Tensor:
    """Write down what the memory of a tensor does not show: that it is conjugated, negated, or has none for zeros."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_conj().resolve_neg()


def at(values: Any, number: int) -> Any:
    """Return one batch of many."""
    return tree_map_only(Tensor, lambda t: t[number], values)


def check(model: Any, loss_fn: Any, optimizer: Any) -> None:
    """Refuse what no step can be made of."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"TrainStep: model must be a torch.nn.Module, got {type(model).__name__}.")
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise TypeError("TrainStep: model must not hold scripted modules, whose operations cannot be seen.")
    if isinstance(loss_fn, type):
        name = loss_fn.__name__
        raise TypeError(f"TrainStep: loss_fn must be a function or a module, got the class {name}; make one: {name}().")
    if not callable(loss_fn):
        raise TypeError(f"TrainStep: loss_fn must be a function or a module, got {type(loss_fn).__name__}.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"TrainStep: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; the arguments are "
            "model, loss_fn, optimizer."
        )
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(model.parameters()):
        raise ValueError(
            "TrainStep: the optimizer must hold parameters of the model, got none of them; make it of "
            "model.parameters() after the model is where it is to be trained."
        )


def check_epoch(tensors: Any, batch_size: Any) -> None:
    """Refuse what is no data set in memory."""
    what = "TrainStep.epoch: tensors must be a list of inputs and targets, all of them tensors"
    if isinstance(tensors, Tensor):
        raise TypeError(f"{what}, got a tensor; put them into one: step.epoch([x, y], batch_size).")
    if not isinstance(tensors, Sequence):
        kind = type(tensors).__name__
        raise TypeError(f"{what}, got {kind}; for each batch of a loader: step(x, y).")
    if not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"{what}, got one of {', '.join(type(t).__name__ for t in tensors)}.")
    if not isinstance(batch_size, Integral):
        raise TypeError(f"TrainStep.epoch: batch_size must be an int, got {type(batch_size).__name__}.")
    *inputs, targets = tensors or [torch.empty(0)]
    if not inputs or batch_size < 1 or any(len(t) != len(targets) for t in inputs):
        raise ValueError(
            "TrainStep.epoch: tensors must be inputs and targets of one length, and batch_size at least 1, got "
            f"lengths {[len(t) for t in tensors]} and {batch_size}."
        )


def checked(name: str, value: Any) -> Any:
    """Return the value of an option of `TrainStep`, or refuse it."""
    if name in ("clip_grad_norm", "clip_grad_value") and value is not None and not value > 0:
        raise ValueError(f"TrainStep: {name} must be > 0, or None for no clipping, got {value}.")
    if name == "accumulate" and (not isinstance(value, int) or value < 1):
        raise ValueError(f"TrainStep: accumulate must be a number of batches of at least 1, got {value!r}.")
    if name in _CHOICES and value not in _CHOICES[name]:
        *others, last = map(repr, _CHOICES[name])
        raise ValueError(f"TrainStep: {name} must be {', '.join(others)} or {last}, got {value!r}.")
    return value
