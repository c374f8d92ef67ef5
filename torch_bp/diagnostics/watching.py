"""`watch`: a monitor of any training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from torch_bp.diagnostics.cadence import Cadence
from torch_bp.diagnostics.layer import Which, compiled, device_of, layers_of, unwrapped
from torch_bp.diagnostics.live_check import LiveCheck
from torch_bp.diagnostics.loss import Losses
from torch_bp.diagnostics.measurements import Detail, Measurements
from torch_bp.diagnostics.monitor import Monitor
from torch_bp.diagnostics.probe import CompiledProbe, EagerProbe, Probe
from torch_bp.diagnostics.reading import Reading
from torch_bp.diagnostics.watch_options import WatchOptions
from torch_bp.diagnostics.writers import open_output

_logger = logging.getLogger(__name__)
Level = Literal["summary", "layers", "full"]
_LEVELS: dict[str, Detail] = {
    "summary": Detail(),
    "layers": Detail(units=True),
    "full": Detail(units=True, causes=True, places=True, histograms=True, per_example=True),
}


def watch(
    model: nn.Module | Any,
    optimizer: torch.optim.Optimizer | str | Path | None = None,
    output: str | Path | Any = None,
    *,
    level: Level = "layers",
    every: int = 10,
    budget: float | None = 0.02,
    write_every: int | None = None,
    layers: Which = None,
    loss_fn: nn.Module | None = None,
    scaler: Any = None,
    per_example: bool | None = None,
    histograms: bool | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    reduce: bool | None = None,
    keep: int = 1000,
    tags: Mapping[str, str] | None = None,
    on_reading: Callable[[Reading], None] | None = None,
    diagnose: bool = True,
    silent: bool = False,
    check_every: int | None = None,
) -> Monitor:
    """Watch the training of a model in any loop, at next to no cost, and say what is wrong with it.

    What is found by a reading that is written (`torch_bp.diagnostics.diagnose` has the rules) is logged once, as a
    warning of the logger "torch_bp", written to `output` as a table, and kept in `monitor.findings`.

    With `optimizer` a step is over when `optimizer.step()` is, and a loop needs no other line. What happens between two
    steps belongs to the later one: all micro-batches of an accumulation. Losses come from the calls of `loss_fn`, which
    is listened to, or from `monitor.loss(...)`; those computed without gradients are of the validation set. Watching
    changes no weight and draws no random number. Nothing is attached to the model in steps that are not recorded,
    unless it is compiled: then `watch` it before it first runs, and no level measures more than "summary" of layers.

    Of layers that are not known, such as an `LSTM`, parameters and output are watched, and `monitor.unknown` says so.

    Args:
        model: of any modules; or a `torch_bp.TrainStep`, whose model and optimizer are watched, and whose steps tell
            their losses and clipping by themselves.
        optimizer: whose steps are counted and measured. Default: none, the loop calls `monitor.step_done(loss)`. A
            `TrainStep` has its own, so that the second argument beside it may be the folder: `watch(step, "logs/run")`.
        output: a folder for TensorBoard's events and `readings.jsonl`, or an object with `add_scalar`. Default: none,
            readings are kept in memory.
        level: "summary" for norms and counts of NaN and infinities, "layers" (default) for saturation and dead units
            too, "full" for histograms, norms of single examples, the noise scale and causes of dead units besides.
        every: steps from one record to the next, at least 1.
        budget: largest share of the time, 0.02 for 2 %. If a record costs more, records get rarer, and it is said once.
            None for `every` steps, whatever it costs. Of a compiled model, and of several processes, the cost is not
            measured.
        write_every: write only those records whose step it divides. Default: all.
        layers: the layers to watch, a regular expression that is searched for in the names, or a function of name and
            module. Default: all.
        loss_fn: the module that computes the loss.
        scaler: the `torch.amp.GradScaler` of the loop, without whose factor error signals are reported.
        per_example, histograms: measure them, at any level. Default: as the level has it.
        reduction: "mean" if the loss is a mean over examples, of the batch, or "sum".
        reduce: sum error signals over the processes of `torch.distributed`, each of which must watch. Default: if the
            model is `DistributedDataParallel`.
        keep: readings that are kept in memory.
        tags: other names for tags, as {"loss/train": "train_loss"}.
        on_reading: called with each reading that is written.
        diagnose: look for faults. Default: True. A loss that is not meant to fall, such as those of two networks that
            play against each other, may well be said not to.
        silent: do not log what is found.
        check_every: steps from one gradient check to the next, which compares one directional derivative of each layer
            with a difference of the loss, on the batch of the step: `torch_bp.autograd.directional_check`. Such a step
            is recorded, and takes one forward and backward more, and two forwards for each layer; the budget leaves
            these out. It needs a `loss_fn` that is called with what the model returns, or a `TrainStep`, and runs the
            hooks that others have put on the model's modules. Why there is none is logged. Default: no checks.

    Returns:
        A `Monitor`, to be closed, or used in a `with` statement.

    Raises:
        TypeError, ValueError: an argument is not what it must be. Nothing has been attached then.

    Example:
        >>> from torch_bp import nn, optim
        >>> model, loss_fn = nn.MLP([4, 8, 2]), nn.CrossEntropyLoss()
        >>> optimizer = optim.Adam(model.parameters())
        >>> x, y = torch.randn(16, 4), torch.randint(2, (16,))
        >>> with watch(model, optimizer, loss_fn=loss_fn, every=1, budget=None) as monitor:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         loss_fn(model(x), y).backward()
        ...         optimizer.step()
        >>> [reading.step for reading in monitor.readings], list(monitor.last.layers)
        ([0, 1, 2], ['0', '2'])
    """
    step, model, stepping, output = _parts(model, optimizer, output)
    _check(model, stepping, level, every, budget, write_every, loss_fn, reduction, keep, on_reading)
    if check_every is not None:
        _check_whole("check_every", check_every)
        if compiled(model):
            raise ValueError(
                f"watch: check_every must be None for a compiled model, got {check_every}. Watch the module itself."
            )
    for name, value in (("diagnose", diagnose), ("silent", silent)):
        if not isinstance(value, bool):
            raise TypeError(f"watch: {name} must be True or False, got {value!r}.")
    detail = _LEVELS[level]
    detail = replace(
        detail,
        per_example=detail.per_example if per_example is None else per_example,
        histograms=detail.histograms if histograms is None else histograms,
    )
    reduce = isinstance(model, DistributedDataParallel) if reduce is None else reduce
    if reduce and not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError("watch: reduce must be False where torch.distributed is not initialised, got True.")
    measured = layers_of(model, layers)
    is_compiled = compiled(model)
    leads = not reduce or distributed.get_rank() == 0
    destination = open_output(output if leads else None, dict(tags or {}))
    if is_compiled and detail != Detail():
        _logger.warning(
            "watch: of a compiled model norms, moments and what is not finite are measured, as at level 'summary', got "
            "level %r. Watch a model that is not compiled for more, or say level='summary'.",
            level,
        )
    measurements = Measurements(measured, detail, device_of(model))
    probe: Probe = (CompiledProbe if is_compiled else EagerProbe)(model, measurements)
    losses = Losses(loss_fn, labels=detail.units)
    check = LiveCheck(unwrapped(model), check_every, loss_fn)

    def anew() -> tuple[Measurements, Probe]:
        found = Measurements(layers_of(model, layers), detail, device_of(model))
        return found, EagerProbe(model, found)

    options = WatchOptions(
        scaler=scaler,
        reduction=reduction,
        reduce=reduce,
        write_every=write_every,
        keep=keep,
        on_reading=on_reading,
        diagnose=diagnose,
        silent=silent or not leads,
    )
    cadence = Cadence(every, None if is_compiled or reduce else budget)
    parts = (destination, detail, cadence, losses, measurements, probe, check, None if is_compiled else anew)
    monitor = Monitor(model, stepping, *parts, options)
    if step is not None:
        step.watch = monitor
    return monitor


def _parts(model: Any, optimizer: Any, output: Any) -> tuple[Any, Any, Any, Any]:
    """The TrainStep, None if there is none; model and optimizer, which are its own; and the output."""
    if isinstance(model, nn.Module) or not hasattr(model, "watch"):
        return None, model, optimizer, output
    if isinstance(optimizer, str | Path):
        if output is not None:
            raise TypeError(f"watch: output must be given once, got {optimizer} and {output}. Leave one out.")
        optimizer, output = None, optimizer
    if optimizer is not None:
        raise TypeError("watch: optimizer must be left out where a TrainStep is given, which has its own.")
    return model, model.model, model.optimizer, output


def _check(
    model: Any,
    optimizer: Any,
    level: str,
    every: Any,
    budget: Any,
    write_every: Any,
    loss_fn: Any,
    reduction: str,
    keep: Any,
    on_reading: Any,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch: model must be a torch.nn.Module, got {type(model).__name__}.")
    if optimizer is not None and not (
        isinstance(optimizer, torch.optim.Optimizer) and "param_groups" in vars(optimizer)
    ):
        raise TypeError(
            f"watch: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; a wrapper has it as "
            "`.optimizer`, and a log folder is `output=`."
        )
    if level not in _LEVELS:
        raise ValueError(f"watch: level must be one of {', '.join(map(repr, _LEVELS))}, got {level!r}.")
    for name, value in (("every", every), ("keep", keep), ("write_every", write_every)):
        if value is None and name == "write_every":
            continue
        _check_whole(name, value)
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if budget is not None and not (number and 0 < budget <= 1):
        raise ValueError(
            f"watch: budget must be in (0, 1], a share of the time, got {budget!r}. None sets no limit, 0.02 is 2 %."
        )
    if loss_fn is not None and not isinstance(loss_fn, nn.Module):
        raise TypeError(
            f"watch: loss_fn must be a torch.nn.Module, got {type(loss_fn).__name__}; of a function, tell the loss by "
            "monitor.loss(loss)."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"watch: reduction must be 'mean' or 'sum', got {reduction!r}.")
    if on_reading is not None and not callable(on_reading):
        raise TypeError(f"watch: on_reading must be callable, got {type(on_reading).__name__}.")


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"watch: {name} must be a whole number of 1 or more, got {value!r}.")
