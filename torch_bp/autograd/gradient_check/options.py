"""What a gradient check is asked to do, by torch's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

_Option = float | None


@dataclass(frozen=True)
class Options:
    """The options that `gradcheck` and `gradgradcheck` share; those of `gradcheck` by its names."""

    eps: _Option = None
    atol: _Option = None
    rtol: _Option = None
    nondet_tol: float = 0.0
    check_undefined_grad: bool = True
    check_grad_dtypes: bool = True
    check_batched_grad: bool = False
    check_batched_forward_grad: bool = False
    check_forward_ad: bool = False
    check_backward_ad: bool = True
    check_contract: bool = True
    full: bool = False
    masked: bool | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **others: Any) -> Options:
        """Choose the options among all arguments of a function; `others` are known by other names there.

        Raises:
            ValueError: they contradict each other, or a number is out of range.
        """
        chosen = {f.name: arguments[f.name] for f in fields(cls) if f.name in arguments}
        fast, full = arguments["fast_mode"], arguments["full"]
        if full and fast:
            raise ValueError("gradcheck: full must be False with fast_mode=True, got True; leave one of them out.")
        options = cls(**chosen | {"full": full or fast is False} | others)
        if options.eps is not None and not options.eps > 0:
            raise ValueError(f"gradcheck: eps must be > 0, got {options.eps}; leave it out for the default.")
        for name in ("atol", "rtol", "nondet_tol"):
            value = getattr(options, name)
            if value is not None and not value >= 0:
                raise ValueError(f"gradcheck: {name} must be >= 0, got {value}; leave it out for the default.")
        return options
