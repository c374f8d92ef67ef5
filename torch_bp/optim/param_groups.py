"""Parameter groups by what the parameters are: no weight decay for biases and norms, rates by name and by depth.

    rate of a parameter = lr of its name * layer_decay^(D - d),     d its depth, from 0 at the input to D at the output

Source of the layer-wise rates: Howard and Ruder 2018; as one factor per layer, Clark et al. 2020 (ELECTRA).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from torch_bp.optim.pattern import Pattern, check_patterns, find, matches, plain

_NORMS = (
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.LayerNorm,
    torch.nn.GroupNorm,
    torch.nn.RMSNorm,
)
_STACKS = (torch.nn.Sequential, torch.nn.ModuleList)


@dataclass(frozen=True)
class _Entry:
    """A parameter: all its names (tied parameters have several), the modules that own it, and its depth."""

    parameter: torch.nn.Parameter
    names: list[str]
    owners: list[torch.nn.Module]
    depth: int | None = None


def _is_vector(entry: _Entry) -> bool:
    return sum(size > 1 for size in entry.parameter.shape) <= 1


def _is_bias(entry: _Entry) -> bool:
    last = [name.rpartition(".")[2] for name in entry.names]
    return _is_vector(entry) and any(n == "bias" or n.startswith("bias_") or n.endswith("_bias") for n in last)


def _is_norm(entry: _Entry) -> bool:
    """By the type of the module; one that is only named a norm must have parameters of one dimension."""
    if any(isinstance(owner, _NORMS) for owner in entry.owners):
        return True
    return _is_vector(entry) and any("norm" in type(owner).__name__.lower() for owner in entry.owners)


def _is_embedding(entry: _Entry) -> bool:
    return any(isinstance(owner, (torch.nn.Embedding, torch.nn.EmbeddingBag)) for owner in entry.owners)


_WORDS: dict[Pattern, Callable[[_Entry], bool]] = {
    "bias": _is_bias,
    "norm": _is_norm,
    "embedding": _is_embedding,
    "vector": _is_vector,
}


@dataclass(frozen=True)
class Row:
    """One group: parameters of one rate and one weight decay."""

    options: Mapping[str, float]
    names: Sequence[str]
    parameters: Sequence[torch.nn.Parameter]
    depths: Sequence[int]


class ParamGroups(Sequence[dict[str, Any]]):
    """What `param_groups` returns: a sequence of groups, to be given to an optimizer; printed, a table.

    Each look at a group gives a new dict, so that several optimizers may be made from one object.
    """

    def __init__(self, rows: Sequence[Row], frozen: Sequence[str]) -> None:
        self.rows, self.frozen = rows, frozen

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        return {"params": list(zip(row.names, row.parameters)), **row.options}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        lines = [["group", "lr", "weight_decay", "depth", "tensors", "elements", "parameters"]]
        for number, row in enumerate(self.rows):
            options = [f"{row.options[key]:g}" if key in row.options else "default" for key in lines[0][1:3]]
            span = sorted({min(row.depths), max(row.depths)}) if row.depths else []
            elements = sum(p.numel() for p in row.parameters)
            counts = [str(len(row.names)), f"{elements:,}"]
            lines.append([str(number), *options, "-".join(map(str, span)), *counts, _listed(row.names)])
        columns = [c for c in zip(*lines) if any(c[1:])]  # without layer_decay there are no depths
        widths = [max(map(len, column)) for column in columns]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in zip(*columns)]
        if self.frozen:
            table.append(f"frozen, in no group: {_listed(self.frozen)}")
        return "\n".join(table)


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def param_groups(
    model: torch.nn.Module,
    *,
    lr: float | Mapping[Pattern, float] | None = None,
    weight_decay: float | None = None,
    no_decay: str | Sequence[Pattern] = "bias,norm",
    layer_decay: float | None = None,
    depth: Callable[[str], int] | None = None,
) -> ParamGroups:
    """Return groups for an optimizer, each trainable parameter of the model in exactly one; printed, a table.

    Names are kept (`param_names` of the groups). A tied parameter is there once, under its first name, and matches if
    any of its names does. Frozen parameters are in no group; the table says which.

    In the names that patterns are held against, the `_orig_mod` that `torch.compile` adds is left out.

    A pattern is a glob of the parameter's name or of a module above it (`"encoder"`, `"*.attention.*"`; a star stands
    for dots too), or a compiled regular expression, searched for in the name.

    Args:
        model: whose parameters.
        lr: the rate, or rates by pattern, the first that matches (`{"head": 1e-2, "*": 1e-3}`); at least 0. Default:
            None, the optimizer's rate, also for parameters that no pattern matches.
        weight_decay: of the parameters that decay; at least 0. Default: None, the optimizer's.
        no_decay: which parameters have weight decay 0: patterns, and the words "bias" (vectors by that name), "norm"
            (parameters of normalisation modules, by type), "embedding" and "vector" (at most one dimension larger than
            1). A sequence, or a string with commas; "" for none. Default: "bias,norm".
        layer_decay: the factor of the rate from one layer to the one before it; above 0, at most 1. It needs `lr` for
            every parameter. Default: None, the same rate everywhere.
        depth: gives the layer of a parameter, by its name, counted from 0 at the input. Default: None, by the order of
            the modules: every child of a `Sequential` or `ModuleList` is a layer, and so is every other module with
            parameters that contains neither; a norm belongs to the layer before it, and parameters that a module owns
            itself to its first layer. One within another makes no difference: `Sequential(a, Sequential(b, c))` has
            the layers of `Sequential(a, b, c)`. So a block must be a class of its own, if only
            `class Block(Sequential): pass`, to be one layer; or give this function. The table shows the depths.

    Raises:
        TypeError: a rate or weight decay that is no number.
        ValueError: a pattern that matches nothing, or only what earlier patterns have taken; a value out of range.

    Example:
        >>> import torch
        >>> from torch_bp.optim import AdamW, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> groups = param_groups(model, lr=0.1, weight_decay=0.01, layer_decay=0.5)
        >>> print(groups)
        group  lr    weight_decay  depth  tensors  elements  parameters
        0      0.05  0.01          0      1        32        0.weight
        1      0.05  0             0      3        24        0.bias, 1.weight, 1.bias
        2      0.1   0.01          1      1        16        2.weight
        3      0.1   0             1      1        2         2.bias
        >>> optimizer = AdamW(groups)
        >>> optimizer.param_groups[1]["param_names"]
        ['0.bias', '1.weight', '1.bias']

        Branches side by side, of which the order of the modules would make layers one after the other:

        >>> model = torch.nn.ModuleDict({"left": torch.nn.Linear(4, 2), "right": torch.nn.Linear(4, 2)})
        >>> model["head"] = torch.nn.Linear(4, 1)
        >>> groups = param_groups(model, lr=0.1, no_decay="", layer_decay=0.5, depth=lambda name: int("head" in name))
        >>> print(groups)
        group  lr    weight_decay  depth  tensors  elements  parameters
        0      0.05  default       0      4        20        left.weight, left.bias, right.weight and 1 more
        1      0.1   default       1      2        5         head.weight, head.bias
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"param_groups: model must be a torch.nn.Module, got {type(model).__name__}.")
    entries = _entries(model)
    plain_names = {entry.names[0]: [plain(name) for name in entry.names] for entry in entries}
    names = [name for of_entry in plain_names.values() for name in of_entry]
    rates: Mapping[Pattern, float] = lr if isinstance(lr, Mapping) else {} if lr is None else {"*": lr}
    _check_values(rates, weight_decay, layer_decay, depth)
    exempt = [part.strip() for part in no_decay.split(",") if part.strip()] if isinstance(no_decay, str) else no_decay
    check_patterns(
        "param_groups: no_decay", [p for p in exempt if p not in _WORDS], names, words=list(map(str, _WORDS))
    )
    check_patterns("param_groups: lr", list(rates), names, by_turns=list(plain_names.values()))
    if layer_decay is not None:
        entries = _deepened(model, entries, depth)
    deepest = max((entry.depth or 0 for entry in entries), default=0)
    gathered: dict[tuple[float | None, float | None], list[_Entry]] = {}
    for entry in entries:
        if entry.parameter.requires_grad:
            own = plain_names[entry.names[0]]
            rate = find(rates, own)
            if layer_decay is not None:
                if rate is None:
                    raise ValueError(
                        f"param_groups: lr must be given for every parameter with layer_decay, got none for "
                        f"{entry.names[0]}; end the patterns with '*'."
                    )
                rate *= layer_decay ** (deepest - (entry.depth or 0))
            bare = any(_WORDS[p](entry) if p in _WORDS else matches(p, own) for p in exempt)
            gathered.setdefault((rate, 0.0 if bare else weight_decay), []).append(entry)
    rows = [_row(*key, members) for key, members in gathered.items()]
    return ParamGroups(rows, [entry.names[0] for entry in entries if not entry.parameter.requires_grad])


