"""How layers are listened to while autograd runs: nothing is attached but in the steps that are recorded.

*Eager.* Forward hooks on modules, and `Tensor.register_hook` on what they return, which leaves in-place activations
alone, where full backward hooks break them. A tensor that needs no gradient gets no hook, so that a frozen part stays
out of the backward. Fused nodes of torch_bp take themselves apart where their modules have hooks.

*Compiled.* Hooks that come and go would compile anew, and those that are traced may not keep anything in Python. So
they stay, and write into a buffer by an operation that says so (`mutates_args`), in the forward directly and in the
backward through a node that passes the gradient on. Each step is recorded; when to read is the recorder's business.
(The alternative, statistics as the gradient of a leaf, drags frozen layers into the backward.)

A forward inside of a backward is that of a checkpoint. What has run before is then not counted twice; if it ran
without gradients, as `use_reentrant=True` has it, it is counted there. A forward without gradients is an evaluation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_bp.autograd import function as functions
from torch_bp.diagnostics import quantities
from torch_bp.diagnostics.hook import Hook
from torch_bp.diagnostics.layer import ACTIVATIONS, PASSING, Layer, is_norm, linked, tensor_in
from torch_bp.diagnostics.measurements import AFTER, BACKWARD, BEFORE, FORWARD, KINDS, Measurements

_in_backward = torch._C._current_graph_task_id


class EagerProbe:
    """Listens to the layers of a model between `attach` and `detach`.

    Args:
        model: runs eagerly.
        measurements: of its layers.
    """

    compiled = False

    def __init__(self, model: nn.Module, measurements: Measurements) -> None:
        self.measurements: Any = measurements
        self._model = model
        self._tape: Any = None  # that is open while a hook runs
        self.anew: Callable[[], None] = measurements.begin  # called where a step begins that no optimizer's step ended
        self._params = [p for layer in measurements.layers for p in layer.params]
        self.answered = False  # an error signal has come
        self.answers: Callable[[], None] = lambda: None  # called before the first of a step
        self.failed: Callable[[Exception], None] | None = None  # told of what has gone wrong, which is not raised then
        self.returned: Callable[[Tensor], None] | None = None  # told of what the model has returned
        layers = {id(layer.module): layer for layer in measurements.layers}
        self.order: list[Layer] = []  # in which they have run
        self.widths: dict[int, int] = {}
        self._hooks: list[Any] = []
        self._seen: set[int] = set()
        self._layers = [
            (layer.module, partial(self._layer_ran, layer), partial(self._in_order, layer))
            for layer in measurements.layers
        ]
        others = [m for m in model.modules() if id(m) not in layers]
        self._between = [m for m in model.modules() if isinstance(m, PASSING)]
        self._activations = [m for m in others if isinstance(m, ACTIVATIONS)]
        self.batch = 0
        # The layer whose activation has not been seen yet: it, its input, its output, and what that has become.
        self._open: tuple[Layer, Tensor | None, Tensor] | None = None
        self._tail: Tensor | None = None

    def attach(self, model: nn.Module | None = None) -> None:
        """Listen from now on; `model` is called in the place of the whole one."""
        if self._hooks:
            return
        add, model = self._hooks.append, model or self._model
        add(model.register_forward_pre_hook(Hook(partial(self._runs, self._model_runs)), with_kwargs=True))
        if self.returned is not None:
            add(model.register_forward_hook(Hook(partial(self._runs, self._model_ran))))
        for module in self._activations:
            add(module.register_forward_hook(Hook(partial(self._runs, self._activation_ran))))
        for module, hook, order in self._layers:
            add(module.register_forward_hook(Hook(partial(self._runs, hook, without=order))))
        for module in self._between:
            add(module.register_forward_hook(Hook(partial(self._runs, self._passed))))

    def _runs(self, hook: Callable[..., None], *args: Any, without: Callable[..., None] | None = None) -> None:
        """Call a hook of a module; what it does is no part of the pass, for a tape either.

        Args:
            hook: called where there is a graph, or a tape.
            args: of the hook.
            without: called in its place in a forward without gradients.
        """
        if not self._recorded():
            if without is not None and not torch._C._are_functorch_transforms_active():
                self._safely(without, *args)
            return
        tape = functions.tapes.get(threading.get_ident()) if functions.tapes else None
        if tape is None:
            self._safely(hook, *args)
            return
        self._tape = tape
        try:
            with tape.aside():
                self._safely(hook, *args)
        finally:
            self._tape = None

    def _when_signalled(self, tensor: Tensor, hook: Callable[..., None], *args: Any) -> None:
        """Call a hook with the gradient at a tensor, when it comes."""
        if self._tape is not None:
            self._tape.observe(tensor, partial(self._safely, hook, *args))
        elif tensor.requires_grad:
            tensor.register_hook(partial(self._safely, hook, *args))

    def _safely(self, hook: Callable[..., None], *args: Any) -> None:
        """Nothing that goes wrong here is the training's business."""
        try:
            hook(*args)
        except Exception as error:
            if self.failed is None:
                raise
            self.failed(error)

    def detach(self) -> None:
        """Leave no trace on the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.forget()

    def forget(self) -> None:
        """The step is over."""
        self._seen.clear()
        self._open = self._tail = None
        self.answered = False
        self.batch = 0

    def finish(self) -> None:
        """All signals of the step have come: sum those that wait."""
        self._close()
        self.measurements.flush()

    def _recorded(self) -> bool:
        return torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()

    def _model_runs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # After a step that a GradScaler has skipped, gradients have been cleared with nothing between.
        if self._tape is None and self.answered and _in_backward() == -1 and all(p.grad is None for p in self._params):
            self.forget()
            self.anew()
        given = [*args, *kwargs.values()]
        x = tensor_in(given)
        first = x if x is not None else next((a for a in given if isinstance(a, Tensor)), None)
        if first is not None:
            self.batch += first.shape[0] if first.dim() else 1
        if x is not None:
            self.measurements.observe_input(x)

    def _model_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.returned is not None and (found := tensor_in(output)) is not None:
            self.returned(found.detach())

    def _layer_ran(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        again = _in_backward() != -1
        if again and layer.index in self._seen:
            return
        if not again:
            self._seen.add(layer.index)
        between = is_norm(module) and self._open is not None and bool(args) and args[0] is self._tail
        if not between:
            self._close()
        z = tensor_in(output)
        if z is None:
            return
        self._in_order(layer, module, args, z)
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if is_norm(module):
            self.measurements.observe_forward(layer, x, z, z)
        else:
            self._open, self._tail = (layer, x, z), z
        self._when_signalled(z, self._signal_came, layer)

    def _in_order(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note the place of a layer: of a checkpoint whose forward has no graph, it is told by that forward."""
        z = tensor_in(output)
        if z is not None and layer.index not in self.widths:
            self.order.append(layer)
            self.widths[layer.index] = z.shape[layer.unit_dim] if z.dim() > 1 else z.numel()

    def _signal_came(self, layer: Layer, dz: Tensor) -> None:
        if self._open is not None and self._open[0] is layer:
            self._close()
        self._answer()
        self.measurements.observe_backward(layer, dz)

    def _answer(self) -> None:
        if not self.answered:
            self.answered = True
            self.answers()

    def _passed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open is not None and args and args[0] is self._tail and isinstance(output, Tensor):
            self._tail = output
            if is_norm(module):
                self._open[0].norm = module

    def _activation_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open is None or not args or not isinstance(args[0], Tensor):
            return
        if args[0] is not self._tail or not isinstance(output, Tensor):
            return
        layer, x, z = self._open
        layer.activation = module
        before = args[0]
        self._open = None
        self.measurements.observe_forward(layer, x, before, output)
        self._when_signalled(output, self._gradient_came, layer, AFTER)
        if before is not z and before is not output:
            self._when_signalled(before, self._gradient_came, layer, BEFORE)

    def _gradient_came(self, layer: Layer, kind: int, gradient: Tensor) -> None:
        self._answer()
        self.measurements.observe_gradient(layer, kind, gradient)

    def _close(self) -> None:
        """No activation has followed the last layer."""
        if self._open is not None:
            layer, x, z = self._open
            self._open = None
            self.measurements.observe_forward(layer, x, z, z)


