"""The command `torch-bp doctor`."""

import argparse
import json
import sys
from typing import Any


def add_doctor(commands: Any) -> None:
    """`torch-bp doctor`: see `torch_bp.diagnostics.examine`."""
    parser = commands.add_parser(
        "doctor",
        help="what is wrong with a training run, or a checkpoint?",
        description="Name what is wrong with a run (readings of torch_bp.watch, or TensorBoard events) or a "
        "checkpoint: layer, step, number and threshold, cause, and one thing to do.",
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
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Print what is wrong."""
    from torch_bp.cli import FOUND, WELL, UsageError
    from torch_bp.diagnostics.doctor import examine

    try:
        found = examine(args.path, trust=args.trust)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    except ImportError as error:
        raise UsageError(f'{error}. Remedy: pip install "torch_bp[tensorboard]"') from error
    sys.stdout.write(f"{json.dumps(found.to_dict(), indent=2) if args.json else found}\n")
    return WELL if found else FOUND
