"""The command `torch-bp`, also `python -m torch_bp`.

Every sub-command is a function that adds its parser, and names the function which runs it: `run(args, parser)` returns
the exit code. 0: all is well. 1: something was found. 2: the command was not understood, or what it names cannot be
loaded.
"""

import argparse
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch_bp._version import __version__
from torch_bp.doctor_command import add_doctor
from torch_bp.lr_commands import add_lr_find, add_lr_preview

WELL, FOUND, USAGE = 0, 1, 2


class UsageError(Exception):
    """What the user named cannot be loaded; ends in exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, of `sys.argv` or of `arguments`, and return its exit code.

    Example:
        >>> main(["verify", "torch.nn:Identity", "--inputs", "torch:nowhere"])
        2
    """
    parser = argparse.ArgumentParser(prog="torch-bp", description="Tools of torch_bp for models.")
    parser.add_argument("--version", action="version", version=f"torch-bp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    args = parser.parse_args(arguments)
    if os.getcwd() not in sys.path:  # an installed command does not see the modules of the working folder
        sys.path.insert(0, os.getcwd())
    try:
        return args.run(args)
    except UsageError as error:
        sys.stderr.write(f"torch-bp {args.command}: {error}\n")
        return USAGE


def add_gradcheck(commands: Any) -> None:
    """`torch-bp gradcheck`: see `torch_bp.autograd.gradcheck`."""
    parser = commands.add_parser(
        "gradcheck",
        help="are the gradients of a model or a function right?",
        description="Compare the gradients of a model and of its inputs with central differences, and check what else "
        "a backward owes. Inputs of real numbers are checked, too.",
        epilog="Example: torch-bp gradcheck my_package.models:make --inputs my_package.models:batch. "
        "Exit code: 0 if all is right, 1 if a gradient is wrong, 2 if the model cannot be loaded or run.",
    )
    _add_model(parser, "a torch.nn.Module, or a function or class that makes one without arguments")
    parser.add_argument(
        "--function",
        action="store_true",
        help="MODULE:NAME is itself the function to check, or an autograd Function",
    )
    parser.add_argument("--full", action="store_true", help="entry by entry; default: along a direction of each tensor")
    parser.add_argument("--second", action="store_true", help="check second derivatives, too")
    parser.add_argument("--as-is", action="store_true", help="in the precision that the model has; default: in double")
    parser.add_argument("--rtol", type=float, metavar="NUMBER", help="largest relative error; default: by precision")
    parser.set_defaults(run=run_gradcheck)


def _add_model(parser: argparse.ArgumentParser, model: str) -> None:
    """The arguments that name a model and its inputs, and how to print."""
    parser.add_argument("model", metavar="MODULE:NAME", help=model)
    parser.add_argument(
        "--inputs",
        metavar="MODULE:NAME",
        help="a tensor, a tuple of arguments or a dict of keyword arguments, or a function that makes them. "
        "Default: the second of what the model's function returns, or the model's example_input_array",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of random numbers; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _load_with_inputs(args: argparse.Namespace, called: bool = True) -> tuple[Any, Any]:
    """Return the model that the arguments name, and its inputs."""
    made = load(args.model, called)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if args.inputs is not None:
        inputs = load(args.inputs)
    elif inputs is None:
        inputs = getattr(model, "example_input_array", None)
    if inputs is None:
        raise UsageError(
            f"inputs: {args.model} must come with example inputs, got none. Give --inputs MODULE:NAME, or let the "
            "function return (model, inputs)."
        )
    return model, inputs


def run_gradcheck(args: argparse.Namespace) -> int:
    """Print what the gradient check found."""
    import torch

    from torch_bp.autograd import gradcheck, gradgradcheck

    torch.manual_seed(args.seed)
    model, inputs = _load_with_inputs(args, called=not args.function)
    if isinstance(inputs, dict):
        model, inputs = _positional(model, inputs)
    checked = tuple(_checkable(t) for t in (inputs if isinstance(inputs, tuple | list) else (inputs,)))
    options = {"full": args.full, "precise": not args.as_is, "rtol": args.rtol, "raise_exception": False}
    try:
        reports = {"gradcheck": gradcheck(model, checked, **options)}
        if args.second:
            reports["gradgradcheck"] = gradgradcheck(model, checked, **options)
    except Exception as error:  # exit code 1, which Python would give, says that a gradient is wrong
        raise UsageError(f"{type(error).__name__}: {error}") from error
    if args.json:
        sys.stdout.write(f"{json.dumps({name: report.to_dict() for name, report in reports.items()}, indent=2)}\n")
    else:
        words = [f"second derivatives: {r}" if name == "gradgradcheck" else str(r) for name, r in reports.items()]
        sys.stdout.write("\n".join(words) + "\n")
    return WELL if all(reports.values()) else FOUND


def _positional(model: Any, inputs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Return what takes the values of keyword arguments one by one: a module remains one, with its parameters."""
    try:
        bound = inspect.signature(getattr(model, "forward", model)).bind(**inputs)
    except TypeError as error:
        raise UsageError(f"inputs: they must be arguments of the model, got {', '.join(inputs)}: {error}") from error
    if bound.kwargs:
        raise UsageError(
            f"inputs: {', '.join(bound.kwargs)} must not be keyword-only; write a function of positional arguments."
        )
    return model, bound.args


def _checkable(value: Any) -> Any:
    """Let a tensor of real or complex numbers require grad, on a copy."""
    is_real = getattr(value, "is_floating_point", None)
    if is_real is None or not (is_real() or value.is_complex()):
        return value
    return value.detach().clone().requires_grad_()


def add_verify(commands: Any) -> None:
    """`torch-bp verify`: see `torch_bp.verify`."""
    parser = commands.add_parser(
        "verify",
        help="does a model do the same with torch_bp as with torch?",
        description="Compare a model made of torch's modules with the same model made of torch_bp's: values, "
        "derivatives of every kind, compilation, autocast, checkpoints, optimizers.",
        epilog="Example: torch-bp verify my_package.models:make --inputs my_package.models:batch. "
        "Exit code: 0 if all holds, 1 if something differs, 2 if the model cannot be loaded or run.",
    )
    _add_model(parser, "a torch.nn.Module, or a function or class that makes one without arguments")
    parser.add_argument("--checks", metavar="NAME,NAME", help="only these checks; default: all")
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Print the certificate of a model."""
    import torch

    from torch_bp.certificate import verify

    torch.manual_seed(args.seed)
    model, inputs = _load_with_inputs(args)
    try:
        certificate = verify(model, inputs, checks=args.checks and args.checks.split(","), seed=args.seed)
    except Exception as error:  # exit code 1, which Python would give, says that something differs
        raise UsageError(f"{type(error).__name__}: {error}") from error
    sys.stdout.write(f"{json.dumps(certificate.to_dict(), indent=2) if args.json else certificate}\n")
    return WELL if certificate else FOUND


COMMANDS: tuple[Callable[[Any], None], ...] = (add_gradcheck, add_verify, add_doctor, add_lr_preview, add_lr_find)


def load(path: str, called: bool = True) -> Any:
    """Return what `MODULE:NAME` names, called if it is a function or a class, unless told otherwise.

    Raises:
        UsageError: it cannot be imported, has no such name, or the call fails.

    Example:
        >>> load("collections:OrderedDict")
        OrderedDict()
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise UsageError(f"path: {path!r} must be MODULE:NAME, such as my_package.models:make.")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise UsageError(f"{path}: importing {module} raised {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{path}: {module} must have the name {name}, got none of that name.")
        found = getattr(found, part)
    if not called or not (inspect.isroutine(found) or inspect.isclass(found)):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path}: calling it without arguments raised {type(error).__name__}: {error}") from error
