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
    parser.add_argument(
        "model",
        metavar="MODULE:NAME",
        help="a torch.nn.Module, or a function or class that makes one without arguments",
    )
    parser.add_argument(
        "--inputs",
        metavar="MODULE:NAME",
        help="a tensor, a tuple of arguments or a dict of keyword arguments, or a function that makes them. "
        "Default: the second of what the model's function returns, or the model's example_input_array",
    )
    parser.add_argument("--checks", metavar="NAME,NAME", help="only these checks; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of random numbers; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Print the certificate of a model."""
    import torch

    from torch_bp.certificate import verify

    torch.manual_seed(args.seed)
    made = load(args.model)
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
    try:
        certificate = verify(model, inputs, checks=args.checks and args.checks.split(","), seed=args.seed)
    except Exception as error:  # exit code 1, which Python would give, says that something differs
        raise UsageError(f"{type(error).__name__}: {error}") from error
    sys.stdout.write(f"{json.dumps(certificate.to_dict(), indent=2) if args.json else certificate}\n")
    return WELL if certificate else FOUND


COMMANDS: tuple[Callable[[Any], None], ...] = (add_verify, add_doctor, add_lr_preview, add_lr_find)


def load(path: str) -> Any:
    """Return what `MODULE:NAME` names, called if it is a function or a class.

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
    if not (inspect.isroutine(found) or inspect.isclass(found)):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path}: calling it without arguments raised {type(error).__name__}: {error}") from error
