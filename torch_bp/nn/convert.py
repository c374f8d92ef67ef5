"""Swap the modules of a model for torch_bp's of the same name, and back.

Only the class of a module changes: `module.__class__ = torch_bp.nn.Linear`. Our classes add methods to torch's and no
state, and all of a module's state lies in its `__dict__`: parameters, buffers, hooks, flags, whatever the user set. So
nothing is copied over, and nothing can be forgotten: tied weights stay tied, a module reached by two names stays one,
and parents, optimizers and hooks hold the object they held before. (`torch.nn.utils.parametrize` does the same.)

A class of `torch_bp.nn` that subclasses the one of its name in `torch.nn` is its twin. There is no list to forget.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

import torch_bp.nn
from torch_bp.nn.activation import joinable
from torch_bp.nn.batchnorm import BatchNormActivation
from torch_bp.nn.linear import Linear
from torch_bp.nn.linear_activation import LinearActivation
from torch_bp.nn.mlp import bare

_Twins = Mapping[type, type]


def twins() -> dict[type, type]:
    """Map every class of `torch.nn` that `torch_bp.nn` has a class for to that class.

    Example:
        >>> twins()[torch.nn.Linear]
        <class 'torch_bp.nn.linear.Linear'>
    """
    pairs = ((getattr(torch.nn, name, None), found) for name, found in vars(torch_bp.nn).items())
    return {
        theirs: found
        for theirs, found in pairs
        if isinstance(theirs, type) and isinstance(found, type) and theirs is not found and issubclass(found, theirs)
    }


def convert(model: torch.nn.Module, *, inplace: bool = False, fuse: bool = False) -> torch.nn.Module:
    """Return the model with every module of torch that `torch_bp.nn` has a class for swapped for that class.

    Parameters, buffers, hooks, training flags, tied weights, shared modules, pruning, parametrizations and attributes
    stay as they are; `state_dict` keys do not change. `conversion` tells what was swapped and what was left alone:

    - Subclasses of torch's classes: their methods may rely on what they inherit.
    - Modules whose `forward` has been replaced on the instance: the replacement may hold the old one.
    - Calls of functions in a `forward`, such as `torch.nn.functional.relu`: change the import there.

    Convert before `torch.compile` and `fully_shard`, which wrap modules in classes of their own, and after the first
    call of a lazy module, which changes its class.

    Args:
        model: any module. It may itself be one that is swapped.
        inplace: swap in the model itself; the default is a copy, as `copy.deepcopy` makes it. Tensors that hooks
            compute anew at every call (pruning), which deepcopy refuses, are copied without their graph.
        fuse: also make one `LinearActivation` of a `Linear` and the activation after it in a `Sequential`, and leave an
            `Identity` in the activation's place, so that `state_dict` keys stay. Modules with hooks, and those that
            the model holds in more than one place, are left as they are. Not for a model that calls the layers of a
            `Sequential` one by one: the first then contains the second.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Conv1d(5, 5, 1))
        >>> model = convert(model)
        >>> type(model[0])
        <class 'torch_bp.nn.linear.Linear'>
        >>> print(conversion(model))
        torch_bp's: Linear (0), ReLU (1)
        torch's, to be swapped by convert: none
        left alone: torch_bp has no Conv1d of its own (2)
        >>> convert(model, fuse=True)[:2]
        Sequential(
          (0): LinearActivation(
            in_features=3, out_features=5, bias=True
            (activation): ReLU()
          )
          (1): Identity()
        )
    """
    model = _swap("convert", model, twins(), inplace)
    if fuse:
        for sequence, name, following in _neighbours(model):
            first, second = sequence[name], sequence[following]
            if type(first) is Linear and joinable(second) and bare(first) and bare(second):
                first.__class__ = LinearActivation
                first.activation = second
                sequence[following] = torch.nn.Identity()
    return model


def to_torch(model: torch.nn.Module, *, inplace: bool = False) -> torch.nn.Module:
    """Return the model with every module of torch_bp that has a twin in torch swapped for it: undo `convert`.

    What `fuse=True` has joined comes apart. What torch lacks (`HalfMSELoss`, a `LinearActivation` with no `Identity`
    after it) and subclasses of torch_bp's classes stay; `conversion` lists them. Arguments, errors and what is kept
    are as in `convert`.

    Example:
        >>> type(to_torch(torch_bp.nn.Linear(3, 5)))
        <class 'torch.nn.modules.linear.Linear'>
    """
    require_module("to_torch", model)
    model = model if inplace else copied(model)
    for sequence, name, following in _neighbours(model):
        first = sequence[name]
        if _come_apart(sequence, name, following):
            sequence[following] = first._modules.pop("activation")
            first.__class__ = Linear  # type: ignore[assignment]
    return _swap("to_torch", model, {ours: theirs for theirs, ours in twins().items()}, True)


@dataclass(frozen=True)
class Conversion:
    """Whose modules a model is made of, by their path in it ("" is the model itself).

    Attributes:
        ours: classes of torch_bp, which `to_torch` swaps.
        torchs: classes of torch, which `convert` swaps.
        kept: why neither does: modules without children, and subclasses of the classes above. Other containers are
            not listed, and of a module that has several names the first is.
    """

    ours: dict[str, str] = field(default_factory=dict)
    torchs: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"torch_bp's: {_by_value(self.ours)}\n"
            f"torch's, to be swapped by convert: {_by_value(self.torchs)}\n"
            f"left alone: {_by_value(self.kept)}"
        )


def conversion(model: torch.nn.Module) -> Conversion:
    """Return which modules of a model are torch_bp's, which `convert` would swap, and which it leaves alone and why.

    It looks at the model as it is, so it serves as a plan before `convert` and as a summary after it or `to_torch`.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.

    Example:
        >>> conversion(torch.nn.Sequential(torch.nn.Linear(3, 5), torch_bp.nn.HalfMSELoss())).kept
        {'1': 'torch has no HalfMSELoss'}
    """
    require_module("conversion", model)
    to_ours = twins()
    to_theirs = {ours: theirs for theirs, ours in to_ours.items()}
    found, inner = Conversion(), _joined(model)
    apart = {
        sequence[name] for sequence, name, following in _neighbours(model) if _come_apart(sequence, name, following)
    }
    for path, module in model.named_modules():
        name = parametrize.type_before_parametrizations(module).__name__
        if module in inner:
            continue
        if _target(module, to_theirs) or module in apart:
            found.ours[path] = name
        elif _target(module, to_ours):
            found.torchs[path] = name
        elif reason := _reason(module, {**to_ours, **to_theirs}):
            found.kept[path] = reason
    return found


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """Return a deep copy, in which tensors that depend on parameters have lost their graph."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for tensor in (*vars(module).values(), *module._buffers.values()):
            if isinstance(tensor, torch.Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _swap(name: str, model: torch.nn.Module, to: _Twins, inplace: bool) -> torch.nn.Module:
    require_module(name, model)
    model = model if inplace else copied(model)
    inner = _joined(model)
    for module in model.modules():
        if (target := _target(module, to)) and module not in inner:
            module.__class__ = target
    return model


def _joined(model: torch.nn.Module) -> set[torch.nn.Module]:
    """Return the activations inside of modules that are two in one, which must be torch_bp's."""
    joint = (m for m in model.modules() if isinstance(m, LinearActivation | BatchNormActivation))
    return {module.activation for module in joint}


def _neighbours(model: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield what follows what in each `Sequential`: its modules, and two names; none that the model holds twice."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for sequence in model.modules():
        if type(sequence) is torch.nn.Sequential:
            for pair in itertools.pairwise(list(sequence._modules)):
                if all(uses[id(sequence._modules[name])] == 1 for name in pair):
                    yield sequence._modules, *pair  # type: ignore[misc]


def _come_apart(sequence: Mapping[str, torch.nn.Module], name: str, following: str) -> bool:
    """True for what `fuse=True` has joined."""
    first, second = sequence[name], sequence[following]
    return type(first) is LinearActivation and type(second) is torch.nn.Identity and bare(first)


def _target(module: torch.nn.Module, to: _Twins) -> type | None:
    """Return the class that a module is to have, or None if it is left alone."""
    kind = type(module)
    if "forward" in vars(module):
        return None
    if parametrize.is_parametrized(module) and kind.__bases__[0] in to:
        # parametrize has made this class for this module: torch's or ours with a property for every tensor
        return type(kind.__name__, (to[kind.__bases__[0]],), dict(vars(kind)))
    return to.get(kind)


def _reason(module: torch.nn.Module, to: _Twins) -> str:
    """Return why a module is left alone, or "" for a container that is of no concern."""
    kind = parametrize.type_before_parametrizations(module)
    if kind in (LinearActivation, BatchNormActivation):
        return f"torch has no {kind.__name__}"
    if kind in to:
        return f"the forward of this {kind.__name__} has been replaced on the instance"
    becomes = module.cls_to_become if isinstance(module, LazyModuleMixin) else None
    if becomes is not None and becomes in to:
        return f"{kind.__name__} becomes {becomes.__name__} when it is first called: convert it after that"
    for base in kind.__mro__[1:]:
        if base in to:
            return f"{kind.__qualname__} is a subclass of {base.__module__.split('.')[0]}.nn.{base.__name__}"
    if vars(torch_bp.nn).get(kind.__name__) is kind and kind.__module__.startswith("torch_bp."):
        return f"torch has no {kind.__name__}"
    if any(True for _ in module.children()) or kind is torch.nn.Identity:
        return ""
    return f"torch_bp has no {kind.__name__} of its own"


def require_module(name: str, model: object) -> None:
    """Refuse what is no module, for the function of this name."""
    if not isinstance(model, torch.nn.Module):
        kind = isinstance(model, type) and issubclass(model, torch.nn.Module)
        remedy = "Call it to make one." if kind else "Put several modules into a torch.nn.ModuleList."
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {got}. {remedy}")


def _by_value(named: Mapping[str, str]) -> str:
    """List paths by class or reason: "Linear (0, 2), ReLU (1)"."""
    paths: dict[str, list[str]] = {}
    for path, name in named.items():
        paths.setdefault(name, []).append(path or "the model itself")
    return ", ".join(f"{name} ({_shortened(found)})" for name, found in sorted(paths.items())) or "none"


def _shortened(paths: list[str], most: int = 6) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")
