"""A number of torch's inputs for one class, and what came of them."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

import torch_bp.nn as ours

CLASSES = sorted(
    name
    for name, found in vars(ours).items()
    if inspect.isclass(found) and issubclass(found, getattr(torch.nn, name, ()))  # HalfMSELoss has no twin
)
# By class and torch's name of the input. A deviation that is no longer there fails, so that this list stays true.
MEANT = {
    ("CrossEntropyLoss", "2d_ignore_index_mean"): (
        "all labels are ignored: the mean is NaN and its gradient 0 in both, and the derivative of that gradient by "
        "what comes from above is 0 here and NaN in torch"
    ),
}


@dataclass(frozen=True)
class Outcome:
    """One input: its name, how ours deviates, if it does, and why that is meant, if it is."""

    name: str
    deviation: str = ""
    reason: str = ""

    @property
    def failure(self) -> str:
        """What must not be: a deviation that is not meant, or a meant one that is not there."""
        if self.reason and not self.deviation:
            return f"is as torch by now, and no deviation to explain: {self.reason}"
        return "" if self.reason else self.deviation


@dataclass(frozen=True)
class Group:
    """Inputs of one kind for the class `name`; `checks()` gives each with a check that raises AssertionError."""

    name: str
    kind: str
    case: str
    checks: Callable[[], Iterable[tuple[str, Callable[[], None]]]]

    @property
    def id(self) -> str:
        """A name for this group alone."""
        return f"{self.name}-{self.kind}-{self.case}".replace(" ", "_")

    def outcomes(self) -> Iterator[Outcome]:
        """Run all of it with the same random numbers every time. Nobody reads the warnings of torch's data."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            for number, (name, check) in enumerate(self.checks()):
                torch.manual_seed(number)
                called = f"{self.name}, {self.kind}, {self.case}: {name or 'default'}"
                yield Outcome(called, _deviation(check), MEANT.get((self.name, name), ""))


def _deviation(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:  # whatever torch's data leads to is told beside the input's name
        told = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {' '.join(told)}"
    return ""
