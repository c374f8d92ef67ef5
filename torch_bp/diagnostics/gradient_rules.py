"""Rules for gradients that are not there, are not used, or are left from the step before."""

from __future__ import annotations

from collections.abc import Iterator

from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.history import History
from torch_bp.diagnostics.remedy import INIT
from torch_bp.diagnostics.thresholds import Thresholds


def wrong_gradient(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Gradients that are no slope of the loss, sec. 3.3 and 10.1. What is wrong in one place is wrong in all layers
    before it, as the error signal passes there later: the last one is to blame, or what follows it.
    """
    del limit  # that of the precision comes with the errors
    now, tolerance = history.now, history.now.gradient_tolerance
    wrong = {name: e for name, e in now.gradient_errors.items() if tolerance is not None and not e <= tolerance}
    if not wrong:
        return
    order = [name for name in (*now.gradient_errors, *now.layers) if name in now.gradient_errors]
    order = [*dict.fromkeys(reversed(order))][::-1]  # as in the forward pass, where that is known
    name = "loss" if "loss" in wrong else max(wrong, key=order.index)
    behind = order[order.index(name) + 1 :]
    what = "the backward of the loss function" if name == "loss" else f"the backward of {name}"
    if name != "loss":
        what += f", or of what lies between it and {behind[0]}," if behind else ", or of what follows it,"
    cause = f"its gradient is off by {wrong[name]:.2g} of its size from a difference of the loss; {what} is wrong"
    yield Finding(
        "wrong gradient",
        "" if name == "loss" else name,
        now.step,
        wrong[name],
        tolerance or 0.0,
        cause,
        "torch_bp.autograd.gradcheck(function, inputs) in float64 shows which derivative of a hand-written backward",
        "error",
    )


def unused_parameters(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Parameters that take part in no step: of a layer that is not called, or cut off from the loss."""
    del limit
    if unused := history.now.unused:
        names = ", ".join(unused[:4]) + (", ..." if len(unused) > 4 else "")
        yield Finding(
            "unused parameters",
            unused[0].rpartition(".")[0],
            history.now.step,
            float(len(unused)),
            0.0,
            f"{names} got no gradient: the loss does not depend on them",
            "call the layer in forward, without .detach() or torch.no_grad(), or p.requires_grad_(False)",
        )


def zero_gradient(history: History, limit: Thresholds) -> Iterator[Finding]:
    """A layer whose gradient is exactly 0 while that of the last layer is not: nothing comes back to it."""
    del limit
    layers = [x for x in history.now.layers.values() if x.grad_norm is not None]
    if not layers or not layers[-1].grad_norm:
        return
    stuck = [x for x in layers if x.grad_norm == 0]
    if stuck and not any(x.dead_units and x.dead_units == x.units for x in layers):
        cause = "its gradient is exactly 0 while the last layer's is not"
        yield Finding(
            "no gradient",
            stuck[-1].name,
            history.now.step,
            0.0,
            0.0,
            cause,
            INIT,
            action="init",
        )


def not_in_optimizer(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Parameters that have a gradient, and that the step does not change, though it changes others; nor has anything
    else since the last reading, such as a second optimizer.
    """
    del limit
    if len(history.latest) < 2:
        return
    before = history.latest[-2].layers
    layers = [x for x in history.now.layers.values() if x.update_norm is not None and x.grad_norm]
    still = [x for x in layers if x.update_norm == 0 and x.name in before]
    still = [x for x in still if x.weight_norm == before[x.name].weight_norm]
    if still and len(still) < len(layers) and all(history.now.lr):
        yield Finding(
            "not in the optimizer",
            still[0].name,
            history.now.step,
            0.0,
            0.0,
            f"the step left {', '.join(x.name for x in still[:4])} as it was, though there is a gradient",
            "give all parameters to the optimizer: torch_bp.optim.Adam(model.parameters())",
            "error",
        )


def not_zeroed(history: History, limit: Thresholds) -> Iterator[Finding]:
    """Gradients of the step before were still there when this step's were added."""
    del limit
    now = history.now
    if carried := now.carried:
        cause = f"gradients of the steps before, of norm {carried:.3g}, were there when backward began, and add up"
        yield Finding(
            "gradient not zeroed",
            "",
            now.step,
            carried,
            0.0,
            cause,
            "optimizer.zero_grad() before loss.backward()",
            "error",
            action="zero_grad",
        )
