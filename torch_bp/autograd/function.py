"""The base of every hand-written derivative: `torch.autograd.Function` with four things settled once.

- `apply` goes straight to the C++ engine where no functorch transform is active; torch's own binds the signature anew
  at every call, which costs more than a small layer's arithmetic.
- `generate_vmap_rule = True`: `vmap`, `jacrev`, `hessian` work, since forward, backward and jvp are torch operations.
- A `jvp` defined in the class body serves forward mode, and `torch.compile(fullgraph=True)` works all the same.
  Dynamo refuses a Function that overrides `jvp`, so the method moves to a twin class that only eager code meets.
- `casting` states what autocast does to the arguments. `torch.amp.custom_fwd` cannot be used with `setup_context`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch._C._functorch import TransformType
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

_transforms_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_unwrap = torch._C._functorch.unwrap_if_dead  # a tensor that escaped from a transform that has ended
_Tensor = torch.Tensor
_grad_enabled = torch.is_grad_enabled
tapes: dict[int, Any] = {}  # that are open, by thread (`torch_bp.autograd.tape`)
_thread = threading.get_ident


def in_parts() -> bool:
    """True while somebody wants to see the parts of what otherwise runs as one node: a tape that keeps everything."""
    return bool(tapes) and getattr(tapes.get(_thread()), "whole", False)


class Function(torch.autograd.Function):
    """As `torch.autograd.Function` with a separate `setup_context`; call it with `apply(*args)`.

    A subclass defines static methods `forward(*args)`, `setup_context(ctx, inputs, output)`, `backward(ctx, *grads)`
    and, for forward mode, `jvp(ctx, *tangents)`. Arguments are positional, defaults are not filled in.

    Example:
        >>> import torch
        >>> from torch_bp.autograd import Function
        >>> class Square(Function):
        ...     @staticmethod
        ...     def forward(x):
        ...         return x * x
        ...     @staticmethod
        ...     def setup_context(ctx, inputs, output):
        ...         ctx.save_for_backward(*inputs)
        ...     @staticmethod
        ...     def backward(ctx, dy):
        ...         (x,) = ctx.saved_tensors
        ...         return 2 * x * dy
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> Square.apply(x).backward()
        >>> x.grad
        tensor(6.)
    """

    generate_vmap_rule = True
    # For people: forward, and backward in one line, or one for each of the first arguments, after what all need.
    equations: ClassVar[tuple[str, str | tuple[str, ...]]] = ("", "")
    needed_first: ClassVar[str] = ""
    _jvp: Callable[..., Any] | None = None
    _eager: type[Function]
    _apply: Callable[..., Any]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "_eager" in cls.__dict__:  # the twin itself
            return
        if "jvp" in cls.__dict__:
            cls._jvp = cls.__dict__["jvp"]
            del cls.jvp
        cls._eager = cls
        if cls._jvp is not None:
            body = {"jvp": cls._jvp, "_eager": None, "__module__": cls.__module__, "__doc__": cls.__doc__}
            cls._eager = type(cls)(cls.__name__, (cls,), body)  # type: ignore[misc]
        cls._apply = super(torch.autograd.Function, cls._eager).apply  # type: ignore[misc]

    @classmethod
    def rename(cls, name: str) -> None:
        """Let the node in the graph be called `name` in CamelCase + "Backward", and the class so too."""
        camel = "".join(part.capitalize() for part in name.split("_"))
        for twin in {cls, cls._eager}:
            twin.__name__ = twin.__qualname__ = camel
            twin._backward_cls.__name__ = camel + "Backward"  # type: ignore[attr-defined]

    @classmethod
    def name_arguments(cls, *names: str) -> None:
        """State the arguments of a `forward` that takes any number of them: Dynamo counts them to know its way."""
        named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
        cls.forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run forward, recorded for backward. Dynamo knows this method by name and never enters it."""
        if tapes and (tape := tapes.get(_thread())) is not None:
            return tape.apply(cls, args)
        if _transforms_active():
            if forward_over_forward():
                return cls.forward(*args)
            return custom_function_call(cls._eager, *args)
        if _tracing() is not None:  # torch.jit cannot save a call to Python: it records the forward's operations
            return cls.forward(*args)
        for argument in args:
            if isinstance(argument, _Tensor) and _unwrap(argument) is not argument:
                return cls._apply(*[_unwrap(a) if isinstance(a, _Tensor) else a for a in args])
        return cls._apply(*args)


class _Constant(Function):
    """A value that does not change with x, and is a function of x all the same."""

    @staticmethod
    def forward(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return d, torch.zeros_like(ctx.saved_tensors[0])


def connected(derivative: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a derivative that can be differentiated with respect to x, also where it does not change with x.

    The slope of a ReLU is constant almost everywhere: its derivative is 0, as torch has it, and not an error.
    """
    if not _grad_enabled() or torch.compiler.is_dynamo_compiling() or _transforms_active():
        return derivative
    if derivative.requires_grad or not x.requires_grad:
        return derivative
    return _Constant.apply(derivative, x)


def overridden() -> bool:
    """True unless a tape is open here, which sees the Functions themselves: torch's modes need not be asked."""
    return not tapes or _thread() not in tapes


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """Save inputs and outputs for backward and, where somebody may ask for it, for jvp. Call it in `setup_context`."""
    ctx.save_for_backward(*tensors)
    if _transforms_active() or forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


def transformed() -> bool:
    """True inside a functorch transform."""
    return _transforms_active()


def tangents_possible() -> bool:
    """True where jvp may be called: inside a level of forward mode or a transform."""
    return _transforms_active() or forward_ad._current_level >= 0


def recomputing() -> bool:
    """True inside a backward: what runs forward there, activation checkpointing, has run forward before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def forward_over_forward() -> bool:
    """True inside two forward-mode transforms (`jacfwd(jacfwd(f))`).

    A custom jvp is not differentiated again there: functorch would return zeros without a word. The forward itself is
    made of torch operations, which are.
    """
    if torch.compiler.is_compiling():  # Dynamo cannot trace the question
        return False
    return [level.key() for level in retrieve_all_functorch_interpreters()].count(TransformType.Jvp) > 1


def under_autocast(tensor: Any) -> bool:
    """True if autocast is on for the device of `tensor`."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(tensor.device.type)


def cast_apply(function: type[torch.autograd.Function], to: torch.dtype | None, *args: Any) -> Any:
    """Apply `function` under autocast: cast the floating-point tensors among `args`, then switch autocast off inside.

    Args:
        function: what to apply.
        to: the dtype to cast to, or None for autocast's own lower-precision dtype. As in torch, float64 is left alone.
        *args: the arguments of `function.forward`; the first is a tensor.
    """
    device = args[0].device.type
    dtype = torch.get_autocast_dtype(device) if to is None else to
    args = tuple(_cast(a, dtype, device) for a in args)
    with torch.autocast(device, enabled=False):
        return function.apply(*args)


def _cast(value: Any, dtype: torch.dtype, device: str) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    if value.dtype is torch.float64 or value.device.type != device:
        return value
    tape = tapes.get(_thread()) if tapes else None
    copy = None if tape is None or tape.copies is None else tape.copies.find(value, dtype)
    return value.to(dtype) if copy is None else tape.cast(value, copy)  # type: ignore[union-attr]
