"""Backward without autograd's engine: forward and backward of each `Function`, called one after the other.

While a tape is open, `Function.apply` computes no graph: it runs `forward` and `setup_context` with a context of plain
Python, and notes what it has run. `backward` goes through the notes from last to first, which is Algorithm 1 of the
report: each error signal is handed to the `backward` of the operation that made the tensor. The Functions are the ones
that autograd runs, so there is no second text of any derivative.

What is no Function of ours (views, sums, `cat`, a module of somebody else) can be taken onto the tape by
`through_autograd`, as one entry with a small graph of its own.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from torch_bp.autograd import function as functions


class Context:
    """What `setup_context` and `backward` of a Function see, as of autograd's."""

    explicit = True

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.materialize = True
        self.constant: tuple[Tensor, ...] = ()
        self._saved: tuple[Tensor | None, ...] = ()
        self._versions: tuple[int, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self._saved = tensors
        self._versions = tuple(-1 if t is None else version(t) for t in tensors)

    def save_for_forward(self, *tensors: Tensor | None) -> None:
        pass  # nobody asks for tangents here

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        for tensor, before in zip(self._saved, self._versions):
            if tensor is not None and version(tensor) != before:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"[{tensor.type()} {list(tensor.shape)}] is at version {version(tensor)}; expected version "
                    f"{before} instead."
                )
        return self._saved


def version(tensor: Tensor) -> int:
    """How often the tensor has been written to, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version


class Entry:
    """One operation that has run: what it was, what it left for backward, whose gradients it takes and gives.

    Attributes:
        function: the Function, or the callable that went through autograd.
        inputs, outputs: tensors among the arguments and results, None in other places.
        sources, targets: their numbers on the tape, None for what no gradient is for.
    """

    def __init__(self, function: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.function = function
        self.inputs, self.outputs = inputs, outputs
        self.sources: list[int | None] = []
        self.targets: list[int | None] = []
        self.backward: Callable[..., Any] = lambda *_: None
        self.materialize = True

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


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
        entry = self._note(function, args, several, differentiable)
        entry.materialize = context.materialize

        def backward(*dys: Tensor | None) -> Any:
            return function.backward(context, *dys)  # type: ignore[arg-type]

        entry.backward = backward
        return outputs

    def through_autograd(self, call: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """Run any differentiable callable with a graph of its own, and note it if a gradient goes through it.

        `call` may write to the first argument and to nothing else, if `writes` says so of it.
        """
        if not torch.is_grad_enabled():  # within no_grad, in a forward
            return call(*args, **keywords)
        flat, form = tree_flatten((args, dict(keywords)))
        taken = [k for k, value in enumerate(flat) if self.tracks(value)]
        sources = [flat[k] for k in taken]
        leaves = [t.detach().requires_grad_() for t in sources]
        given = list(flat)
        for k, leaf in zip(taken, leaves):
            given[k] = leaf
        target = args[0] if args and writes(call) else None
        with torch.enable_grad():
            if target is not None:  # autograd refuses writes to a leaf
                self._require_alone(target)
                first = next(k for k, value in enumerate(flat) if value is target)
                given[first] = given[first].clone()
            new_args, new_keywords = tree_unflatten(given, form)
            outputs = call(*new_args, **new_keywords)
            if target is not None:
                outputs = given[first]
        if target is not None:
            with torch.no_grad():
                target.detach().copy_(outputs.detach())
            entry = self._note(call, sources, [target], [outputs.requires_grad])
            entry.backward = _by_graph([outputs], leaves)
            return target
        made, _ = tree_flatten(outputs)
        graph = [t for t in made if isinstance(t, Tensor) and t.requires_grad]
        if not graph:  # an answer, and no tensor that a gradient goes through
            return outputs
        found = {id(t): t.detach() for t in graph}
        entry = self._note(call, sources, list(found.values()), [True] * len(found))
        entry.backward = _by_graph(graph, leaves)
        entry.materialize = False
        return tree_map_only(Tensor, lambda t: found.get(id(t), t), outputs)

    def cast(self, tensor: Tensor, copy: Tensor) -> Tensor:
        """Return what `tensor.to(copy.dtype)` is: `copy` has these numbers already."""
        with torch._C.DisableTorchFunction():
            result = copy.detach()  # a tensor of its own for each who asks, of the same memory
        if self.tracks(tensor) and torch.is_grad_enabled():
            entry = self._note(Tensor.to, [tensor], [result], [True])
            entry.backward = lambda dy: dy.to(tensor.dtype)
        return result

    def _require_alone(self, target: Tensor) -> None:
        storage = target.untyped_storage()._cdata
        if target._is_view() and _holders(target) != _HOLDERS_OF_ONE:
            raise RuntimeError(
                "a view must not be written to in place while a step is traced, since what it is a view of would not "
                "notice; write to the whole, for example out[:, :2] = h instead of out[:, :2].copy_(h), or use cat."
            )
        for other in [reference() for reference in self._there.values()]:
            if other is None or other is target:
                continue
            if other.layout is torch.strided and other.untyped_storage()._cdata == storage:
                raise RuntimeError(
                    "a tensor that shares its memory with another one must not be written to in place while a step "
                    "is traced; write out of place, for example y = y + 1 instead of y += 1."
                )

    def _note(
        self, function: Any, args: Sequence[Any], outputs: Sequence[Any], differentiable: Sequence[bool]
    ) -> Entry:
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
        return tape.through_autograd(call, args, keywords)


_foreign = classmethod(_foreign_apply)


def writes(call: Callable[..., Any]) -> bool:
    """True if a torch function writes to its first argument, by its name: `add_`, `__iadd__`, `__setitem__`."""
    name = getattr(call, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    return name.endswith("_") and name not in ("requires_grad_",)


def _holders(view: Tensor) -> tuple[int, int]:
    """How many hold the memory of a view, and the tensor that it is a view of."""
    base = view._base
    return torch._C._storage_Use_Count(view.untyped_storage()._cdata), sys.getrefcount(base)


_HOLDERS_OF_ONE = _holders(torch.empty(2)[:1])  # a view that is all that is left of a tensor


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _by_graph(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> Callable[..., Any]:
    def backward(*dys: Tensor | None) -> Any:
        pairs = [(t, d) for t, d in zip(outputs, dys) if d is not None]
        return torch.autograd.grad([t for t, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True)

    return backward
