"""TrainStep: the report's Algorithm 1 for a model, as one line of operations without autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_bp.optim.copies import Copies
from torch_bp.step.arguments import Inputs, as_inputs, at, check, check_epoch, checked
from torch_bp.step.line import DTYPES, Passes
from torch_bp.step.loss_scale import LossScale
from torch_bp.step.parts import Parts
from torch_bp.step.plan import Plan
from torch_bp.step.record import record
from torch_bp.step.runner import Runner
from torch_bp.step.table import Trace
from torch_bp.step.update import Update
from torch_bp.step.watched import Monitor, name_of, require_monitor
from torch_bp.step.window import Window


class TrainStep:
    """A whole training step: forward, loss, error signals from the last layer to the first, gradients and update.

    The model's own forward runs once, with every operation on a tape; what it did is captured and run again for each
    batch of the same shape, over memory that never moves (`torch_bp.step.program`). Values and gradients are those of
    `loss.backward()`, since the same Functions compute them. Parameters stay the model's, gradients are in `p.grad`,
    and the optimizer's state is its own: checkpoints, schedules, and ordinary training go on from there at any time.

    A captured step does what the model did when it was captured. That modules have been put into evaluation, frozen,
    replaced, or given other attributes (`dropout.p`) is seen, and the step captured anew. What is not seen is what is
    inside of other objects (an element of a list, a configuration, a module in a closure), and numbers that `forward`
    makes on the host, of a clock or a generator of NumPy's: use `capture=False` there, or `reset()` when they change. A
    model with hooks on modules is never captured.

    On CUDA, a batch is held until the device has done its step, since an error that is told of then names what is wrong
    in it: 32 batches, or 256 MB and one batch more, whichever is less. There the host waits.

    Args:
        model: a module. Modules of `torch_bp.nn`, torch's own of the same names, functions of the same names,
            arithmetic, and what moves elements (`cat`, `reshape`, ...) have an explicit backward.
        loss_fn: called with the model's output and the targets: a loss of `torch_bp.nn`, torch's, or a function made
            of such. It returns one number.
        optimizer: holds parameters of the model, any class.
        clip_grad_norm: as `torch.nn.utils.clip_grad_norm_` before every update, > 0. Default: none.
        clip_grad_value: as `torch.nn.utils.clip_grad_value_`, > 0. Default: none.
        accumulate: how many batches make one update, by the mean of their gradients; at least 1.
        capture: "auto" (default): where it can be done. True: raise where it cannot. False: run the model's Python at
            every step, for debugging.
        fallback: "error" (default), or "autograd", which lets autograd do, inside the step, what has no explicit
            backward.
        keep_output: let `output` give what the model returned, for metrics. Default: False.
        precision: "bf16": products in bfloat16, as under `torch.autocast`, while parameters, gradients and the
            optimizer stay in float32; an optimizer of torch_bp writes the copies that the products read as it
            updates. "fp16": the same in float16, with a loss scale that finds its size as `torch.amp.GradScaler`'s
            does: a step whose gradients overflow is left out, without an error, and the scale halved. Default: None,
            the precision of the model, which may be float64.
        watch: a monitor, as `torch_bp.watch` returns for this model and optimizer, which then reads these steps. Those
            that it records are captured apart, as they keep what it measures; nor does the host wait for them. A batch
            that is refused, as it is not finite, is read too, on CUDA if its step was recorded. Default: none; it can
            be set, also by `torch_bp.watch(step)`.

    Raises:
        TypeError, ValueError: an argument is none of these, or the optimizer holds no parameter of the model.

    Example:
        >>> import torch
        >>> import torch_bp
        >>> from torch_bp import nn, optim
        >>> model = nn.MLP([4, 8, 3])
        >>> step = torch_bp.TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
        >>> x, y = torch.zeros(5, 4), torch.tensor([0, 1, 2, 0, 0])
        >>> before, after = step(x, y), step(x, y)
        >>> bool(after < before)
        True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        accumulate: int = 1,
        capture: bool | str = "auto",
        fallback: str = "error",
        keep_output: bool = False,
        precision: str | None = None,
        watch: Monitor | None = None,
    ) -> None:
        check(model, loss_fn, optimizer)
        fixed = {"fallback": fallback, "keep_output": keep_output, "precision": precision}
        self._fixed = {name: checked(name, value) for name, value in fixed.items()}
        self.model, self.loss_fn, self._optimizer = model, loss_fn, optimizer
        self._loss_scale = LossScale() if precision == "fp16" else None
        self._passes = Passes(model, loss_fn, fallback == "autograd", keep_output, precision)
        self._keep_output = keep_output
        if precision is not None:
            self._passes.copies = Copies(DTYPES[precision])
            self._passes.copies.attach(optimizer)
        self._modules = [m for m in (model, loss_fn) if isinstance(m, torch.nn.Module)]
        self._update = Update(optimizer, None, None)
        parts = Parts(self._passes, self._modules, self._parameters, self._update, self._loss_scale)
        self._runner = Runner(parts)
        self._window = Window(parts, self._runner)
        self.clip_grad_norm, self.clip_grad_value = clip_grad_norm, clip_grad_value
        self.accumulate, self.capture = accumulate, capture
        self.watch = watch

    def __repr__(self) -> str:
        usual = TrainStep.__init__.__kwdefaults__ or {}
        given = self._options()
        options = [f"{name}={given[name]!r}" for name in usual if name in given and given[name] != usual[name]]
        made = type(self.model).__name__, name_of(self.loss_fn), type(self.optimizer).__name__
        return f"TrainStep({', '.join([*made, *options])}, steps={self.steps})"

    def state_dict(self) -> dict[str, Any]:
        """Return what a step knows that neither model nor optimizer do: how many there were, and the loss scale."""
        return {"steps": self.steps, "loss_scale": None if self._loss_scale is None else self._loss_scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` has returned."""
        self.steps = state["steps"]
        if self._loss_scale is not None and state["loss_scale"] is not None:
            self._loss_scale.load_state_dict(state["loss_scale"])

    def _options(self) -> dict[str, Any]:
        settable = "clip_grad_norm", "clip_grad_value", "accumulate", "capture"
        return self._fixed | {name: getattr(self, name) for name in settable}

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of: buffers and what was captured belong to this object alone."""
        made = (self.model, self.loss_fn, self.optimizer)
        return {"made": made, "arguments": self._options(), "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["made"], **state["arguments"])  # type: ignore[misc]  # a monitor is of the original alone
        self.load_state_dict(state["state"])

    def __call__(self, x: Any, y: Any) -> Tensor:
        """Do one step on a batch.

        Args:
            x: what the model is called with, a tuple for several arguments.
            y: the targets, a tuple for several arguments of the loss.

        Returns:
            The loss (), in memory of its own.

        Raises:
            FloatingPointError: the loss or a gradient is NaN or infinite. Parameters, optimizer and running statistics
                are as they were before the batch; gradients of a window of batches are dropped, and a new one begins.
            ValueError: an input requires a gradient, which would be none here.
        """
        return self._window.one(as_inputs(x, y)).clone()

    def backward(self, x: Any, y: Any, scale: float = 1.0) -> Tensor:
        """Do everything but the update, as `loss.backward()`: gradients are added to those in `p.grad`.

        They are in memory of their own; those that a call leaves there are the step's, and the next overwrites them.

        Args:
            x, y: as of a call.
            scale: multiplies the gradients. With `precision="fp16"` they are scaled by nothing else here.

        Returns:
            The loss (), in memory of its own.
        """
        if self._loss_scale is not None and self._window.waiting:
            raise RuntimeError(
                f"TrainStep.backward: a window must not be open with precision='fp16', whose gradients are scaled, got "
                f"{self._window.waiting} of {self.accumulate} batches; finish it, or call update() or drop()."
            )
        add = any(p.grad is not None for p in self._parameters())
        self._window.by_hand = True
        self._window.raise_found()
        if self.watch is not None:  # updates may be the optimizer's own
            self.watch.follow(name_of(self.loss_fn), whole=False)
        ran = self._window.ran = self._runner.run(as_inputs(x, y), add, scale, own=True)
        return ran.loss.clone()

    def many(self, xs: Any, ys: Any) -> Tensor:
        """Do a step on each batch along the first dimension.

        Args:
            xs, ys: as of a call, each tensor with one dimension more, all of one length K: `torch.stack` makes them of
                a list of batches.

        Returns:
            The losses (K).
        """
        tensors = [t for t in tree_leaves((xs, ys)) if isinstance(t, Tensor)]
        lengths = {t.shape[0] if t.dim() else -1 for t in tensors}
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError(
                f"TrainStep.many: xs and ys must have the same number of batches in their first dimension, got "
                f"{', '.join(str(tuple(t.shape)) for t in tensors)}."
            )
        return self._all(as_inputs(*at((xs, ys), k)) for k in range(lengths.pop()))

    def epoch(
        self,
        tensors: Sequence[Tensor],
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> Tensor:
        """Do a step on every batch of a data set that is in memory.

        Args:
            tensors: inputs and targets, as of `torch.utils.data.TensorDataset`, all of one length; the last one is
                the targets.
            batch_size: at least 1.
            generator: of the permutation. Default: torch's.
            shuffle: draw a new order. Default: True.
            drop_last: leave out a last batch that is smaller. Default: False.

        Returns:
            The losses, one for each batch.
        """
        check_epoch(tensors, batch_size)
        *inputs, targets = tensors
        length = len(targets)
        drawn_on = None if generator is None else generator.device
        order = torch.randperm(length, generator=generator, device=drawn_on) if shuffle else torch.arange(length)
        if targets.is_cuda and order.is_cpu:  # once, and without waiting
            order = order.pin_memory().to(targets.device, non_blocking=True)
        parts = [part for part in order.split(batch_size) if len(part) == batch_size or (len(part) and not drop_last)]
        return self._all((tuple(t[part] for t in inputs), (targets[part],)) for part in parts)

    def update(self) -> None:
        """Clip the gradients that are in `p.grad` and let the optimizer step.

        After `backward`, and for a window that is not full, the last one of an epoch: each of its batches counts for
        1 / accumulate, as in any window. Without gradients, nothing happens.
        """
        if any(p.grad is not None for p in self._parameters()) and (self._window.waiting or self._window.by_hand):
            self._window.finish(None)

    def check(self) -> None:
        """Wait for the steps that a device is still at, and raise what they have found.

        On the CPU a step raises by itself. On CUDA it does so when the next ones look, without waiting: at the end of
        training, and before a checkpoint, nothing comes after.

        Raises:
            FloatingPointError: as of a call.
        """
        self._window.raise_found(wait=True)

    def trace(self, x: Any, y: Any, *, check: bool = False) -> Trace:
        """Return the table of Algorithm 1 for a batch: what every operation gives, and the error signals; no update.

        Parameters, `p.grad`, buffers, random numbers and what was captured are afterwards as before. All values and
        error signals are kept, as copies, for as long as the table is.

        Args:
            x, y: as of a call.
            check: compare the gradients with autograd and with central differences. Default: False.

        Raises:
            UnknownBackwardError, TypeError, ValueError: as of a call.
        """
        return record(self._passes, self._modules, as_inputs(x, y), check)

    def drop(self) -> None:
        """Forget the gradients of a window that is not full, and those in `p.grad`; a new window begins."""
        self._window.drop()

    def reset(self) -> None:
        """Forget what was captured; the next step is captured anew."""
        self._runner.reset()

    @property
    def watch(self) -> Monitor | None:
        """As given; it can be set."""
        return self._update.monitor

    @watch.setter
    def watch(self, monitor: Monitor | None) -> None:
        if monitor is not None:
            require_monitor(monitor, self.model, self.optimizer)
            monitor.follow(name_of(self.loss_fn), whole=True)
        self._update.monitor = monitor
        self.reset()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """As given; for another one, make another step."""
        return self._optimizer

    @property
    def steps(self) -> int:
        """Updates so far, but for those that a device was found not to have taken; it can be set."""
        return self._window.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._window.steps = value

    @property
    def accumulate(self) -> int:
        """As given; it can be set."""
        return self._window.accumulate

    @accumulate.setter
    def accumulate(self, value: int) -> None:
        self._window.accumulate = checked("accumulate", value)

    @property
    def capture(self) -> bool | str:
        """As given; it can be set."""
        return self._runner.capture

    @capture.setter
    def capture(self, value: bool | str) -> None:
        self._runner.capture = checked("capture", value)

    @property
    def clip_grad_norm(self) -> float | None:
        """As given; it can be set."""
        return self._update.max_norm

    @clip_grad_norm.setter
    def clip_grad_norm(self, value: float | None) -> None:
        self._update.max_norm = checked("clip_grad_norm", value)

    @property
    def clip_grad_value(self) -> float | None:
        """As given; it can be set."""
        return self._update.max_value

    @clip_grad_value.setter
    def clip_grad_value(self, value: float | None) -> None:
        self._update.max_value = checked("clip_grad_value", value)

    @property
    def plan(self) -> Plan:
        """What the last step did; `print` it. RuntimeError before the first."""
        if self._window.ran is None:
            raise RuntimeError("TrainStep.plan: a plan is made for a batch, and none was seen; do a step first.")
        return self._window.ran.plan

    def memory(self) -> dict[str, int]:
        """Bytes of what the step owns: "buffers", and of these "gradients"."""
        lines = self._runner.lines
        gradients = {g.data_ptr(): g.numel() * g.element_size() for line in lines for g in line.gradients}
        return {"buffers": sum(line.bytes for line in lines), "gradients": sum(gradients.values())}

    @property
    def output(self) -> Any:
        """What the model returned in the last step, in memory of its own; None before the first.

        Raises:
            RuntimeError: without `keep_output=True`.
        """
        if not self._keep_output:
            raise RuntimeError("TrainStep.output: it must be kept; make the step with keep_output=True.")
        output = None if self._window.ran is None else self._window.ran.output
        return tree_map_only(Tensor, lambda t: t.detach().clone(), output)

    def _parameters(self) -> list[Tensor]:
        unique = dict.fromkeys(p for module in self._modules for p in module.parameters())
        # What is in a function around the loss, say, is the optimizer's alone.
        unique |= dict.fromkeys(p for group in self.optimizer.param_groups for p in group["params"])
        return [p for p in unique if p.requires_grad]

    def _all(self, batches: Iterator[Inputs]) -> Tensor:
        losses = []
        try:
            for inputs in batches:
                losses.append(self._window.one(inputs).clone())
                # From here to the next batch, nobody but the optimizer writes to parameters.
                self._runner.trusting = not _observed(self.optimizer)
        finally:
            self._runner.trusting = False
        return torch.stack(losses) if losses else torch.empty(0)


def _observed(optimizer: Any) -> bool:
    """True if somebody is called in the optimizer's step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
