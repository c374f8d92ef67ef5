"""What listens to a training loop, step by step, until it is closed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter as clock
from typing import Any

import torch
from torch import Tensor, distributed, nn

from torch_bp.diagnostics.assembly import Assembly
from torch_bp.diagnostics.cadence import Cadence
from torch_bp.diagnostics.finding import Finding
from torch_bp.diagnostics.hearing import Hearing, measure
from torch_bp.diagnostics.live_check import LiveCheck
from torch_bp.diagnostics.loss import Losses, as_loss
from torch_bp.diagnostics.measurements import Detail, Measurements
from torch_bp.diagnostics.parameters import COLUMNS, ParameterSums, measures_itself
from torch_bp.diagnostics.probe import EagerProbe, Probe
from torch_bp.diagnostics.reading import Reading
from torch_bp.diagnostics.reading_log import ReadingLog
from torch_bp.diagnostics.record import Record
from torch_bp.diagnostics.recorder import signals
from torch_bp.diagnostics.structure import Structure
from torch_bp.diagnostics.told import Told
from torch_bp.diagnostics.watch_options import WatchOptions
from torch_bp.diagnostics.writers import Output

_logger = logging.getLogger(__name__)
_UNREAD = "a reading could not be made"


class Monitor:
    """What `watch` returns: it listens until it is closed, or its `with` block is left.

    Attributes:
        step: optimizer steps so far.
        epoch: set it, and readings have it.
        alone: set it to False where other optimizers update parts of the model, whose updates are unknown then.
        last: the latest reading, or None.
        findings: what is wrong, by the readings that were written so far, the gravest first.
        unknown: layers of which only parameters and output are watched, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        output: Output,
        detail: Detail,
        cadence: Cadence,
        losses: Losses,
        measurements: Measurements,
        probe: Probe,
        check: LiveCheck,
        anew: Callable[[], tuple[Measurements, Probe]] | None,
        options: WatchOptions,
    ) -> None:
        self.step, self.alone = 0, True
        self.epoch: int | None = None
        self._model, self._optimizer, self._output, self._cadence = model, optimizer, output, cadence
        self._losses, self._measurements, self._probe = losses, measurements, probe
        self._reduce = options.reduce
        self._told = Told(losses, options.scaler, self._reduce)
        self._mean = options.reduction == "mean"
        self._log = ReadingLog(output, options, self._safely)
        self._check, self._detail = check, detail
        self._make, self._structure = anew, Structure(model)  # None where layers cannot be taken down again
        self._arrange()
        self._hooks: list[Any] = []
        self._began, self._closed = clock(), False
        self._explicit = self._whole = False  # passes are those of a TrainStep; and so are updates
        self._stepping: Any = None  # the arguments of the call of `optimizer.step` that is under way
        self._listen_to_optimizer()
        self._recording = False
        self._connect()
        self._said: set[str] = set()  # what has failed
        self._next()

    def __repr__(self) -> str:
        """It waits for nothing: what is on its way from a device is a reading, without findings yet."""
        of = [type(each).__name__ for each in (self._model, self._optimizer) if each is not None]
        readings, findings = self._log.counts
        return f"Monitor({', '.join(of)}, steps={self.step}, readings={readings}, findings={findings})"

    # --- what loops may tell

    def loss(self, loss: Any) -> Any:
        """Note the loss of the step, and return it: `monitor.loss(criterion(model(x), y)).backward()`."""
        noted = as_loss(loss)
        if self._recording:
            self._losses.training.append(noted)
        return loss

    def validation(self, loss: Any) -> None:
        """Note a loss of the validation set."""
        self._losses.validation.append(as_loss(loss))

    def clipped(self, total_norm: Any, max_norm: float) -> Any:
        """Note what `clip_grad_norm_` returned, and return it; `max_norm` is what it was given."""
        if self._recording:
            self._told.clipped(total_norm, max_norm)
        return total_norm

    def loss_after(self, loss: Any) -> None:
        """Note the loss of the last step's batch after the step: its achieved decrease is in the next reading."""
        self._told.loss_after(loss)

    def loss_of_check(self, loss_fn: nn.Module) -> None:
        """The module that computes the loss from what the model returns, for `check_every` alone, where `watch` was not
        given it, as the loop tells losses itself.
        """
        if self._check.every is not None:
            self._check.detach()
            self._check.loss_fn = loss_fn
            self._next()

    def gradients_ready(self) -> None:
        """Say, in a closure that `optimizer.step` calls, that gradients are there; torch_bp's optimizers can tell."""
        if self._recording and self._optimizer is not None and not measures_itself(self._optimizer):
            self._safely(self._parameters.before, self._optimizer, alone=self.alone)

    def step_done(self, loss: Any = None) -> None:
        """A step is over; for loops without an optimizer that was given to `watch`."""
        if self._optimizer is not None:
            raise RuntimeError(
                "watch: step_done must be called where no optimizer is given, got one, whose steps are counted by "
                "themselves. Leave the call out."
            )
        if loss is not None:
            self.loss(loss)
        self._end(self._safely(self._parameters.gradients) if self._recording else None)

    # --- what a TrainStep tells

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Whose steps are counted."""
        return self._optimizer

    @property
    def explicit(self) -> bool:
        """Whether a `TrainStep` tells losses and error signals."""
        return self._explicit

    @property
    def recording(self) -> bool:
        """Whether the step that comes, or is under way, is recorded."""
        return self._recording

    def follow(self, loss_name: str, whole: bool) -> None:
        """From now on a `TrainStep` says what happens, and nothing is attached to the model but for a pass of its own.

        Args:
            loss_name: of its loss function.
            whole: it does the updates too; else they are those of the optimizer, as ever.
        """
        if self._explicit and self._whole == whole:
            return
        if not isinstance(self._probe, EagerProbe):
            raise RuntimeError(
                "watch: a model that a TrainStep runs must not be compiled; give the step the module itself."
            )
        self._probe.detach()
        self._losses.close()
        self._losses.name = loss_name
        self._explicit, self._whole = True, whole
        self._listen_to_optimizer()

    def hearing(self, copied: frozenset[int] | None = None) -> Hearing:
        """An ear for a pass; see there."""
        assert isinstance(self._probe, EagerProbe)
        return Hearing(self._probe, self._measurements, copied)

    def heard(self, heard: tuple[Any, ...], loss: Tensor, loss_scale: Tensor | float | None = None) -> None:
        """A pass has run; `heard` by a `Hearing`."""
        if heard and self._recording:
            self._losses.add(loss.clone())
            if loss_scale is not None:
                self._told.scaled(loss_scale)
            self._safely(measure, heard, self._probe, self._measurements, self._losses)

    def ran(self, model: nn.Module, args: tuple[Any, ...], targets: tuple[Any, ...], loss_fn: Any) -> None:
        """Which model ran on what, and what its loss was computed from."""
        if self._checks:
            self._check.ran(model, args, targets, loss_fn)

    def updating(self, inside: bool = False) -> None:
        """The optimizer is about to step; `inside` of a graph, which computes the gradients, too."""
        if self._whole and self._recording and self._optimizer is not None:
            self._safely(self._parameters.before, self._optimizer, inside, self.alone, beside=inside)

    def updated(self) -> None:
        """The optimizer has stepped."""
        if self._whole and self._optimizer is not None and not self._closed:
            self._end(self._safely(self._parameters.after, self._optimizer) if self._recording else None)

    def skipped(self) -> None:
        """What has been heard is of a step that was not taken."""
        self._anew()
        self._probe.forget()

    def attend(self) -> None:
        """Record the step that is under way, whether its turn has come or not: it has gone wrong, and comes again."""
        self.skipped()
        self._recording = self._losses.wanted = not self._closed

    def refused(self) -> None:
        """The step was not taken, as it was not finite: what was heard of it is read, and it does not count."""
        if self._recording:
            rows, sums = self._safely(self._parameters.gradients) or ([], ())
            self._safely(self._record, rows, sums, refused=True)
            self._log.arrived(wait=False)
        self._anew()
        self._next()

    # --- what is read

    @property
    def readings(self) -> list[Reading]:
        """All readings that are kept, the latest last. It waits for those that are on their way to the host."""
        return self._log.all()

    @property
    def last(self) -> Reading | None:
        return self._log.last()

    @property
    def findings(self) -> list[Finding]:
        return self._log.findings()

    def close(self, metrics: Mapping[str, float] | None = None, hparams: Mapping[str, Any] | None = None) -> None:
        """Read and write what is left, and leave the model as it was.

        Args:
            metrics, hparams: what came out, and what went in, for TensorBoard's table of runs.
        """
        if self._closed:
            return
        self._closed, self._recording = True, False
        self._probe.detach()
        self._check.detach()
        self._losses.close()
        self._listen_to_optimizer()
        if self._optimizer is not None:
            self._parameters.abandon(self._optimizer)
        self._log.close()
        if hparams is not None or metrics is not None:
            self._output.hparams(dict(hparams or {}), dict(metrics or {}))
        self._output.close()

    def text(self, tag: str, markdown: str) -> None:
        """Write a text, such as a verdict."""
        self._output.text(tag, markdown, self.step)

    def __enter__(self) -> Monitor:
        if self._closed:
            raise RuntimeError(
                "watch: monitor must be open where its with block begins, got a closed one. Make another."
            )
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on: the count of steps, and since when units are dead."""
        return {"step": self.step, "every": self._cadence.every, "since": self._log.assembly.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self._cadence.every = state["every"]
        self._log.assembly.ledger.load_state_dict(state["since"])
        self._next()

    # --- the course of a step

    def _listen_to_optimizer(self) -> None:
        wanted = self._optimizer is not None and not self._whole and not self._closed
        if wanted and not self._hooks:
            self._hooks.append(self._optimizer.register_step_pre_hook(self._step_begins))  # type: ignore[union-attr]
            self._hooks.append(self._optimizer.register_step_post_hook(self._step_ended))  # type: ignore[union-attr]
        elif not wanted:
            while self._hooks:
                self._hooks.pop().remove()

    def _step_begins(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A step that calls that of its base class begins twice, and is one: it ends with the inner call.
        self._stepping = args
        closure = args[1:] or kwargs.get("closure")  # which computes the gradients in the step
        if self._recording:
            self._safely(self._parameters.before, optimizer, computes=bool(closure), alone=self.alone)

    def _step_ended(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args is self._stepping:
            self._stepping = None
            self._end(self._safely(self._parameters.after, optimizer) if self._recording else None)

    @torch.no_grad()
    def _end(self, sums: tuple[list[int], Sequence[Tensor]] | None) -> None:
        if sums is not None and not self._changed():
            self._safely(self._record, *sums)
        if self._checks:
            self._check_gradients()
        now = clock()
        self.step += 1
        self._log.arrived(wait=False)
        if not self._probe.compiled and not self._reduce:
            self._cadence.tell(self._recording, now - self._began, clock() - now)
        self._next()
        self._began = clock()

    @property
    def _checks(self) -> bool:
        """Whether the gradients of this step are checked."""
        return self._recording and self._check.due(self.step)

    def _check_gradients(self) -> None:
        """Check them, with nothing attached to the model, and put the errors to the record."""
        began = clock()
        self._probe.detach()
        found = self._check.run(self.step)
        if found is not None:
            facts = {"gradient_errors": found.errors, "gradient_tolerance": found.tolerance}
            self._log.note(self.step, facts)
        self._began += clock() - began  # it was asked for, whatever it costs

    def _arrange(self) -> None:
        """Take down which layers there are."""
        layers = self._measurements.layers
        self._parameters = ParameterSums(layers, self._detail.per_example)
        self._log.assembly = Assembly(layers, self._parameters.rows)
        self.unknown = {layer.name: layer.unknown for layer in layers if layer.unknown}

    def _connect(self) -> None:
        probe, losses = self._probe, self._losses
        probe.anew, probe.answers, probe.failed = self._anew, self._backward_begins, self._failed
        if losses.name is None and self._detail.units:
            probe.returned = losses.compared

    def _changed(self) -> bool:
        """Whether modules or parameters were added, removed or replaced since they were taken down."""
        return self._make is not None and not self._explicit and self._structure.changed()

    def _rearrange(self) -> None:
        """Begin anew with the layers that there are now."""
        self._log.all()
        self._structure.note()  # if it has no layers now, the former ones are watched on
        made = self._safely(self._make)  # type: ignore[arg-type]
        if made is None:
            return
        self._probe.detach()
        since = self._log.assembly.ledger.state_dict()
        self._measurements, self._probe = made
        self._arrange()
        self._log.assembly.ledger.load_state_dict(since)
        self._connect()

    def _next(self) -> None:
        """Listen to the next step, or do not."""
        wanted = self._cadence.records(self.step) or self._check.due(self.step)
        self._recording = self._losses.wanted = not self._closed and wanted
        if self._recording and self._changed():
            self._rearrange()
        self._measurements.begin()
        self._probe.forget()
        self._losses.forget()
        if self._explicit or not self._checks:
            self._check.detach()
        if self._explicit:
            return
        if self._checks:
            self._check.attach()
        if self._recording or self._probe.compiled:
            self._probe.attach()
        else:
            self._probe.detach()

    def _anew(self) -> None:
        """The last step was skipped: what it left is no part of this one."""
        self._measurements.begin()
        self._told.drop()

    def _backward_begins(self) -> None:
        if self.step and not self._explicit and (carried := self._parameters.carried(self._optimizer)) is not None:
            self._told.carried(carried)

    def _safely(self, call: Callable[..., Any], *args: Any, what: str = _UNREAD, **keywords: Any) -> Any:
        """What a call returns; None if it has failed, which is said once, and no reason to stop a training."""
        try:
            return call(*args, **keywords)
        except Exception as error:
            self._failed(error, what)
            return None

    def _failed(self, error: Exception, what: str = _UNREAD) -> None:
        if what not in self._said:
            self._said.add(what)
            _logger.warning(
                "watch: at step %d %s; training goes on, and further ones are tried. %s: %s",
                self.step,
                what,
                type(error).__name__,
                error,
                exc_info=error,
            )

    @torch.no_grad()
    def _record(self, rows: list[int], sums: Sequence[Tensor], refused: bool = False) -> None:
        probe, measurements = self._probe, self._measurements
        probe.finish()
        measurements.keep_examples(probe.batch)
        named = signals(measurements, self._reduce)
        if rows:
            named |= dict(zip(COLUMNS, sums))
        named |= self._told.take(self._parameters.added_to())
        facts: dict[str, Any] = {
            "rows": rows,
            "refused": refused or None,
            "updated": not refused
            and self._optimizer is not None
            and "_applied_in_backward" not in vars(self._optimizer),
            "idle": 0.0 if self.alone else None,  # what the optimizer has changed of layers that it does not have
            "answered": probe.answered,
            "compiled": probe.compiled,
            "loss_function": self._losses.name,
            "looked at": list(measurements.not_finite),
            "order": tuple(probe.order),
            "epoch": self.epoch,
        }
        facts["unused"], facts["frozen"] = self._parameters.without_gradient()
        facts["batch"] = probe.batch or None
        # each process takes a mean over its own examples
        facts["mean over"] = (1 / distributed.get_world_size() if self._reduce else 1) if self._mean else None
        facts["examples"] = list(measurements.examples)
        facts["widths"] = dict(probe.widths)
        facts["seconds"], facts["share"] = self._cadence.seconds, self._cadence.share
        if self._optimizer is not None:
            rates = [group["lr"] for group in self._optimizer.param_groups]
            if any(isinstance(rate, Tensor) for rate in rates):  # which may be on a device
                named["lr"] = torch.stack([torch.as_tensor(rate, dtype=torch.float64).reshape(()) for rate in rates])
            else:
                facts["lr"] = tuple(map(float, rates))
        record = Record(self.step, facts)
        record.take(named)
        self._log.add(record)
