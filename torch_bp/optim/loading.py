"""Loading the state of an optimizer: by position, as torch does, or by the names of the parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

_ENGINE = ("foreach", "fused")


def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
    """Load the state as `torch.optim.Optimizer.load_state_dict` does, by position, and keep the engine flags.

    The rate and all hyperparameters are the checkpoint's. `foreach` and `fused` say how an update runs, which is a
    matter of this machine: they stay as the optimizer was built, with a warning where the checkpoint has others.
    Sparse state, as torch's SGD makes its momentum of sparse gradients, becomes dense.

    Args:
        state_dict: what `state_dict()` of this optimizer or of torch's of the same name returned.

    Raises:
        ValueError: the groups differ in number or size, as torch has it.
    """
    differing: dict[str, tuple[Any, Any]] = {}

    def keep_flags(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        return _with_flags(optimizer.param_groups, _dense(state), differing)

    handle = self.register_load_state_dict_pre_hook(keep_flags)  # the last one: it sees what others have made
    try:
        Optimizer.load_state_dict(self, state_dict)
    finally:
        handle.remove()
    if differing:
        found = ", ".join(f"{flag}={theirs} where it has {own}" for flag, (own, theirs) in differing.items())
        warnings.warn(
            f"{type(self).__name__}.load_state_dict: foreach and fused stay as the optimizer was built, got {found}; "
            "build it with the checkpoint's flags to run as that did.",
            stacklevel=2,
        )


def _dense(state: dict[str, Any]) -> dict[str, Any]:
    """The state without sparse tensors; what was given stays as it is."""
    tensors = dict(state["state"])
    for index, values in tensors.items():
        if not isinstance(values, dict):  # not of a parameter
            continue
        sparse = {k: v.to_dense() for k, v in values.items() if isinstance(v, Tensor) and v.layout is torch.sparse_coo}
        if sparse:
            tensors[index] = {**values, **sparse}
    return {**state, "state": tensors}


def _with_flags(
    groups: Sequence[dict[str, Any]], state: dict[str, Any], differing: dict[str, tuple[Any, Any]]
) -> dict[str, Any]:
    """The state with the engine flags of these groups; flags that differed are noted, own and loaded."""
    loaded = [dict(group) for group in state["param_groups"]]
    tensors = dict(state["state"])
    for own, group in zip(groups, loaded):
        left_device = group.get("fused") and not own.get("fused", True) and not group.get("capturable")
        for flag in _ENGINE:
            if flag in own:
                if group.get(flag, own[flag]) != own[flag]:
                    differing[flag] = (own[flag], group[flag])
                group[flag] = own[flag]
        if left_device:  # where fused kernels count their steps; without them the host does
            for index in group["params"]:
                if isinstance(tensors.get(index, {}).get("step"), Tensor):
                    tensors[index] = {**tensors[index], "step": tensors[index]["step"].cpu()}
    return {**state, "param_groups": loaded, "state": tensors}


@dataclass
class LoadReport:
    """What `load_state_dict_by_name` found: names, and of `mismatched` ones what differs.

    `unchecked` states have been loaded, and do not make the report true; whether their shapes are right is not known.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    mixed_groups: dict[int, str] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched or self.mixed_groups)

    def __str__(self) -> str:
        """One line for each kind of what was found."""
        lines = []
        if self.missing:
            lines.append(f"Missing in the state: {', '.join(self.missing)}.")
        if self.unexpected:
            lines.append(f"Unexpected in the state: {', '.join(self.unexpected)}.")
        lines += [f"Size mismatch for {name}: {what}." for name, what in self.mismatched.items()]
        lines += [
            f"Group {index} has parameters of several groups that differ in {keys}."
            for index, keys in self.mixed_groups.items()
        ]
        lines += [f"Loaded unchecked for {name}: {what}." for name, what in self.unchecked.items()]
        return "\n\t".join(lines) or "All parameters matched."


