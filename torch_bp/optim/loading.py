"""Loading the state of an optimizer: by position, as torch does, or by the names of the parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from torch_bp.optim.pattern import plain
from torch_bp.optim.state_names import check_kinds, compared, lacking_options, other_state

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

    `other_states` and `other_options` are of another optimizer: of a parameter, of a group of this optimizer. `prefix`
    says which common prefix keeps all names apart, if one does.

    `unchecked` states have been loaded, and do not make the report true; whether their shapes are right is not known.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    mixed_groups: dict[int, str] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    other_states: dict[str, str] = field(default_factory=dict)
    other_options: dict[int, str] = field(default_factory=dict)
    prefix: str = ""

    def __bool__(self) -> bool:
        names = self.missing or self.unexpected
        return bool(names or self.mismatched or self.mixed_groups or self.other_states or self.other_options)

    def __str__(self) -> str:
        """One line for each kind of what was found."""
        lines = []
        if self.prefix:
            lines.append(f"Names differ by the prefix {self.prefix!r}: give strip_prefix={self.prefix!r}.")
        if self.missing:
            lines.append(f"Missing in the state: {', '.join(self.missing)}.")
        if self.unexpected:
            lines.append(f"Unexpected in the state: {', '.join(self.unexpected)}.")
        lines += [f"Size mismatch for {name}: {what}." for name, what in self.mismatched.items()]
        lines += [
            f"Group {index} has parameters of several groups that differ in {keys}."
            for index, keys in self.mixed_groups.items()
        ]
        for what in dict.fromkeys(self.other_states.values()):
            names = ", ".join(name for name in self.other_states if self.other_states[name] == what)
            lines.append(f"State of another optimizer for {names}: {what}.")
        lines += [
            f"Options of another optimizer for group {index}: {keys} lacking in the state."
            for index, keys in self.other_options.items()
        ]
        lines += [f"Loaded unchecked for {name}: {what}." for name, what in self.unchecked.items()]
        return "\n\t".join(lines) or "All parameters matched."


def load_state_dict_by_name(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    *,
    model: torch.nn.Module | None = None,
    strict: bool = True,
    strip_prefix: str = "",
) -> LoadReport:
    """Load the state of an optimizer with each parameter's matched by its name, whatever the order and the groups.

    The state must tell names: `state_dict()` of an optimizer built from `model.named_parameters()` or
    `torch_bp.optim.param_groups` does (`param_names` of its groups), and so does `get_optimizer_state_dict` of
    `torch.distributed.checkpoint`. A group takes its rate and hyperparameters from the group in which its parameters
    were saved. A parameter without state, because it never had a gradient, is not missing.

    Shapes are compared with those of the state in place or, where there is none yet, with those that the optimizer
    makes: for torch's and ours that is known. What others make, such as factored second moments, is loaded as it is.
    So are the names under which states are kept: the state of another optimizer does not match, unless it has the same
    names and hyperparameters, as Adam and AdamW do.

    Args:
        optimizer: whose state is loaded; any optimizer.
        state_dict: what was saved.
        model: gives the names of the optimizer's parameters, if it was built without; it knows them from then on.
            Default: None.
        strict: raise unless everything matches. Otherwise what does not match stays as it is: the state of a parameter
            that is missing or of another shape, and the hyperparameters of a group whose parameters come from groups
            that differ or are another optimizer's. Default: True.
        strip_prefix: taken off the names that begin with it, in the state and in the optimizer, before they are
            compared: "module." for a model that was in `DistributedDataParallel` when it was saved, or is now. The
            "_orig_mod." of `torch.compile` never counts. Default: "".

    Returns:
        A report with `missing`, `unexpected`, `mismatched`, `mixed_groups`, `other_states` and `other_options`; it is
        false if all are empty. It also has `unchecked`: what has been loaded with a shape that could not be compared.

    Raises:
        RuntimeError: strict, and something does not match. The optimizer is as it was.
        ValueError: names that are lacking or double, or a state that is not an optimizer's.
        TypeError: arguments of another kind, such as in another order.

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
    check_kinds(optimizer, state_dict)
    full = _own_names(optimizer, model)
    own = [[plain(name).removeprefix(strip_prefix) for name in names] for names in full]
    _check_unique("the optimizer", [name for names in own for name in names])
    saved = _saved_names(state_dict, strip_prefix)
    report, state = LoadReport(), {}
    report.unexpected = sorted(saved.keys() - {name for names in own for name in names})
    report.prefix = _prefix({name for names in own for name in names}, saved.keys())
    parameters = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    for index, (name, (group, p)) in enumerate(zip((name for names in own for name in names), parameters)):
        kept = optimizer.state.get(p)
        if name not in saved:
            report.missing.append(name)
        else:
            entry = state_dict["state"].get(saved[name][1], {})
            options = group | state_dict["param_groups"][saved[name][0]]
            wrong, unchecked = compared(optimizer, p, kept or {}, entry)
            if other := other_state(optimizer, options, kept or {}, entry):
                report.other_states[name] = other
            elif wrong:
                report.mismatched[name] = wrong
            else:
                kept = entry
                if unchecked:
                    report.unchecked[name] = unchecked
        if kept:
            state[index] = kept
    groups = _groups(optimizer, state_dict, own, saved, report)
    for loaded, names in zip(groups, full):
        loaded["param_names"] = list(names)
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
    return [list(group["param_names"]) for group in optimizer.param_groups]


def _prefix(own: set[str], saved: Set[str]) -> str:
    """What all names of one side begin with, if they are other names only for that; else nothing."""
    for names, others in ((saved, own), (own, saved)):
        first, *_ = (*names, "")
        parts = list(accumulate(first.split(".")[:-1], "{}.{}".format))
        for prefix in (f"{part}." for part in parts if not names & others):
            if (
                all(name.startswith(prefix) for name in names)
                and {name.removeprefix(prefix) for name in names} & others
            ):
                return prefix
    return ""


def _saved_names(state_dict: Mapping[str, Any], strip_prefix: str) -> dict[str, tuple[int, Any]]:
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
        found += [(plain(name).removeprefix(strip_prefix), (number, key)) for name, key in zip(names, keys)]
    _check_unique("state_dict", [name for name, _ in found])
    return dict(found)


def _check_unique(what: str, names: Sequence[str]) -> None:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(f"load_state_dict_by_name: names in {what} must be unique, got {', '.join(double)} again.")


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
        elif sources and (lacking := lacking_options(optimizer, options[0])):
            report.other_options[number] = ", ".join(lacking)
        kept = differing or not sources or number in report.other_options
        loaded = options[-1] if kept else options[0]
        loaded = copy.deepcopy(loaded)  # a rate that is a tensor must not be that of several groups
        groups.append({**loaded, "params": list(range(first, first + len(names)))})
        first += len(names)
    return groups