def _row(rate: float | None, weight_decay: float | None, members: Sequence[_Entry]) -> Row:
    options = {key: value for key, value in (("lr", rate), ("weight_decay", weight_decay)) if value is not None}
    depths = [entry.depth for entry in members if entry.depth is not None]
    return Row(options, [entry.names[0] for entry in members], [entry.parameter for entry in members], depths)


def _check_values(
    rates: Mapping[Pattern, float], weight_decay: float | None, layer_decay: float | None, depth: Any
) -> None:
    for what, value in [*((f"lr of {p!r}", v) for p, v in rates.items()), ("weight_decay", weight_decay)]:
        number = isinstance(value, float | int | torch.Tensor) and not isinstance(value, bool)
        if not number and (value is not None or what != "weight_decay"):
            raise TypeError(
                f"param_groups: {what} must be a number, got {value!r}; rates by pattern are for lr, and no_decay says "
                "which parameters do not decay."
            )
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"param_groups: {what} must be at least 0 and finite, got {value}.")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"param_groups: layer_decay must be above 0 and at most 1, got {layer_decay}.")
    if depth is not None and layer_decay is None:
        raise ValueError("param_groups: depth must be given with layer_decay, got layer_decay=None; give both.")


def _entries(model: torch.nn.Module) -> list[_Entry]:
    """All parameters of the model, in its order."""
    found: dict[torch.nn.Parameter, _Entry] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{name}" if path else name
            if is_lazy(p):
                raise ValueError(
                    f"param_groups: parameters must be initialized, got the lazy {full}; run the model once before."
                )
            entry = found.setdefault(p, _Entry(p, [], []))
            entry.names.append(full)
            entry.owners.append(module)
    return list(found.values())


