"""The command `torch-bp doctor`."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any


def add_doctor(commands: Any) -> None:
    """`torch-bp doctor`: see `torch_bp.diagnostics.examine`."""
    parser = commands.add_parser(
        "doctor",
        help="what is wrong with a training run, or a checkpoint?",
        description="Name what is wrong with a run (readings of torch_bp.watch, or TensorBoard events) or a "
        "checkpoint: layer, step, number and threshold, cause, and one thing to do. With --cure, try each cure on a "
        "copy of the run and show the same steps before and after.",
        epilog="Example: torch-bp doctor logs/digits/version_0. "
        "Exit code: 0 if nothing is wrong, 1 if something is, 2 if there is nothing that can be read.",
    )
    parser.add_argument(
        "path",
        metavar="RUN_OR_CHECKPOINT",
        help="a folder that a run wrote to, its readings.jsonl, or a file of torch.save or Lightning",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load Python objects of a checkpoint, too, which runs code that it names",
    )
    parser.add_argument(
        "--cure",
        metavar="MODULE:NAME",
        help="a function that gives the run as it begins: model, loss_fn, optimizer, and a list of batches "
        "(input, target)",
    )
    parser.add_argument("--steps", type=int, default=20, help="of each trial of a cure; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of random numbers of that function; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Print what is wrong, and what cures do."""
    from torch_bp.cli import FOUND, WELL, UsageError
    from torch_bp.diagnostics.doctor import examine

    try:
        found = examine(args.path, trust=args.trust)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    except ImportError as error:
        raise UsageError(f'{error}. Remedy: pip install "torch_bp[tensorboard]"') from error
    trials = [] if args.cure is None else _tried(args, found.findings)
    if args.json:
        content = found.to_dict()
        if args.cure is not None:
            content["cures"] = [trial.to_dict() for trial in trials]
        sys.stdout.write(f"{json.dumps(content, indent=2)}\n")
    else:
        sys.stdout.write("\n\n".join(map(str, [found, *trials])) + "\n")
    return WELL if found else FOUND


def _tried(args: argparse.Namespace, findings: Sequence[Any]) -> list[Any]:
    """A trial of the cure of each finding, each from the same start."""
    import torch

    from torch_bp.cli import UsageError, load
    from torch_bp.cure import try_cure

    torch.manual_seed(args.seed)
    made = load(args.cure)
    if not isinstance(made, tuple | list) or len(made) != 4:
        got = f"{len(made)} values" if isinstance(made, tuple | list) else type(made).__name__
        raise UsageError(f"cure: {args.cure} must give model, loss_fn, optimizer and batches, got {got}.")
    model, loss_fn, optimizer, batches = made
    try:
        return [try_cure(model, loss_fn, optimizer, batches, finding, args.steps) for finding in findings]
    except (TypeError, ValueError) as error:
        raise UsageError(f"cure: {args.cure}: {error}") from error
