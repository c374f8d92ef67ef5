"""What a rule of one's own and its numbers must be, and in plain words what is wrong with those that are not.

A class is looked at when it is made, hyperparameters when a group is added. What `scalars` returns is looked at only
after an update has failed on it: a step that goes well pays nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch_bp.kernels import Formula
from torch_bp.kernels.number import in_quotes, is_number, why_no_number

UNKNOWN: Any = object()  # in place of what `scalars` returned, where it is `scalars` that has failed


def check_class(cls: Any, base: Any) -> None:
    """Refuse a class whose rule, state and `scalars` do not fit together; `base` has the methods as they stand."""
    _check_names(cls)
    _check_rule(cls, of_names=cls.state_layout is base.state_layout)
    _check_scalars(cls)


def _check_names(cls: Any) -> None:
    for kind in ("state_names", "numbers"):
        names = getattr(cls, kind)
        if isinstance(names, str):
            raise TypeError(f"{cls.__name__}: {kind} must be a tuple of names, got {names!r}.")
    if cls.numbers and not cls.counts_steps:
        raise TypeError(
            f"{cls.__name__}: numbers are kept beside the step count, got {cls.numbers!r} without one; set "
            "counts_steps = True in the class."
        )


def _check_rule(cls: Any, of_names: bool) -> None:
    """Refuse a rule of other arguments, or that leaves out the parameter or a state, or writes to the gradient."""
    formula, names = cls.rule.formula, tuple(cls.state_names)
    if of_names and len(formula.tensors) != 2 + len(names):
        raise TypeError(
            f"{cls.__name__}: rule must take the parameter, the gradient and the state of state_names, "
            f"(param, grad{''.join(f', {name}' for name in names)}, *, ...), got {', '.join(formula.tensors)}."
        )
    state = formula.tensors[2:]
    if {*state} == {*names} and state != names:  # checkpoints would swap them
        raise TypeError(f"{cls.__name__}: state_names must be in the rule's order, {state}, got {cls.state_names}.")
    param, grad = (*formula.tensors, "", "")[:2]
    if param not in formula.updates or grad in formula.updates:
        raise TypeError(
            f"{cls.__name__}: updates of the rule must name its first argument, the parameter {param!r}, and not "
            f"its second, the gradient {grad!r}; got updates={formula.updates}."
        )
    forgotten = [name for name in state if name not in formula.updates]
    if forgotten:  # it would stay what it starts at for ever
        raise TypeError(
            f"{cls.__name__}: updates of the rule must name all its state ({', '.join(state)}), got "
            f"updates={formula.updates} without {', '.join(map(repr, forgotten))}; write @formula(updates="
            f"{(param, *state)}) over {formula.name}, and return the new values in this order."
        )


def _check_scalars(cls: Any) -> None:
    """Refuse a `scalars` that cannot be called as a step calls it."""
    kept = inspect.getattr_static(cls, "scalars")
    if not inspect.isfunction(kept) and not isinstance(kept, staticmethod | classmethod):
        return  # what a descriptor makes of it, only a call tells
    signature = inspect.signature(cls.scalars)
    itself = [None] if inspect.isfunction(kept) else []
    try:
        signature.bind(*itself, {}, 0, False, **dict.fromkeys(cls.numbers))
    except TypeError:
        wanted = ", ".join(["self, group, step, fresh", *cls.numbers])
        raise TypeError(
            f"{cls.__name__}: scalars must take ({wanted}), got {signature}; write `def scalars({wanted}):`."
        ) from None


def check_group(optimizer: Any, group: Mapping[str, Any], by_name: bool) -> None:
    """Refuse hyperparameters that are no numbers. `by_name`: the rule's keywords are taken from the group as they are.

    Where `scalars` is overridden it may make a number of anything, but for a number in quotes, which is a mistake.
    """
    name, rule = type(optimizer).__name__, optimizer.rule.formula
    for key, value in group.items():
        if by_name and key in rule.scalars and not is_number(value):
            raise TypeError(f"{name}: {key} must be a number, got {_described(key, value)}.")
        if key in ("params", "param_names"):
            continue
        for part in value if isinstance(value, tuple | list) else (value,):
            if in_quotes(part) and key not in rule.static:
                raise TypeError(f"{name}: {key} must be a number, got {_described(key, value)}.")
    if by_name and optimizer.counts_steps and "step" in group and "step" in rule.scalars:
        raise ValueError(
            f"{name}: `step` is the number of the update, got a hyperparameter of this name as well; give one of them "
            "another name."
        )


def _described(key: str, value: Any) -> str:
    if isinstance(value, tuple | list) and all(map(is_number, value)):
        names = ", ".join(f"{key.removesuffix('s')}{i + 1}" for i in range(len(value)))
        return (
            f"the {type(value).__name__} {value!r}; unpack it in a `scalars` of the class's own, `{names} = "
            f"group[{key!r}]`, and give the rule a keyword for each"
        )
    return why_no_number(value)


def missing_keywords(optimizer: Any, missing: list[str]) -> ValueError:
    """Return the error that the group lacks keywords of the rule."""
    remedy = "add them to `defaults` or override `scalars`"
    if missing == ["step"]:
        remedy = "set counts_steps = True in the class, and it is the number of the update"
    return ValueError(
        f"{type(optimizer).__name__}: the rule's keywords must be in the parameter group, got no "
        f"{', '.join(map(repr, missing))}; {remedy}."
    )


def explain(optimizer: Any, scalars: Any, error: BaseException) -> None:
    """Raise what is wrong with the numbers of an update that has failed; return if it is not the numbers.

    Args:
        scalars: what `scalars` returned, or UNKNOWN.
        error: what the update raised.
    """
    name, rule = type(optimizer).__name__, optimizer.rule.formula
    if not isinstance(error, Exception):
        return
    if scalars is UNKNOWN:
        # ValueErrors of `math` at 0, by their words of Python 3.13 and 3.14
        at_zero = isinstance(error, ArithmeticError) or str(error).startswith(("math domain", "expected a "))
        if at_zero and not optimizer.counts_steps:
            raise ValueError(
                f"{name}: scalars has failed ({type(error).__name__}: {error}), and `step` is 0 in it, as steps are "
                "not counted; if it computes with `step`, set counts_steps = True in the class."
            ) from error
        return
    wanted = (*rule.scalars, *rule.static)
    expected = f"{name}: scalars must return a dict of the rule's keywords ({', '.join(wanted)})"
    if not isinstance(scalars, Mapping):
        raise TypeError(f"{expected}, got {scalars!r}.") from error
    _explain_keys(expected, rule, scalars, error)
    for key in rule.scalars:
        if key in scalars and not is_number(scalars[key]):
            raise TypeError(f"{name}: {key} must be a number, got {_described(key, scalars[key])}.") from error


def _explain_keys(expected: str, rule: Formula, scalars: Mapping[str, Any], error: Exception) -> None:
    wanted = (*rule.scalars, *rule.static)
    missing = [key for key in wanted if key not in scalars and key not in rule.defaults]
    unknown = [key for key in scalars if key not in wanted]
    if missing or unknown:
        got = [f"no {', '.join(map(repr, missing))}"] * bool(missing)
        got += [f"{', '.join(map(repr, unknown))}, which it does not take"] * bool(unknown)
        raise TypeError(f"{expected}, got {' and '.join(got)}.") from error