def _deepened(model: torch.nn.Module, entries: Sequence[_Entry], depth: Callable[[str], int] | None) -> list[_Entry]:
    """The entries with their depth, from the user's function or from the order of the modules."""
    layers = {} if depth else _layers(model)
    depths = [depth(plain(e.names[0])) if depth else layers[e.owners[0]] for e in entries]
    for entry, value in zip(entries, depths):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"param_groups: depth must give an int of at least 0, got {value!r} for {entry.names[0]}.")
    return [_Entry(e.parameter, e.names, e.owners, value) for e, value in zip(entries, depths)]


def _layers(model: torch.nn.Module) -> dict[torch.nn.Module, int]:
    """The depth of every module, by the rule that `param_groups` states."""
    found: dict[torch.nn.Module, int] = {}
    last = -1

    def visit(module: torch.nn.Module, is_layer: bool) -> None:
        nonlocal last
        if is_layer or not any(isinstance(part, _STACKS) for part in module.modules()):
            owned = [_Entry(p, [], [m]) for m in module.modules() for p in m.parameters(recurse=False)]
            last += bool(owned) and (last < 0 or not all(map(_is_norm, owned)))
            for part in module.modules():
                found.setdefault(part, max(last, 0))
            return
        found.setdefault(module, last + 1)
        for child in module.children():  # a stack in a stack only goes on; a class of the user's own is a block
            kind = type(getattr(child, "_orig_mod", child))  # within what `torch.compile` makes
            visit(child, isinstance(module, _STACKS) and kind not in _STACKS)

    visit(model, False)
    return found
