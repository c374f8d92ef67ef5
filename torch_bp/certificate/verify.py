"""Run a model on both sides, and decide what a deviation means.

Where the two deviate by more than rounding does as a rule, torch in float64 is asked who is right: a deviation holds
if torch_bp is as near to it as torch is. So a badly conditioned model is not blamed on us, and an error of ours is not
taken for rounding. The answer counts as long as torch itself has half of its digits right.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from torch_bp.certificate.checks import CHECKS, Check
from torch_bp.certificate.comparison import coarsest, deviations, mismatch, tolerance
from torch_bp.certificate.report import DIFFERS, HOLDS, TORCH_CANNOT, Certificate, Row
from torch_bp.certificate.subject import Subject, Tensors, projection, reproducible
from torch_bp.nn.convert import conversion, convert, require_module, to_torch

# The distance from float64 is a matter of chance, most of all where a gradient is zero but for rounding: torch's is the
# largest of several points that differ by roundings, and ours may be a few times that.
POINTS, AS_NEAR = 8, 4


def verify(
    model: torch.nn.Module, example_inputs: Any, *, checks: Sequence[str] | None = None, seed: int = 0
) -> Certificate:
    """Compare a model made of torch's modules with the same model made of torch_bp's: the drop-in certificate.

    The model is copied, and converted by `to_torch` and by `convert`; both run with the same random seed. Compared are

    - `outputs`, without gradients, and the buffers afterwards
    - `gradients` of parameters and inputs, of a fixed projection of the outputs to a number
    - `second derivatives`: the Hessian over parameters and inputs, times a vector
    - `forward mode`: `torch.func.jvp`
    - `per-example gradients`: `vmap` of `grad` over dimension 0 of the inputs, for the first 8 examples
    - `compile`: outputs and gradients under `torch.compile(fullgraph=True, backend="aot_eager")`
    - `autocast`: outputs and gradients under autocast to bfloat16
    - `state_dict`: loaded with `strict=True` from torch to torch_bp and back, to the last bit
    - `training`: 20 steps of SGD with momentum, each side with its own gradients
    - `SGD momentum`, `SGD Nesterov`, `RMSprop`, `Adagrad`, `Adam`, `AdamW`: parameters and state of torch's optimizer
      and torch_bp's after 20 steps with the same gradients

    The largest relative deviation that holds is 1e-10 in float64, 1e-5 in float32, 5e-3 in float16 and 4e-2 in
    bfloat16, for the coarsest dtype involved: tens of roundings, where wrong mathematics costs nearly all digits. A
    deviation is relative to the largest number of a tensor, or to 1/100 of the largest of its kind (of all gradients,
    say) where that is more. A larger one holds if torch_bp is as near to torch in float64 as torch is, which
    `Row.detail` says: within 4 times its distance, here or a few roundings from here. Integers, shapes, dtypes and
    which gradients are None must be equal. What torch cannot do with this model is reported and does not count.

    The model, its buffers, gradients and mode, the inputs and all random states are as before afterwards; hooks of the
    model run, on copies. It costs about 80 forward and backward passes.

    Args:
        model: any module that can be deep-copied, in the mode (`train` or `eval`) that is to be compared.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. Arguments may be tuples, lists
            and dicts of tensors. Floating-point tensors are differentiated.
        checks: names from the list above. Default: all.
        seed: for models that draw random numbers, such as dropout.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: unknown checks, or the model cannot be called with `example_inputs` or returns no tensor of
            floating-point numbers.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh())
        >>> report = verify(model, torch.randn(4, 3), checks=["outputs", "gradients", "Adam"])
        >>> report.holds, [row.verdict for row in report.rows]
        (True, ['holds', 'holds', 'holds'])
    """
    import torch_bp.optim  # here and not above: a second SGD in the process is LightningCLI's trouble

    require_module("verify", model)
    chosen, inputs = _chosen(checks), _arguments(example_inputs)
    with torch.inference_mode(False):  # copies made inside of it could not be trained
        theirs = Subject(to_torch(model), inputs, torch.optim)
        mine = Subject(convert(model), inputs, torch_bp.optim, theirs)
    tensors = theirs.tensors()
    device = tensors[0].device.type if tensors else "cpu"
    with reproducible(seed, device):
        _require_runs(theirs)
    run = _Run(theirs, mine, seed, device)
    rows = tuple(run.row(check) for check in chosen)
    return Certificate(rows, conversion(mine.model), coarsest(tensors) or torch.get_default_dtype(), device)


class _Run:
    """Both sides, and how they are run."""

    def __init__(self, theirs: Subject, mine: Subject, seed: int, device: str) -> None:
        self.theirs = theirs
        self.mine = mine
        self.seed = seed
        self.device = device

    def tensors(self, run: Callable[[Subject], Tensors], side: Subject) -> Tensors:
        with reproducible(self.seed, self.device):
            return run(side)

    def row(self, check: Check) -> Row:
        """Run a check on both sides and compare."""
        try:
            expected = self.tensors(check.run, self.theirs)
        except Exception as error:  # whatever it is, it is torch's
            return Row(check.name, TORCH_CANNOT, detail=_line(error))
        try:
            got = self.tensors(check.run, self.mine)
        except Exception as error:
            return Row(check.name, DIFFERS, math.inf, detail=f"torch_bp raised {_line(error)}")
        allowed = self.allowed(check, expected)
        if odd := mismatch(got, expected):
            return self.repeatable(check, expected, Row(check.name, DIFFERS, math.inf, allowed, odd[0], odd[1]))
        found = deviations(got, expected)
        worst = max(found, key=found.__getitem__, default="")
        row = Row(check.name, HOLDS, found.get(worst, 0.0), allowed, worst)
        if row.deviation <= allowed:
            return row
        return self.judged(check, row, found, got, expected)

    def allowed(self, check: Check, expected: Tensors) -> float:
        if check.exact:
            return 0.0
        dtype = coarsest([*expected.values(), *self.theirs.tensors()])
        if check.autocast and dtype is not torch.float64:  # which autocast leaves alone
            dtype = torch.bfloat16
        return tolerance(dtype)

    def judged(self, check: Check, row: Row, found: dict[str, float], got: Tensors, expected: Tensors) -> Row:
        """Return the verdict on deviations beyond the tolerance."""
        differs = replace(row, verdict=DIFFERS)
        if check.judge is None or coarsest(self.theirs.tensors()) is torch.float64:
            return self.repeatable(check, expected, differs)
        try:
            exact = self.tensors(check.judge, self.theirs.double())
            torchs = self.rounding(check.judge)
        except Exception:  # a model may insist on its dtype
            return self.repeatable(check, expected, differs)
        ours = deviations(got, exact)
        for name in (name for name, deviation in found.items() if deviation > row.tolerance):
            if not ours[name] <= AS_NEAR * min(torchs[name], row.tolerance**0.5):
                return self.repeatable(check, expected, differs)
        near = f"as near to float64 as torch: {ours[row.tensor]:.1e}, torch {torchs[row.tensor]:.1e}"
        return replace(row, detail=near)

    def rounding(self, run: Callable[[Subject], Tensors]) -> dict[str, float]:
        """Return torch's largest distance from float64, tensor by tensor, here and a few roundings from here."""
        largest: dict[str, float] = {}
        for number in range(POINTS):
            point = self.theirs.nearby(number)
            for name, distance in deviations(self.tensors(run, point), self.tensors(run, point.double())).items():
                largest[name] = max(distance, largest.get(name, 0.0))
        return largest

    def repeatable(self, check: Check, expected: Tensors, row: Row) -> Row:
        """Return the row, unless torch does not agree with itself."""
        again = self.tensors(check.run, self.theirs)
        if mismatch(again, expected) or max(deviations(again, expected).values(), default=0.0) > row.tolerance:
            return Row(row.check, TORCH_CANNOT, detail="two runs of torch with one seed differ")
        return row


def _chosen(names: Sequence[str] | None) -> Sequence[Check]:
    known = {check.name: check for check in CHECKS}
    wanted = list(known) if names is None else names
    if isinstance(wanted, str) or not set(wanted) <= set(known):
        raise ValueError(f"verify: checks must be names from {', '.join(known)}; got {names!r}.")
    return [known[name] for name in wanted]


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def _require_runs(side: Subject) -> None:
    """Refuse a model that torch cannot run: nothing at all would be compared."""
    (args, kwargs), _ = side.arguments()
    try:
        projection(side.fresh()(*args, **kwargs))
    except Exception as error:
        raise ValueError(
            f"verify: the model must run on example_inputs and return a floating-point tensor, got {_line(error)}. "
            "Give a tensor, a tuple of arguments or a dict of keyword arguments."
        ) from error


def _line(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
