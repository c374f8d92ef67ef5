"""DivergenceGuard: a run that diverges goes back to where it was sound, with a smaller rate; sec. 9.5, item 4."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_bp.diagnostics.guard_arguments import check_numbers, check_objects, several
from torch_bp.diagnostics.guard_event import DivergenceError, Event
from torch_bp.diagnostics.judge import Judge
from torch_bp.diagnostics.loss_test import Anomaly, LossTest
from torch_bp.diagnostics.recovery import Recovery
from torch_bp.diagnostics.run_state import RunState
from torch_bp.diagnostics.snapshot_ring import SnapshotRing

_logger = logging.getLogger("torch_bp")


class _LeftOutError(Exception):
    """Leaves the optimizer's step before anything has changed."""


class DivergenceGuard:
    """Steps the optimizer while all is well; otherwise takes the run back, cuts the rate, and lets it go on.

    `guard.step(loss)` stands where `optimizer.step()` stood, and the rest of the loop stays as it is, whatever the
    guard does: schedules step after it, gradients are cleared, the next batch comes. A snapshot is the run as it is at
    the end of `guard.step`; to go back is to be there again, with everything after it still to come. What is looked at:

    - *NaN and infinity* in the loss and in all gradients: the update is left out, and the run goes back.
    - *A spike* or *a steady rise* of the loss, by the robust tests of `torch_bp.diagnostics.loss_test`. The update of a
      spike is left out; `patience` spikes in a row take the run back, a single one was an odd batch. What is usual is
      told by the first 16 losses, of which none is a spike: a rate that is too high from the first step on is found
      where it makes NaN or infinities, and by `torch_bp.watch`.
    - *Overflow*: with a GradScaler, gradients that are not finite are its own business, until it has skipped 20 steps
      in a row.

    Going back restores parameters, buffers, optimizers, schedules, scaler, random numbers, and `data`, from the newest
    good snapshot (after a rise: the newest from before it), bit for bit; gradients are dropped. A snapshot is good when
    `trust` healthy steps have followed it, or when it is the first, made before the first update. If the run fails
    again before it is past the place of the failure, by so much that a newer snapshot is good, it goes to an older
    snapshot and the rate is cut once more; after `retries` of these it raises.

    A `torch_bp.TrainStep` updates by itself: `guard.call(step, x, y)` does one. `guard.step(step(x, y))` would step the
    optimizer twice.

    The cut goes into the groups' rates and the base rates of the schedules, whose curves go on, multiplied by `factor`.
    With `cooldown` it is for a while: rates are multiplied by a number that grows from `factor` to 1, only while the
    optimizer steps.

    What is asynchronous: on the CPU all is read at once. On a CUDA device nothing is waited for: loss and verdict are
    sent to the host and read at the next step. An optimizer of torch with `fused=True` is told on the device to leave
    out the update, of spikes too. Others make the update of the bad step, and a snapshot from before it brings the
    parameters back; after the last step, `settle()` looks at what is still out. With several processes, hand over a
    loss that all have in common, so that all decide alike.

    Args:
        model: whose state is kept.
        optimizer: one or several.
        scheduler: one or several. Default: none.
        scaler: a `torch.amp.GradScaler`; the guard unscales, steps and updates it. Default: none.
        data: what knows the position in the data, one or several with `state_dict` and `load_state_dict`, or a
            `torch.Generator`. A `DataLoader` that is being iterated has read ahead and goes on with its batches.
            Default: none, and the run goes on with the next batches.
        factor: multiplies the rates at each return, in (0, 1]. Default 0.5.
        retries: how often the run may go back in a row, >= 0. Default 3.
        cooldown: in how many steps the rates come back to what they were; 0 (default): they stay cut.
        every: steps from one snapshot to the next, >= 1. Default 100.
        keep: snapshots, >= 2. Default 3. Each takes the memory of the model and the optimizers' state.
        trust: healthy steps that make a snapshot good, 1 to (keep - 1) * every. Default 50.
        storage: of snapshots, "device" (default) or "cpu".
        spike, patience, rise, window: of `torch_bp.diagnostics.LossTest`. Losses that are meant to rise, as in
            adversarial training, go with `rise=None`.

    Attributes:
        events: what has happened, a list of `Event`s. They are also logged as warnings of the logger "torch_bp".
        steps: steps so far, those that were taken back included.

    Raises:
        TypeError, ValueError: an argument is not what it must be.
        RuntimeError: an optimizer steps in the backward.

    Example:
        >>> import torch
        >>> import torch_bp
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> guard = torch_bp.DivergenceGuard(model, optimizer)
        >>> for scale in (1.0, float("inf"), 1.0):
        ...     optimizer.zero_grad()
        ...     loss = scale * model(torch.ones(4, 2)).square().mean()
        ...     loss.backward()
        ...     print(guard.step(loss))
        True
        False
        True
        >>> print(guard.events[0])
        step 2: the loss is inf, not finite; went back to step 0, with rates times 0.5
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        scheduler: Any = None,
        scaler: Any = None,
        data: Any = None,
        factor: float = 0.5,
        retries: int = 3,
        cooldown: int = 0,
        every: int = 100,
        keep: int = 3,
        trust: int = 50,
        storage: str = "device",
        spike: float | None = 10.0,
        patience: int = 2,
        rise: float | None = 0.5,
        window: int = 64,
    ) -> None:
        self._optimizers, self._schedulers, data = several(optimizer), several(scheduler), several(data)
        check_objects(model, self._optimizers, self._schedulers, scaler, data)
        check_numbers({name: value for name, value in locals().items() if name != "self"})
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        objects = [*self._schedulers, *several(scaler), *data]
        self._ring = SnapshotRing(RunState(model, self._optimizers, objects), every, keep, trust, storage)
        self._retries = retries
        self._recovery = Recovery(self._ring, self._optimizers, self._schedulers, factor, retries, cooldown)
        self._judge = Judge(self._optimizers, self._scaler, lambda: LossTest(spike, patience, rise, window))
        self.events: list[Event] = []
        self.steps = 0

    def step(self, loss: Tensor | Callable[[], Tensor], optimizer: Optimizer | None = None) -> bool:
        """Step the optimizers, if nothing is wrong; gradients must be there. In the place of `optimizer.step()`.

        Args:
            loss: of this step, a tensor of one element; of several batches whose gradients are accumulated, their mean
                or the last. Or a closure, as of `torch.optim.LBFGS`, which computes gradients and returns the loss.
            optimizer: which one steps, if several step in turn, each with a loss of its own. Default: all.

        Returns:
            Whether the parameters have been updated (on a CUDA device: as far as is known).

        Raises:
            DivergenceError: there are no retries left; all is as in the last good snapshot.
            RuntimeError: parameters have been added, removed or replaced.
        """
        if callable(loss) and not isinstance(loss, Tensor):
            return self._by_closure(loss, self._chosen(optimizer))
        proceeds = self.before_update(loss, optimizer)
        try:
            if proceeds:
                self._update(self._chosen(optimizer))
        except BaseException:
            self._judge.close()
            raise
        return self.after_update()

    def call(self, step: Callable[..., Tensor], *args: Any, **keywords: Any) -> Tensor | None:
        """Do a training step that updates by itself, as `torch_bp.TrainStep` does: `guard.call(step, x, y)`.

        A FloatingPointError of the step counts as a bad step. The loss is known when the update has been made, so that
        of a spike is not left out.

        Returns:
            The loss; None where the run went back.
        """
        judge = self._judge
        self._recovery.start(judge.state_dict)
        self._settle()
        judge.key, before, loss = None, getattr(step, "steps", None), None
        if judge.found is None:
            try:
                loss = step(*args, **keywords)
            except FloatingPointError:
                judge.found = Anomaly("step", math.nan, math.inf)
            else:
                judge.look(_one(loss), None)
        if judge.found is None and before is not None and before == step.steps:  # type: ignore[attr-defined]
            judge.close()
            return loss  # one of several batches that make an update
        went = judge.certain
        self.after_update(acted=loss is not None)
        if went and hasattr(step, "drop"):
            step.drop()
        return None if went else loss

    def before_update(self, loss: Tensor, optimizer: Optimizer | None = None) -> bool:
        """The first half of `step`, for loops that others run: return whether the update may be made.

        Once for each update, where a step of the loop has several; `after_update` comes at its end.
        """
        judge = self._judge
        chosen, loss, before = self._chosen(optimizer), _one(loss), judge.found
        if judge.certain:
            return False
        self._recovery.start(judge.state_dict)
        self._settle()
        if judge.found is before:
            judge.found = None
            judge.key = None if optimizer is None else self._optimizers.index(optimizer)
            judge.look(loss, chosen)
        proceeds = judge.found is None
        judge.found = judge.found or before
        return proceeds

    def after_update(self, *, acted: bool = False) -> bool:
        """The second half of `step`: note a healthy step, or go back. `acted`: the update was made, spike or not.

        Returns:
            False where the update must not have been made.

        Raises:
            DivergenceError, RuntimeError: as of `step`.
        """
        found = self._judge.found
        self._judge.close()
        self.steps += 1
        if found is None:
            self._recovery.go_on(self._judge.state_dict)
            return True
        if found.certain:
            self._go_back(found)
        else:
            self._note(found, "note" if acted else "skip")
        return False

    def settle(self) -> bool:
        """After the last step: read what is still on its way from a CUDA device, and go back if it is bad.

        Returns:
            Whether all was well.
        """
        self._settle()
        found, self._judge.found = self._judge.found, None
        if found is not None and found.certain:
            self._go_back(found)
        return found is None

    def reset(self) -> None:
        """After parameters were added, removed or replaced: drop all snapshots, and begin with one of the run as it is.

        It is taken at the next step, before the update.
        """
        self._judge.close()
        self._judge.forget()
        self._recovery.reset()

    def memory(self) -> dict[str, int]:
        """Bytes of the snapshots there are so far, by device; they are made as the run comes to them, `keep` in all."""
        return self._ring.bytes()

    def state_dict(self) -> dict[str, Any]:
        """What the guard has seen and done, to be saved with the run. Snapshots are not in it."""
        return {
            "steps": self.steps,
            "seen": self._judge.state_dict(),
            "recovery": self._recovery.state_dict(),
            "events": [asdict(event) for event in self.events],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the saved guard; the first snapshot is of the run as it is at the next step, before the update."""
        state = copy.deepcopy(state)
        self.reset()
        self.steps = state["steps"]
        self._judge.load_state_dict(state["seen"])
        self._recovery.load_state_dict(state["recovery"])
        self.events = [Event(**event) for event in state["events"]]

    # A step.

    def _chosen(self, optimizer: Optimizer | None) -> list[Optimizer]:
        if optimizer is None:
            return self._optimizers
        if not any(optimizer is each for each in self._optimizers):
            raise ValueError(
                f"DivergenceGuard.step: optimizer must be one of the guard's, got another {type(optimizer).__name__}. "
                "Make the guard with all of them."
            )
        return [optimizer]

    def _settle(self) -> None:
        if self._judge.settle():
            self._ring.doubt()

    def _update(self, chosen: list[Optimizer]) -> None:
        for optimizer in chosen:
            if self._scaler is None:
                optimizer.step()
            else:
                self._scaler.step(optimizer)
        if self._scaler is not None:
            self._scaler.update()

    def _by_closure(self, closure: Callable[[], Tensor], chosen: list[Optimizer]) -> bool:
        if self._scaler is not None or len(chosen) != 1:
            raise RuntimeError(
                f"DivergenceGuard.step: a closure must be for one optimizer without a GradScaler, got {len(chosen)} "
                f"and scaler={self._scaler!r}. Name the optimizer, or compute the gradients before and hand over the "
                "loss."
            )
        judged = False

        def looking() -> Tensor:
            nonlocal judged
            loss = closure()
            if not judged:  # before anything is changed; a line search may well try what is not finite
                judged = True
                if not self.before_update(loss, chosen[0] if len(self._optimizers) > 1 else None):
                    raise _LeftOutError
            return loss

        try:
            chosen[0].step(looking)  # type: ignore[arg-type]
        except _LeftOutError:
            pass
        except BaseException:
            self._judge.close()
            raise
        self._judge.look_at_parameters(chosen[0])
        return self.after_update()

    # What follows it.

    def _go_back(self, found: Anomaly) -> None:
        self._judge.forget()
        self._end_scaling()
        position, seen, gives_up = self._recovery.go_back(found.since if found.reason == "rise" else 0)
        self._judge.load_state_dict(seen)
        self._note(found, "stop" if gives_up else "rollback", position)
        if gives_up:
            raise DivergenceError(self.events, self._retries)

    def _end_scaling(self) -> None:
        """Let a GradScaler forget gradients that it may have unscaled; its own state is restored afterwards."""
        if self._scaler is None:
            return
        for optimizer in self._optimizers:
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                try:
                    self._scaler.unscale_(optimizer)
                except RuntimeError:  # it is unscaled, or has stepped
                    continue
        try:
            self._scaler.update()
        except AssertionError:  # there were no gradients
            return

    def _note(self, found: Anomaly, action: str, back_to: int | None = None) -> None:
        factor = self._recovery.factor
        event = Event(self.steps, found.reason, found.number, found.threshold, action, back_to, factor, self._judge.key)
        self.events.append(event)
        _logger.warning("DivergenceGuard: %s.", event)


def _one(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"DivergenceGuard: loss must be a tensor of one element, got {got}. Hand over the mean.")
    return loss.detach().reshape(())