@torch.library.custom_op("torch_bp::observe", mutates_args=("values",))
def observe(x: Tensor, values: Tensor, slot: int) -> None:
    """Add the sums of x to a row of the buffer."""
    values[slot, 0] += x.numel()
    values[slot, 1:] += quantities.sums([x])[0].to(values.device)


@observe.register_fake
def _(x: Tensor, values: Tensor, slot: int) -> None:
    return None


class _Observed(torch.autograd.Function):
    """Passes a tensor on, and adds the sums of its gradient to a row of the buffer."""

    @staticmethod
    def forward(x: Tensor, values: Tensor, slot: int) -> Tensor:
        return x.clone()  # a view could not be written to by an in-place activation; the compiler leaves the copy out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.values, ctx.slot = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        observe(gradient, ctx.values, ctx.slot)
        return gradient, None, None


class CompiledProbe:
    """Listens to a model that is compiled, from the start to the end: all that comes and goes would compile anew.

    It measures norms, moments and what is not finite. Layers and activations are taken to follow each other as in their
    `Sequential`.

    Args:
        model: compiled, but not yet run.
        measurements: of its layers.
    """

    compiled = True

    def __init__(self, model: nn.Module, measurements: Measurements) -> None:
        self.measurements, self._model = measurements, model
        linked(model, list(measurements.layers))
        self.order: list[Layer] = list(measurements.layers)
        sizes = ((layer, getattr(layer.module, "out_features", None)) for layer in measurements.layers)
        self.widths = {layer.index: size for layer, size in sizes if size is not None}
        self._hooks: list[Any] = []
        self.batch = 0
        self.answered = False
        self.answers: Callable[[], None] = lambda: None
        self.failed: Callable[[Exception], None] | None = None
        self.returned: Callable[[Tensor], None] | None = None
        self.anew: Callable[[], None] = measurements.begin  # what a skipped step leaves stays, as nobody sees it end

    def attach(self, model: nn.Module | None = None) -> None:
        if self._hooks:
            return
        values = self.measurements.values
        for layer in self.measurements.layers:
            first = KINDS * layer.index
            ends = layer.activation is None
            hook = _listener(values, first + FORWARD if ends else None, first + BACKWARD)
            self._hooks.append(layer.module.register_forward_hook(hook))
            if layer.activation is not None:
                hook = _listener(values, first + FORWARD, first + AFTER)
                self._hooks.append(layer.activation.register_forward_hook(hook))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def forget(self) -> None:
        pass

    def finish(self) -> None:
        pass


def _listener(values: Tensor, forward: int | None, backward: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return None
        if forward is not None:
            observe(output.detach(), values, forward)
        return _Observed.apply(output, values, backward) if output.requires_grad else None

    return hook


Probe = EagerProbe | CompiledProbe
__all__: Sequence[str] = ["CompiledProbe", "EagerProbe", "Probe", "observe"]
