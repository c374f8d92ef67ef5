"""Part of the batch: whether gradients are right for another number of examples, too.

Where examples do not depend on each other forward, they do not backward: then the first few examples alone have the
gradients that they have among all, and serve for other checks, which are many passes. Where they do, or are summed up
to one number, gradients of fewer examples are compared with differences of their own.
"""

from __future__ import annotations

import torch
from torch.autograd.gradcheck import GradcheckError

from torch_bp.autograd.gradient_check.comparison import compare
from torch_bp.autograd.gradient_check.options import Options
from torch_bp.autograd.gradient_check.passes import Passes, close
from torch_bp.autograd.gradient_check.slope import Slopes
from torch_bp.autograd.gradient_check.subject import real

_EXAMPLES = 8


class Examples:
    """Passes of the first `count` of `total` examples, which are independent of those after them.

    Attributes:
        names: the inputs that have one entry for each example.
        passes: of the first examples.
    """

    def __init__(self, names: list[str], count: int, total: int, passes: Passes) -> None:
        self.names, self.count, self.total, self.passes = names, count, total, passes

    def independent(self, whole: Passes) -> bool:
        """True if the examples that are left do not depend on the first, either."""
        try:
            rest = Passes(whole.subject.part(self.names, self.count, self.total))
        except Exception:  # of a function of whole batches: whatever it raises, it is one
            return False
        return _agree(whole, rest, self.count, self.total)


def few_examples(passes: Passes) -> Examples | None:
    """Return the first examples, if they can be run alone, and give the outputs that they give among all."""
    sizes = {t.shape[0] if t.dim() else 0 for t in passes.outputs}
    total = sizes.pop() if len(sizes) == 1 else 0
    names, count = _batched(passes, total), min(_EXAMPLES, total // 2)
    if not count or not any(name in passes.subject.checked for name in names):
        return None
    try:
        part = Passes(passes.subject.part(names, 0, count))
    except Exception:  # of a function of whole batches of this size: whatever it raises, it is one
        return None
    if not _agree(passes, part, 0, count):
        return None
    part.covector = passes.cut(count)[0]
    return Examples(names, count, total, part)


def another_number(passes: Passes, options: Options) -> None:
    """Raise if gradients of fewer examples are wrong, where the function takes fewer."""
    subject = passes.subject
    checked = [subject.tensors[name] for name in subject.checked if name.startswith("input")]
    total = next((len(t) for t in checked if t.dim()), 0)
    count, names = total - total // 2, _batched(passes, total)
    if not 0 < count < total or not any(name in subject.checked for name in names):
        return
    if any(total in t.shape[name in names :] for name, t in subject.tensors.items()):
        return  # what has this size may be something else than the examples
    try:
        part = Passes(subject.part(names, 0, count))
    except Exception:  # it does not take fewer
        return
    try:
        signal = part.signal()
    except GradcheckError as error:
        raise GradcheckError(f"for {count} of {total} examples, {error}") from error
    slopes = Slopes(part.subject, part.values, part.dtype, options.eps, options.rtol, options.atol)
    for name in subject.checked:
        row = compare(slopes, name, signal, part.masked, full=False)
        if row.failure and row.error:  # none where the function has a kink along all directions
            raise GradcheckError(f"for {count} of {total} examples, {row.failure}")


def _batched(passes: Passes, total: int) -> list[str]:
    tensors = passes.subject.tensors
    return [
        n
        for n, t in tensors.items()
        if n.startswith("input") and t.dim() and t.layout is torch.strided and len(t) == total
    ]


def _agree(whole: Passes, part: Passes, first: int, last: int) -> bool:
    """True if the outputs of part of the batch are those that it has in the whole."""
    pairs = [(real(a)[first:last], real(b)) for a, b in zip(whole.outputs, part.outputs)]
    same = len(part.outputs) == len(whole.outputs)
    return same and all(a.shape == b.shape and close(a, b, whole.slack) for a, b in pairs)