def load_state_dict_by_name(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    *,
    model: torch.nn.Module | None = None,
    strict: bool = True,
) -> LoadReport:
    """Load the state of an optimizer with each parameter's matched by its name, whatever the order and the groups.

    The state must tell names: `state_dict()` of an optimizer built from `model.named_parameters()` or
    `torch_bp.optim.param_groups` does (`param_names` of its groups), and so does `get_optimizer_state_dict` of
    `torch.distributed.checkpoint`. A group takes its rate and hyperparameters from the group in which its parameters
    were saved. A parameter without state, because it never had a gradient, is not missing.

    Shapes are compared with those of the state in place or, where there is none yet, with those that the optimizer
    makes: for torch's and ours that is known. What others make, such as factored second moments, is loaded as it is.

    Args:
        optimizer: whose state is loaded; any optimizer.
        state_dict: what was saved.
        model: gives the names of the optimizer's parameters, if it was built without; it knows them from then on.
            Default: None.
        strict: raise unless everything matches. Otherwise what does not match stays as it is: the state of a parameter
            that is missing or of another shape, and the hyperparameters of a group whose parameters come from groups
            that differ. Default: True.

    Returns:
        A report with `missing`, `unexpected`, `mismatched` and `mixed_groups`; it is false if all are empty. It
        also has `unchecked`: what has been loaded with a shape that could not be compared.

    Raises:
        RuntimeError: strict, and something does not match. The optimizer is as it was.
        ValueError: names that are lacking or double.

    Example:
        >>> import torch
        >>> from torch_bp.optim import Adam, load_state_dict_by_name
        >>> old = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> optimizer = Adam(old.named_parameters(), lr=0.5)
        >>> old(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> new = Adam([*old.named_parameters()][::-1])  # in another order
        >>> print(load_state_dict_by_name(new, optimizer.state_dict()))
        All parameters matched.
        >>> torch.equal(new.state[old[0].weight]["exp_avg"], optimizer.state[old[0].weight]["exp_avg"])
        True
        >>> new.param_groups[0]["lr"]
        0.5
    """
    own = _own_names(optimizer, model)
    saved = _saved_names(state_dict)
    report, state = LoadReport(), {}
    report.unexpected = sorted(saved.keys() - {name for names in own for name in names})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, (name, p) in enumerate(zip((name for names in own for name in names), parameters)):
        kept = optimizer.state.get(p)
        if name not in saved:
            report.missing.append(name)
        else:
            entry = state_dict["state"].get(saved[name][1], {})
            wrong, unchecked = _compared(optimizer, p, kept or {}, entry)
            if wrong:
                report.mismatched[name] = wrong
            else:
                kept = entry
                if unchecked:
                    report.unchecked[name] = unchecked
        if kept:
            state[index] = kept
    groups = _groups(optimizer, state_dict, own, saved, report)
    if strict and report:
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(optimizer).__name__}:\n\t{report}\n"
            "strict=False loads what matches."
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return report


def _own_names(optimizer: Optimizer, model: torch.nn.Module | None) -> list[list[str]]:
    """The names of the optimizer's parameters, group by group."""
    if model is not None:
        known = {p: name for name, p in model.named_parameters()}
        lacking = sum(p not in known for group in optimizer.param_groups for p in group["params"])
        if lacking:
            raise ValueError(
                "load_state_dict_by_name: model must have all parameters of the optimizer, got one without "
                f"{lacking} of them; give the model whose parameters the optimizer was built from."
            )
        return [[known[p] for p in group["params"]] for group in optimizer.param_groups]
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ValueError(
            "load_state_dict_by_name: the optimizer must know the names of its parameters, got one built without; "
            "give model=, or build it from model.named_parameters() or param_groups(model)."
        )
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    _check_unique("the optimizer", [name for group in names for name in group])
    return names


