"""Backward without autograd's engine: forward and backward of each `Function`, called one after the other.

While a tape is open, `Function.apply` computes no graph: it runs `forward` and `setup_context` with a context of plain
Python, and notes what it has run. `backward` goes through the notes from last to first, which is Algorithm 1 of the
report: each error signal is handed to the `backward` of the operation that made the tensor. The Functions are the ones
that autograd runs, so there is no second text of any derivative.

What is no Function of ours (views, sums, `cat`, a module of somebody else) can be taken onto the tape as
one entry with a small graph of its own (`torch_bp.autograd.small_graph`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_bp.autograd import function as functions
from torch_bp.autograd.entry import Context, Entry
from torch_bp.autograd.small_graph import through_autograd


class Tape:
    """Notes of a forward pass, and the backward over them; a context manager, for the thread that opens it.

    Args:
        leaves: the tensors that gradients are for.
        noted: called with each entry as it is noted.
        whole: for those who look at everything: entries keep their inputs and outputs, and what runs as one node where
            it can runs in parts. Default: what no backward needs is freed, as by autograd.

    Example:
        >>> import torch
        >>> from torch_bp import ops
        >>> from torch_bp.autograd.tape import Tape
        >>> w = torch.tensor([[3.0]])
        >>> with Tape([w]) as tape:
        ...     y = ops.linear(torch.tensor([[2.0]]), w)
        ...     dw, = tape.backward(y, torch.ones(1, 1))
        >>> dw
        tensor([[2.]])
    """

    def __init__(
        self, leaves: Iterable[Tensor], noted: Callable[[Entry], None] | None = None, whole: bool = False
    ) -> None:
        self.leaves = list(leaves)
        self.whole = whole
        self.copies: Any = None  # of parameters, in the dtype of autocast; `find` gives one
        self.entries: list[Entry] = []
        self._noted = noted
        self._numbers: dict[int, int] = {}
        self._count = 0
        self._observers: dict[int, list[Callable[[Tensor], None]]] = {}
        self._there: dict[int, weakref.ref[Tensor]] = {}  # an address names a tensor while the tensor is there
        for leaf in self.leaves:
            self._track(leaf)
        self._leaf_numbers = [self._numbers[id(leaf)] for leaf in self.leaves]
        self._thread = threading.get_ident()

    def __enter__(self) -> Tape:
        with _lock:
            if self._thread in functions.tapes:
                raise RuntimeError("a tape is open already in this thread; close it first.")
            functions.tapes[self._thread] = self
            torch.autograd.Function.apply = _foreign  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: Any) -> None:
        with _lock:
            functions.tapes.pop(self._thread, None)
            if not functions.tapes:
                torch.autograd.Function.apply = _torchs_apply  # type: ignore[method-assign]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run what is one entry, whatever it is made of, or what the tape is not to note."""
        functions.tapes.pop(self._thread, None)
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                yield
        finally:
            functions.tapes[self._thread] = self

    def tracks(self, value: Any) -> bool:
        """True if a gradient is for this tensor, or for something that it depends on."""
        return id(value) in self._numbers

    def alive(self) -> list[Tensor]:
        """Return the tensors that gradients are for and that are there still."""
        return [tensor for tensor in (reference() for reference in self._there.values()) if tensor is not None]

    def observe(self, tensor: Tensor, function: Callable[[Tensor], None]) -> None:
        """Call a function, in the backward, with the error signal at a tensor once that is complete. It only reads it.

        A tensor that no gradient goes through has none, and nothing is called.
        """
        number = self._numbers.get(id(tensor))
        if number is not None:
            self._observers.setdefault(number, []).append(function)

    def _track(self, tensor: Tensor) -> int:
        self._count += 1
        self._numbers[id(tensor)] = self._count
        self._there[id(tensor)] = weakref.ref(tensor, functools.partial(self._forget, id(tensor)))
        return self._count

    def _forget(self, address: int, _: Any) -> None:
        self._numbers.pop(address, None)
        self._there.pop(address, None)

    def apply(self, function: type[functions.Function], args: tuple[Any, ...]) -> Any:
        """Run a Function, and note it if a gradient goes through it."""
        recording = torch.is_grad_enabled()  # False within no_grad, in a forward
        context = Context(tuple(recording and self.tracks(a) for a in args))
        with self.aside():
            outputs = function.forward(*args)
            if not any(context.needs_input_grad):
                return outputs
            function.setup_context(context, args, outputs)
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        if any(output is a for output in several for a in args if isinstance(output, Tensor)):
            raise RuntimeError(f"{function.__name__}: forward must return new tensors here, got one of its inputs.")
        differentiable = [_differentiable(t) and not any(t is c for c in context.constant) for t in several]
        entry = self.note(function, args, several, differentiable)
        entry.materialize = context.materialize

        def backward(*dys: Tensor | None) -> Any:
            return function.backward(context, *dys)  # type: ignore[arg-type]

        entry.backward = backward
        return outputs

    def cast(self, tensor: Tensor, copy: Tensor) -> Tensor:
        """Return what `tensor.to(copy.dtype)` is: `copy` has these numbers already."""
        with torch._C.DisableTorchFunction():
            result = copy.detach()  # a tensor of its own for each who asks, of the same memory
        if self.tracks(tensor) and torch.is_grad_enabled():
            entry = self.note(Tensor.to, [tensor], [result], [True])
            entry.backward = lambda dy: dy.to(tensor.dtype)
        return result

    def note(self, function: Any, args: Sequence[Any], outputs: Sequence[Any], differentiable: Sequence[bool]) -> Entry:
        """Take down an operation; `differentiable` says of each output if a gradient goes through it."""
        inputs = [a if isinstance(a, Tensor) else None for a in args]
        entry = Entry(function, inputs, outputs)
        entry.sources = [self._numbers.get(id(a)) if isinstance(a, Tensor) else None for a in args]
        entry.targets = [self._track(t) if d else None for t, d in zip(outputs, differentiable)]
        self.entries.append(entry)
        if self._noted is not None:
            self._noted(entry)
        if not self.whole:
            entry.inputs, entry.outputs = (), outputs if len(outputs) > 1 else ()
        return entry

    def backward(
        self, output: Tensor, dy: Tensor, seen: Callable[[Entry, Sequence[Any]], None] | None = None
    ) -> list[Tensor | None]:
        """Return the gradients of the leaves; the notes are used up.

        Args:
            output: a tensor that was made on the tape.
            dy: the error signal there.
            seen: called with each entry and the gradients that its `backward` has returned, None for none.

        Raises:
            RuntimeError: the output depends on no leaf.
        """
        number = self._numbers.get(id(output))
        if number is None:
            raise RuntimeError(
                "element 0 of tensors does not require grad: the loss depends on no parameter that is to be trained, "
                "or was computed by something that is not on the tape."
            )
        with torch.no_grad():
            return self._backward({number: dy}, seen)

    def _backward(
        self, signals: dict[int, Tensor], seen: Callable[[Entry, Sequence[Any]], None] | None
    ) -> list[Tensor | None]:
        while self.entries:
            entry = self.entries.pop()
            dys = [None if n is None else signals.pop(n, None) for n in entry.targets]
            if all(d is None for d in dys):
                continue
            if entry.materialize and any(d is None for d in dys):  # of several outputs
                dys = [
                    torch.zeros_like(t) if d is None and _differentiable(t) else d for d, t in zip(dys, entry.outputs)
                ]
            if self._observers:
                self._tell(entry.targets, dys)
            found = entry.backward(*dys)
            found = found if isinstance(found, tuple | list) else (found,)
            for source, gradient in zip(entry.sources, found):
                if source is not None and gradient is not None:
                    before = signals.get(source)
                    signals[source] = gradient if before is None else before + gradient
            if seen is not None:
                seen(entry, found)
        if self._observers:
            self._tell(self._leaf_numbers, [signals.get(n) for n in self._leaf_numbers])
        return [signals.get(n) for n in self._leaf_numbers]

    def _tell(self, numbers: Sequence[int | None], signals: Sequence[Tensor | None]) -> None:
        for number, signal in zip(numbers, signals):
            if number is not None and signal is not None:
                for function in self._observers.pop(number, ()):
                    function(signal)


_lock = threading.Lock()
_torchs_apply = torch.autograd.Function.__dict__["apply"]


def _foreign_apply(cls: Any, *args: Any, **keywords: Any) -> Any:
    """`apply` of Functions that are not ours, while a tape is open anywhere: one entry, with their own backward."""
    call = _torchs_apply.__get__(None, cls)
    tape = functions.tapes.get(threading.get_ident())
    if tape is None or not any(map(tape.tracks, args)):
        return call(*args, **keywords)
    with torch._C.DisableTorchFunction():
        return through_autograd(tape, call, args, keywords)


_foreign = classmethod(_foreign_apply)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
