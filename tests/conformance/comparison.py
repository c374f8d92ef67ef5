"""Do two ways to compute behave alike? Values, first and second derivatives, errors."""

import functools
from collections.abc import Callable
from typing import Any

import torch

# Of single and half precision these are torch.testing's own, which torch holds its modules to.
CLOSE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-13},
    torch.complex128: {"rtol": 1e-11, "atol": 1e-13},
}


def mapped(change: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    """Change every tensor in tuples, lists and dicts; the new ones ask for a gradient where the old ones do."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        return change(tensor.detach()).requires_grad_(tensor.requires_grad)

    return torch.utils._pytree.tree_map_only(torch.Tensor, changed, values)


def copied(values: Any) -> Any:
    """The same, in memory of their own."""
    return mapped(torch.clone, values)


def wide(values: Any) -> Any:
    """The same numbers in double precision."""
    double = {True: torch.complex128, False: torch.float64}
    real = lambda t: t.is_floating_point() or t.is_complex()  # noqa: E731
    values = mapped(lambda t: t.to(double[t.is_complex()]) if real(t) else t, values)
    return torch.utils._pytree.tree_map_only(torch.dtype, lambda _: torch.float64, values)


def strided(values: Any) -> Any:
    """The same numbers with gaps between them, in memory."""
    return mapped(lambda t: torch.stack((t, t), -1)[..., 0] if t.dim() else t, values)


def tensors_that_want_gradients(*values: Any) -> list[torch.Tensor]:
    """Among arguments, in their order."""
    return [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, torch.Tensor) and t.requires_grad]


def _directions(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """One random direction per tensor, the same numbers for every dtype, with 7 binary digits so that all hold them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-64, 65, t.shape, generator=generator).div(32).to(t.dtype).requires_grad_() for t in tensors]


def behaviour(function: Callable[..., torch.Tensor], *args: Any, wanted: Any = (), **kwargs: Any) -> dict[str, Any]:
    """What a call returns, and its first and second derivatives by the arguments and by `wanted`.

    First derivatives go along a direction dy, second ones along directions of the first, also by dy.
    """
    args, kwargs = copied(args), copied(kwargs)
    output = function(*args, **kwargs)
    found = {"value": output.detach().clone(), "first": [], "second": []}
    wanted = [*tensors_that_want_gradients(args, kwargs), *wanted]
    if not output.requires_grad:
        return found
    (dy,) = _directions([output])
    slopes = torch.autograd.grad(output, wanted, dy, create_graph=True)
    found["first"] = [slope.detach() for slope in slopes]
    found["second"] = list(torch.autograd.grad(slopes, [*wanted, dy], _directions(slopes), materialize_grads=True))
    return found


def assert_alike(got: dict[str, Any], expected: dict[str, Any], exact: Callable[[], dict[str, Any]]) -> None:
    """Each tensor equal within rounding, NaN to NaN, of one dtype and shape; or no farther than torch's from `exact`.

    `exact` says what float64 makes of the same numbers. It is asked where rounding has been magnified: what two right
    ways to compute leave then differs by more than an error of rounding.
    """
    reference = functools.cache(exact)
    for part, values in expected.items():
        for path, value in torch.utils._pytree.tree_leaves_with_path(values):
            mine = torch.utils._pytree.key_get(got[part], path)
            close = CLOSE.get(value.dtype, {}) if part != "second" else {}
            told = failure(lambda: torch.testing.assert_close(mine, value, equal_nan=True, **close))[1]  # noqa: B023
            if not told:
                continue
            told = f"{part}{torch.utils._pytree.keystr(path)}: {told}"
            roundable = (mine.dtype, mine.shape) == (value.dtype, value.shape) and value.dtype not in CLOSE
            assert roundable, told
            ours, torchs, unit = _errors(torch.utils._pytree.key_get(reference()[part], path), mine, value)
            assert ours <= torchs + unit, f"{told} Off float64's by {ours:.2g}, torch's by {torchs:.2g}"


def _errors(exact: torch.Tensor, mine: torch.Tensor, value: torch.Tensor) -> tuple[float, float, float]:
    """The largest deviation of ours and of torch's from what is exact, and half a unit in the last place of that."""
    unit = torch.finfo(value.dtype).eps * exact.abs().nan_to_num(0, 0, 0).max() / 2

    def error(found: torch.Tensor) -> float:
        found = found.to(exact.dtype)
        same = (found == exact) | (found.isnan() & exact.isnan())
        return float(torch.where(same, 0, (found - exact).abs()).nan_to_num(torch.inf).max())

    return error(mine), error(value), float(unit)


def failure(function: Callable[[], Any]) -> tuple[type | None, str]:
    """The type and the message of the error that a call ends with."""
    try:
        function()
    except Exception as error:  # what it is is the question
        return type(error), str(error)
    return None, ""