def _saved_names(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, Any]]:
    """Of each saved name, its group and the key of its state."""
    found = []
    for number, group in enumerate(state_dict["param_groups"]):
        keys = group["params"]
        names = keys if all(isinstance(key, str) for key in keys) else group.get("param_names")
        if names is None or len(names) != len(keys):
            raise ValueError(
                f"load_state_dict_by_name: state_dict must name its parameters, got group {number} without; save it "
                "from an optimizer built from model.named_parameters(), or enter them as its 'param_names'."
            )
        found += [(name, (number, key)) for name, key in zip(names, keys)]
    _check_unique("state_dict", [name for name, _ in found])
    return dict(found)


def _check_unique(what: str, names: Sequence[str]) -> None:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(f"load_state_dict_by_name: names in {what} must be unique, got {', '.join(double)} again.")


def _compared(optimizer: Optimizer, p: Tensor, own: Mapping[str, Any], loaded: Mapping[str, Any]) -> tuple[str, str]:
    """What is wrong with the shapes of a loaded state, and which shapes nothing can be said about.

    They are those of the present state, or else what the optimizer makes of the parameter's. Of an optimizer that is
    not known, tensors that are all of one shape, with as many axes as the parameter, are taken for averages over a
    parameter of that shape. Single numbers beside averages (`step`, NAdam's `mu_product`) have no shape to compare.
    """
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor) and key != "step"}
    shapes = {value.shape for value in tensors.values() if value.dim()} or {torch.Size()}
    averages = _is_known(optimizer) or (len(shapes) == 1 and all(len(shape) == p.dim() for shape in shapes))
    unchecked = []
    for key, value in tensors.items():
        present = own.get(key)
        shape = present.shape if isinstance(present, Tensor) else _shape(optimizer, p, key)
        if value.shape != shape and (value.dim() or shapes == {()} or present is not None):
            if averages or present is not None:
                return f"{key} of shape {tuple(value.shape)} in the state, {tuple(shape)} in the optimizer", ""
            unchecked.append(f"{key} of shape {tuple(value.shape)}")
    return "", ", ".join(unchecked)


def _is_known(optimizer: Optimizer) -> bool:
    """Whether it is torch's own, or of the kind of ours, whose rules have a number for each of the parameter's."""
    return hasattr(optimizer, "state_layout") or type(optimizer).__module__.startswith("torch.optim")


def _shape(optimizer: Optimizer, p: Tensor, key: str) -> torch.Size:
    """The shape of a state of a parameter; of a matrix Adafactor has only means over its columns and its rows."""
    if isinstance(optimizer, torch.optim.Adafactor) and p.dim() > 1:
        *outer, rows, columns = p.shape
        return torch.Size({"row_var": (*outer, rows, 1), "col_var": (*outer, 1, columns)}.get(key, p.shape))
    return p.shape


def _groups(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    own: Sequence[Sequence[str]],
    saved: Mapping[str, tuple[int, Any]],
    report: LoadReport,
) -> list[dict[str, Any]]:
    """The groups to be loaded: each with what its parameters had, or with its own where that is not one thing."""
    groups, first = [], 0
    for number, (group, names) in enumerate(zip(optimizer.param_groups, own)):
        sources = [state_dict["param_groups"][i] for i in dict.fromkeys(saved[n][0] for n in names if n in saved)]
        options = [{k: v for k, v in s.items() if k not in ("params", "param_names")} for s in (*sources, group)]
        differing = {k for o in options[:-1] for k in o.keys() | options[0].keys() if o.get(k) != options[0].get(k)}
        if differing:
            report.mixed_groups[number] = ", ".join(sorted(differing))
        loaded = options[-1] if differing or not sources else options[0]
        loaded = copy.deepcopy(loaded)  # a rate that is a tensor must not be that of several groups
        groups.append({**loaded, "params": list(range(first, first + len(names))), "param_names": list(names)})
        first += len(names)
    return groups
