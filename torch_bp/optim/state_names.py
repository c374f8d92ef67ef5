"""Under which names and in which shapes an optimizer keeps its state: it tells the state of one from another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

_ADAM = ("step", "exp_avg", "exp_avg_sq")
_TORCHS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {  # what is always there, and what an option brings
    "ASGD": (("step", "eta", "mu", "ax"), {}),
    "Adadelta": (("step", "square_avg", "acc_delta"), {}),
    "Adafactor": (("step",), {"row_var": "", "col_var": "", "variance": ""}),  # which of them, the shape decides
    "Adagrad": (("step", "sum"), {}),
    "Adam": (_ADAM, {"max_exp_avg_sq": "amsgrad"}),
    "AdamW": (_ADAM, {"max_exp_avg_sq": "amsgrad"}),
    "Adamax": (("step", "exp_avg", "exp_inf"), {}),
    "Muon": (("momentum_buffer",), {}),
    "NAdam": (("step", "mu_product", "exp_avg", "exp_avg_sq"), {}),
    "RAdam": (_ADAM, {}),
    "RMSprop": (("step", "square_avg"), {"momentum_buffer": "momentum", "grad_avg": "centered"}),
    "Rprop": (("step", "prev", "step_size"), {}),
    "SGD": ((), {"momentum_buffer": ""}),  # made when it is lacking
    "SparseAdam": (_ADAM, {}),
}


def names_of_state(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[set[str], set[str]] | None:
    """`(needed, known)`: what the state of a parameter must hold with the options of `group`, and what it may hold.

    None for an optimizer of which nothing is known. Subclasses of torch's may hold more than is known.
    """
    kind = next((c for c in type(optimizer).__mro__ if c.__module__.startswith("torch.optim")), Optimizer).__name__
    if kind in _TORCHS:
        needed, options = _TORCHS[kind]
        return {*needed, *(name for name, option in options.items() if group.get(option))}, {*needed, *options}
    if not hasattr(optimizer, "state_layout"):
        return None
    own = {name for name in optimizer.state_layout(group) if name} | {*getattr(optimizer, "numbers", ())}
    own |= {"step"} if getattr(optimizer, "counts_steps", False) else set()
    return own, own


def is_known(optimizer: Optimizer) -> bool:
    """Whether it is torch's own, or of the kind of ours, whose rules have a number for each of the parameter's."""
    return hasattr(optimizer, "state_layout") or type(optimizer).__module__.startswith("torch.optim")


def other_state(
    optimizer: Optimizer, group: Mapping[str, Any], own: Mapping[str, Any], loaded: Mapping[str, Any]
) -> str:
    """What shows that the `loaded` state of a parameter is of another optimizer; nothing where nothing does.

    Of an optimizer that is not known, the state in place tells: options add names to a state, so that of two states of
    one optimizer the one is likely to have all names of the other.
    """
    found = loaded.keys()
    names = names_of_state(optimizer, group)
    if not found or (names is None and not own):
        return ""
    needed, known = names or ({*own}, {*own})
    lacking, strange = needed - found, found - known if names is None or is_known(optimizer) else set()
    if (lacking and strange) if names is None else (lacking or strange):
        wanted = ", ".join(sorted(needed or known)) or "nothing"
        return f"{', '.join(sorted(found))} in the state, where the optimizer has {wanted}"
    return ""


def compared(optimizer: Optimizer, p: Tensor, own: Mapping[str, Any], loaded: Mapping[str, Any]) -> tuple[str, str]:
    """What is wrong with the shapes of a loaded state, and which shapes nothing can be said about.

    They are those of the present state, or else what the optimizer makes of the parameter's. Of an optimizer that is
    not known, tensors that are all of one shape, with as many axes as the parameter, are taken for averages over a
    parameter of that shape. Single numbers beside averages (`step`, NAdam's `mu_product`) have no shape to compare.
    """
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor) and key != "step"}
    shapes = {value.shape for value in tensors.values() if value.dim()} or {torch.Size()}
    averages = is_known(optimizer) or (len(shapes) == 1 and all(len(shape) == p.dim() for shape in shapes))
    unchecked = []
    for key, value in tensors.items():
        present = own.get(key)
        shape = present.shape if isinstance(present, Tensor) else _shape(optimizer, p, key)
        if value.shape != shape and (value.dim() or shapes == {()} or present is not None):
            if averages or present is not None:
                return f"{key} of shape {tuple(value.shape)} in the state, {tuple(shape)} in the optimizer", ""
            unchecked.append(f"{key} of shape {tuple(value.shape)}")
    return "", ", ".join(unchecked)


def _shape(optimizer: Optimizer, p: Tensor, key: str) -> torch.Size:
    """The shape of a state of a parameter; of a matrix Adafactor has only means over its columns and its rows."""
    if isinstance(optimizer, torch.optim.Adafactor) and p.dim() > 1:
        *outer, rows, columns = p.shape
        return torch.Size({"row_var": (*outer, rows, 1), "col_var": (*outer, 1, columns)}.get(key, p.shape))
    return p.shape


def lacking_options(optimizer: Optimizer, group: Mapping[str, Any]) -> list[str]:
    """Hyperparameters that a saved group lacks; flags, of which torch has added some in time, do not count."""
    flags = (bool, type(None))
    return sorted(
        name for name, value in optimizer.defaults.items() if not isinstance(value, flags) and name not in group
    )


def check_kinds(optimizer: Any, state_dict: Any) -> None:
    """Refuse arguments that are no optimizer and no state of one, such as in another order."""
    order = "The order is load_state_dict_by_name(optimizer, state_dict)."
    if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "load_state_dict")):
        raise TypeError(
            f"load_state_dict_by_name: optimizer must be an optimizer, got {type(optimizer).__name__}. {order}"
        )
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict_by_name: state_dict must be a dict, got {type(state_dict).__name__}. "
            f"{order if isinstance(state_dict, torch.nn.Module | Optimizer) else 'Give what state_dict() returned.'}"
        )
    if not {"state", "param_groups"} <= state_dict.keys():
        keys = ", ".join(map(repr, list(state_dict)[:3])) or "none"
        raise ValueError(
            f"load_state_dict_by_name: state_dict must have the keys 'state' and 'param_groups', got {keys}. Give what "
            "the state_dict() of an optimizer returned; a model's, or a whole checkpoint, is another thing."
        )
