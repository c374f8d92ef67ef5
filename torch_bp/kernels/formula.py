"""A formula: a function of plain arithmetic that runs as torch operations, as a Numba kernel or as a Triton kernel.

The function is the only text of its mathematics. Torch runs it as it is: the reference, right for every tensor there
is. Where the tensors are plain memory and nobody watches the operations, a kernel made from a trace of the same
function runs instead: one pass over memory, on the CPU by Numba, on CUDA by Triton.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from torch_bp.kernels import bound, capture, engine, plain
from torch_bp.kernels.expression import trace
from torch_bp.kernels.number import is_number, numbers, outer_numbers, why_no_number
from torch_bp.kernels.plain import PLAIN_TYPES, grad_enabled, unwatched
from torch_bp.kernels.program import PLAIN_NUMBERS, Program, alone, as_torch, presence
from torch_bp.kernels.sequence import Record
from torch_bp.kernels.table import Table

_MISSING: Any = object()
_strided = torch.strided
_is_compiling = torch.compiler.is_dynamo_compiling


def _may_write(tensors: Sequence[torch.Tensor | None], addresses: Sequence[int]) -> bool:
    """True if writing to some of these is safe and allowed (torch refuses, with its own words, what is not)."""
    present = [t for t in tensors if t is not None]
    size = present[0].numel() * present[0].element_size()
    return plain.disjoint([(start, size, 0, True) for start in addresses]) and (
        torch.is_inference_mode_enabled() or not any(t.is_inference() for t in present)
    )


class Formula:
    """What `@formula` makes of a function; call it like the function.

    Attributes:
        tensors: names of the positional arguments, all tensors of one shape.
        scalars: names of the keyword-only arguments that are numbers or one-element tensors.
        static: names of the keyword-only arguments that are fixed while tracing.
        updates: names of the tensors that the results are written to; empty if the results are new tensors.
        lent: those of `updates` that a kept table must not keep alive. None, unless set before the first call.
        outer: readers of the numbers in its closure and module that a kernel has as they are.
        defaults: values of the keyword-only arguments that a call may leave out.
    """

    lent: tuple[str, ...] = ()

    def __init__(self, function: Callable[..., Any], updates: Sequence[str] = (), static: Iterable[str] = ()) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = function.__name__.strip("<>")
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(f"formula {self.name}: arguments must be named one by one, got {parameter}.")
        positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        self.tensors = tuple(p.name for p in positional)
        self._required = sum(p.default is not None for p in positional)
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        self.static = tuple(static)
        self.scalars = tuple(p.name for p in keywords if p.name not in self.static)
        self.updates = tuple(updates)
        self.defaults = {p.name: p.default for p in keywords if p.default is not p.empty}
        self._programs: dict[Any, Program | None] = {}
        self.outer = outer_numbers(function)
        self._by_tensors = not (self.static or self.outer or self.updates)  # they alone choose the kernel
        self.check_names("updates", self.updates, self.tensors)
        self.check_names("static", self.static, [p.name for p in keywords])
        if not self.tensors:
            raise TypeError(f"formula {self.name}: it must have a positional argument, the tensor it computes with.")

    def check_names(self, kind: str, names: Sequence[str], allowed: Sequence[str]) -> None:
        """Refuse an option of the decorator that names no argument."""
        unknown = [n for n in names if n not in allowed]
        if unknown:
            raise TypeError(
                f"formula {self.name}: {kind} must name arguments of the function ({', '.join(allowed)}), "
                f"got {', '.join(map(repr, unknown))}."
            )

    def __repr__(self) -> str:
        return f"<formula {self.name}({', '.join(self.tensors)}; {', '.join((*self.scalars, *self.static))})>"

    def __call__(self, *tensors: Any, **keywords: Any) -> Any:
        """Compute the formula on tensors; return its results, or write them where `updates` says and return None."""
        if len(tensors) < len(self.tensors):
            tensors = self.padded(tensors)
        try:
            result = self.by_kernel(tensors, keywords)
            if result is NotImplemented and (recorder := capture.recorder()) is not None:
                result = recorder.formula(self, tensors, keywords)
            if result is NotImplemented:
                self._check(tensors)
                return as_torch(self.function, self.updates, self.tensors, tensors, keywords)
            return result
        except (TypeError, ValueError) as error:
            self._explain(keywords, error)
            raise

    def _explain(self, keywords: Mapping[str, Any], error: Exception) -> None:
        """Raise what is wrong with keywords that are no numbers, once a call has failed."""
        for name in self.scalars:
            value = keywords.get(name, 0)
            if not is_number(value):
                several = "give each of its numbers a keyword of its own, or " * isinstance(value, tuple | list)
                raise TypeError(
                    f"formula {self.name}: {name} must be a number or a one-element tensor, got "
                    f"{why_no_number(value)}; {several}name it in @formula(static=...) if it is a choice."
                ) from error

    def _check(self, tensors: Sequence[Any]) -> None:
        """Refuse shapes that torch would take for others; a kernel has looked at its own."""

    def by_kernel(self, tensors: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """What the call returns where a kernel serves, else NotImplemented, and nothing was done.

        In one piece: around small tensors every call of Python's costs as much as the arithmetic.
        """
        if len(tensors) != len(self.tensors) or not unwatched():
            return NotImplemented
        first: Any = None
        handles, present = [], 0  # a bit for each tensor that is there
        for tensor in tensors:
            present += present
            if tensor is None:
                continue
            if type(tensor) not in PLAIN_TYPES or tensor.layout is not _strided or tensor.is_neg() or tensor.is_nested:
                return NotImplemented
            if first is None:
                first = tensor
            present += 1
            handles.append(tensor._cdata)
        if first is None or (grad_enabled() and plain.recording(tensors)):
            return NotImplemented
        program, read = _MISSING, keywords
        if keywords and not PLAIN_NUMBERS.issuperset(map(type, keywords.values())):
            if not numbers(keywords.values()):
                return NotImplemented
            if first.is_cpu:
                read = {n: v.item() if hasattr(v, "item") else v for n, v in keywords.items()}
        if self._by_tensors:
            program = self._programs.get((engine.forced(), first.dtype, first.is_cpu, present), _MISSING)
        if program is _MISSING:
            program = self.prepare(first, present, keywords)
        if program is None:
            return NotImplemented
        if program.entry is not None:
            return program.at_once(first, handles, read)
        if program.totals:
            totals = self.launch([None if t is None else [t] for t in tensors], Table(lasting=False), keywords)
            return NotImplemented if totals is None else alone([t[0] for t in totals])
        addresses = self._addresses(tensors)
        return NotImplemented if addresses is None else program(tensors, addresses, keywords)

    def bound(
        self, tensors: Sequence[Any], results: Sequence[Any], keywords: Mapping[str, Any]
    ) -> Callable[[], Any] | Record:
        """As `torch_bp.kernels.bound.bound`."""
        return bound.bound(self, tensors, results, keywords)

    def bound_total(self, *lists: Sequence[torch.Tensor]) -> Callable[[], float] | None:
        """As `torch_bp.kernels.bound.bound_total`."""
        return bound.bound_total(self, *lists)

    def _addresses(self, tensors: Sequence[torch.Tensor | None]) -> list[int] | None:
        """Return where the tensors begin in memory, if they are fit for a kernel."""
        addresses = plain.addresses(tensors)
        if addresses is not None and self.updates and not _may_write(tensors, addresses):
            return None
        return addresses

    def padded(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """Add the optional arguments that were left out, which are None."""
        if len(tensors) < self._required:
            return tuple(tensors)
        return (*tensors, *[None] * (len(self.tensors) - len(tensors)))

    def prepare(self, first: torch.Tensor, present: int, keywords: Mapping[str, Any]) -> Program | None:
        """Return the kernels for plain tensors like `first`, a choice of present ones and of static keywords.

        `present` has a bit for each positional argument, the last one's the lowest. None where the engine in use has no
        kernels.
        """
        key: Any = (engine.forced(), first.dtype, first.is_cpu, present)
        if self.static:
            static = [keywords[n] if n in keywords else self._default(n) for n in self.static]
            # 1, 1.0 and True are one key of a dictionary, and so are 0.0 and -0.0
            kinds = [*map(type, static)]
            key = (*key, *kinds, *(map(repr, static) if float in kinds else static))
        if self.outer:
            key = (*key, *(number() for number in self.outer))
        try:
            return self._programs[key]
        except KeyError:
            pass
        except TypeError:
            raise TypeError(
                f"formula {self.name}: static keywords must be hashable, got "
                f"{', '.join(f'{n}={v!r}' for n, v in zip(self.static, static))}."
            ) from None
        serving = engine.serving(first)
        absent = tuple(n for k, n in enumerate(reversed(self.tensors)) if not present >> k & 1)
        program = None if serving is None else self._program(serving, first.dtype, absent, keywords)
        if first.is_cpu or first.is_cuda:  # whatever else is no CPU has the key of CUDA
            self._programs[key] = program
        return program

    def _program(
        self, serving: str, dtype: torch.dtype, absent: tuple[str, ...], keywords: Mapping[str, Any]
    ) -> Program:
        """Make the kernels of one engine."""
        static = self.static_values(keywords)
        defaults = {n: v for n, v in self.defaults.items() if n in self.scalars}
        expression = trace(
            self.function, self.name, dict.fromkeys(self.tensors, "tensor"), absent, self.scalars, static, defaults
        )
        return Program(expression, self.tensors, self.updates, serving, dtype, self.lent)

    def static_values(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the static keywords of a call."""
        return {n: keywords[n] if n in keywords else self._default(n) for n in self.static}

    def _default(self, name: str) -> Any:
        if name not in self.defaults:
            raise TypeError(f"{self.name}() missing required keyword-only argument: {name!r}")
        return self.defaults[name]

    def foreach_(self, *lists: Sequence[torch.Tensor] | None, table: Table | None = None, **keywords: Any) -> Any:
        """Run a formula that updates, or that gives totals, over lists: one kernel launch where a kernel may serve.

        Args:
            *lists: one list of tensors for each positional argument, all of one length; None for an argument that
                is None.
            table: a `torch_bp.kernels.Table()`, kept between calls on the same lists, whose addresses are then
                compared and not collected.
            **keywords: the scalars, the same for every tensor, and the static keywords.

        Returns:
            For each `total` among the results (n), one value per tensor, in float64; a tuple if there are several.

        Raises:
            TypeError: the formula returns new tensors.
            ValueError: the lists differ in length.
        """
        present = [row for row in lists if row is not None]
        if len({len(row) for row in present}) != 1:
            raise ValueError(
                f"formula {self.name}: lists must have the same length, got "
                f"{', '.join(f'{n}: {len(row)}' for n, row in zip(self.tensors, lists) if row is not None)}."
            )
        if not _is_compiling() and present[0]:
            try:
                totals = self.launch(lists, table or Table(lasting=False), keywords)
            except (TypeError, ValueError) as error:
                self._explain(keywords, error)
                raise
            if totals is not None:
                return alone(totals)
        each = []
        for k in range(len(present[0])):
            result = self(*(None if row is None else row[k] for row in lists), **keywords)
            each.append(result if isinstance(result, tuple) else (result,))
        if not each or each[0] == (None,):
            return None
        if any(t.dim() for t in each[0]):
            self._refuse_results()
        return alone([torch.stack(of_one) for of_one in zip(*each)])

    def _refuse_results(self) -> NoReturn:
        raise TypeError(
            f"formula {self.name}: foreach_ needs @formula(updates=...), which names what is written, or totals."
        )

    def launch(
        self, lists: Sequence[Sequence[torch.Tensor] | None], table: Table, keywords: Mapping[str, Any]
    ) -> tuple[torch.Tensor, ...] | None:
        """Run the list kernel if one may serve; None means that nothing was done. Arguments as of `foreach_`."""
        if len(lists) < len(self.tensors):
            lists = self.padded(lists)
        present = [row for row in lists if row is not None]
        first = present[0][0]
        if len(lists) != len(self.tensors) or not unwatched() or not isinstance(first, torch.Tensor):
            return None
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # a replay would read the addresses from memory that has been given back
        if not numbers(keywords.values()) or (grad_enabled() and any(map(plain.recording, present))):
            return None
        program = self.prepare(first, presence(lists), keywords)
        if program is None:
            return None
        if program.created:
            self._refuse_results()
        if not table.refresh(present, program.writes, program.chunk):
            return None
        table.program = program
        return program.foreach(present, table, keywords)
