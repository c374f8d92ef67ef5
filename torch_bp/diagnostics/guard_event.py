"""What a `DivergenceGuard` has done, and the error with which it gives up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REASONS = {  # and what the number is
    "loss": "the loss is {0:.4g}, not finite",
    "gradient": "a gradient is not finite (sum of squares {0:.4g})",
    "step": "the training step found a number that is not finite",
    "spike": "the loss is {0:.4g}, above {1:.4g}",
    "rise": "the loss has risen steadily, to {0:.4g}, above {1:.4g}",
    "overflow": "the GradScaler has skipped {0:.0f} steps in a row, {1:.0f} are too many",
}


@dataclass(frozen=True)
class Event:
    """One finding, and what was done.

    Attributes:
        step: the number of the step, counted from 1 over the whole run, those that were taken back included.
        reason: "loss", "gradient" (not finite), "step" (a `TrainStep` refused), "spike", "rise" or "overflow" (a
            GradScaler found nothing finite for too long).
        number: what was found: see the message.
        threshold: what it should not have passed; infinite for what should be finite.
        action: "skip": the update was left out; "note": a spike came too late for that; "rollback"; "stop".
        back_to: the step of the run at which it goes on, for "rollback" and "stop".
        factor: by what the rates are now multiplied in all.
        optimizer: the number of the optimizer the loss belongs to, if the loop steps each by itself.
    """

    step: int
    reason: str
    number: float
    threshold: float
    action: str
    back_to: int | None = None
    factor: float = 1.0
    optimizer: int | None = None

    def __str__(self) -> str:
        found = REASONS[self.reason].format(self.number, self.threshold)
        done = {
            "skip": "the update was left out",
            "note": "nothing was done yet",
            "rollback": f"went back to step {self.back_to}, with rates times {self.factor:.4g}",
            "stop": f"went back to step {self.back_to}, and no retries are left",
        }[self.action]
        whose = "" if self.optimizer is None else f" (optimizer {self.optimizer})"
        return f"step {self.step}{whose}: {found}; {done}"


class DivergenceError(RuntimeError):
    """A run diverges again and again; the model and all else are at the last good state.

    Attributes:
        events: the history, a list of `Event`s.
    """

    def __init__(self, events: Sequence[Event], retries: int) -> None:
        self.events = list(events)
        history = "\n".join(f"  {event}" for event in self.events[-10:])
        super().__init__(
            f"DivergenceGuard: the run must get past the same place within {retries} retries, got one more "
            f"divergence:\n{history}\nParameters, optimizer and schedule are at the last good state; lower the rate, "
            "clip gradients, or look at the batches there."
        )

    def __reduce__(self) -> tuple:
        return _error, (self.events, str(self))


def _error(events: list[Event], message: str) -> DivergenceError:
    error = DivergenceError(events, 0)
    error.args = (message,)
    return error
