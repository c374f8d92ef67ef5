"""The commands `torch-bp lr-preview` and `torch-bp lr-find`."""

import argparse
import difflib
import inspect
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch_bp import chart, config


def add_lr_preview(commands: Any) -> None:
    """`torch-bp lr-preview`: the rates of a schedule, before it is used."""
    parser = commands.add_parser(
        "lr-preview",
        help="draw a learning-rate schedule",
        description="Draw the rates of one or several schedules in the terminal, and as a PNG.",
        epilog="Example: torch-bp lr-preview --lr_scheduler torch_bp.optim.lr_scheduler.OneCycleLR "
        "--init_args max_lr=0.1 pct_start=0.2 --steps 200 --png one_cycle.png. "
        "Exit code: 0 if all is well, 2 if the schedule cannot be made or drawn.",
    )
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="a YAML or JSON file with `lr_scheduler` (class_path, init_args) and, maybe, `optimizer`, at its top or "
        "under `model` as in a recipe; or with `schedules`, several of them by name",
    )
    parser.add_argument(
        *("--lr_scheduler", "--lr-scheduler"),
        metavar="CLASS",
        help="full path of the schedule's class, instead of a file",
    )
    parser.add_argument(
        *("--init_args", "--init-args"),
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="its arguments, in YAML; they win over a file's",
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        default=100,
        help="how many steps; default: %(default)s. A schedule's total_steps or T_max that is left out is this number, "
        "and the heading says so; those of schedules in a schedule must be given",
    )
    parser.add_argument("--lr", type=float, help="base rate; default: the optimizer's own, 0.1 where none is named")
    parser.add_argument("--png", metavar="FILE", help="also draw a picture, which needs the extra torch_bp[recipes]")
    parser.add_argument("--json", action="store_true", help="print JSON, with the rates, instead of a chart")
    parser.set_defaults(run=run_lr_preview)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def run_lr_preview(args: argparse.Namespace) -> int:
    """Print the rates of the schedules."""
    from torch_bp.cli import WELL, UsageError

    headings, curves = {}, {}
    try:
        _check_folder(args.png)
        for name, item, optimizer in _schedules(args):
            item, headings[name] = _with_length(item, args.steps)
            curves[name] = _rates(item, optimizer, args)
        if args.png:
            chart.png(curves, args.png)
    except Exception as error:  # a traceback would say less
        raise UsageError(_reason(error)) from error
    if args.json:
        sys.stdout.write(json.dumps({"steps": args.steps, "lr": curves}) + "\n")
        return WELL
    for name, rates in curves.items():
        sys.stdout.write(f"{name}, lr in {args.steps} steps{headings[name]}\n")
        sys.stdout.write(chart.text(rates, ends=("0", str(args.steps - 1))) + "\n")
    if args.png:
        sys.stdout.write(f"{args.png}\n")
    return WELL


def _check_folder(png: str | None) -> None:
    """Refuse a picture that could not be written, before anything is computed."""
    if png and not (folder := Path(png).absolute().parent).is_dir():
        raise config.ConfigError(f"--png: {png} must lie in a folder, got none; No such file or directory: {folder}.")


def _reason(error: Exception) -> str:
    """What to tell the user: the message alone where it is of ours or says all, else with the kind of error."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, config.ConfigError | ImportError) else f"{type(error).__name__}: {error}"


def _with_length(item: Any, steps: int) -> tuple[Any, str]:
    """The schedule with the length that it was left without, as in a recipe, and what to say about it."""
    cls, arguments = config.node(item)
    known = inspect.signature(cls).parameters
    lengths = [name for name in ("total_steps", "T_max") if name in known and arguments.get(name) is None]
    if not lengths or arguments.get("epochs") is not None:
        return item, ""
    path = item if isinstance(item, str) else item["class_path"]
    return {"class_path": path, "init_args": arguments | {lengths[0]: steps}}, f", {lengths[0]}={steps}"


def _schedules(args: argparse.Namespace) -> list[tuple[str, Any, Any]]:
    """`(name, schedule, optimizer)` of each schedule that the file or the flags name."""
    content = config.read(args.config) if args.config else {}
    places = [content, *(p for p in _inner(content) if isinstance(p, Mapping))]
    found = {
        key: next((place[key] for place in places if place.get(key) is not None), None)
        for key in ("schedules", "lr_scheduler", "optimizer")
    }
    if args.lr_scheduler is None and isinstance(found["schedules"], Mapping):
        if args.init_args:
            raise config.ConfigError("--init_args: `schedules` has several; write their arguments into the file.")
        return [(name, item, found["optimizer"]) for name, item in found["schedules"].items()]
    _check_spelling(content, found)
    item = args.lr_scheduler or found["lr_scheduler"]
    if item is None:
        keys = f" in {args.config}, which has {', '.join(map(str, content)) or 'no keys'}" if args.config else ""
        raise config.ConfigError(
            f"lr_scheduler: a schedule must be named, got none{keys}. Give a file that has `lr_scheduler`, or "
            "--lr_scheduler torch_bp.optim.lr_scheduler.StepLR --init_args step_size=30."
        )
    cls, arguments = config.node(item)
    for text in args.init_args:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise config.ConfigError(f"--init_args: {text!r} must be NAME=VALUE, such as step_size=30.")
        arguments[name] = config.parse(value, name)
    path = item if isinstance(item, str) else item["class_path"]
    return [(cls.__name__, {"class_path": path, "init_args": arguments}, found["optimizer"])]


def _check_spelling(content: Mapping[str, Any], wanted: Iterable[str]) -> None:
    """Refuse a key that is nearly one that is wanted and not there; others may be meant for other programs."""
    absent = [key for key in wanted if content.get(key) is None]
    for key in content:
        if key not in wanted and (near := difflib.get_close_matches(str(key), absent, cutoff=0.75)):
            raise config.ConfigError(f"{key}: there is no such key. Write {' or '.join(near)} instead.")


def _inner(content: Mapping[str, Any]) -> list[Any]:
    """Where a recipe keeps what it names."""
    model = content.get("model")
    return [model, model.get("init_args")] if isinstance(model, Mapping) else []


def _rates(item: Any, optimizer_item: Any, args: argparse.Namespace) -> list[float]:
    """The rate of each step; a schedule that watches a metric is shown one that never improves."""
    import torch
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    given: dict[str, Any] = {"params": [torch.nn.Parameter(torch.zeros(1))]}
    if args.lr is not None:
        given["lr"] = args.lr
    if optimizer_item is None:
        optimizer = torch.optim.SGD(**{"lr": 0.1, "momentum": 0.9} | given)
    else:
        optimizer = config.build(optimizer_item, **given)
        for group in () if args.lr is None else optimizer.param_groups:
            group["lr"] = args.lr
    cls, _ = config.node(item)
    schedule = config.build(item, optimizer=optimizer)
    optimizer.step()
    rates = [float(optimizer.param_groups[0]["lr"])]
    for _ in range(args.steps - 1):
        try:
            schedule.step(*([1.0] if isinstance(schedule, ReduceLROnPlateau) else []))
        except (ValueError, OverflowError) as error:  # past the end, or past all numbers
            raise config.ConfigError(f"{cls.__name__}: {error}. Take fewer --steps.") from error
        rates.append(float(optimizer.param_groups[0]["lr"]))
    for t, rate in enumerate(rates):
        if not math.isfinite(rate):  # neither a chart nor JSON has a place for it
            raise config.ConfigError(
                f"{cls.__name__}: the rate must be finite, got {rate} at step {t}. Change its arguments or take fewer "
                "--steps."
            )
    return rates


def add_lr_find(commands: Any) -> None:
    """`torch-bp lr-find`: see `torch_bp.optim.lr_find`."""
    parser = commands.add_parser(
        "lr-find",
        help="which learning rate to begin with",
        description="Train a model for a few steps with growing rates, and say which rate to begin with.",
        epilog="Example: torch-bp lr-find recipes/digits.yaml --png lr.png. Exit code: 0 with a suggestion, 1 if the "
        "loss has not fallen at any rate, 2 if the model cannot be loaded or run.",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a YAML or JSON file: `model` and `data` as LightningCLI and the recipes have them; or `model`, `loss`, "
        "`optimizer` and `batches`, each a full path or class_path and init_args",
    )
    parser.add_argument("--min_lr", "--min-lr", type=float, default=1e-7, help="the first rate; default: %(default)s")
    parser.add_argument("--max_lr", "--max-lr", type=float, default=10.0, help="the last rate; default: %(default)s")
    parser.add_argument("--steps", type=_positive, default=100, help="how many rates; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of random numbers; default: %(default)s")
    parser.add_argument("--png", metavar="FILE", help="also draw a picture, which needs the extra torch_bp[recipes]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a chart")
    parser.set_defaults(run=run_lr_find)


def run_lr_find(args: argparse.Namespace) -> int:
    """Print the losses over the rates, and what each rule suggests."""
    from torch_bp.cli import FOUND, WELL, UsageError
    from torch_bp.optim.range_test import RULES

    try:
        _check_folder(args.png)
        content = config.read(args.config)
        test = _tested(content, args)
        if args.png:
            test.plot().savefig(args.png, format="png")
    except Exception as error:  # exit code 1, which Python would give, says that no rate was found
        raise UsageError(_reason(error)) from error
    try:
        suggestions = {rule: test.suggestion(rule) for rule in RULES}
    except RuntimeError:
        suggestions = {}
    if args.json:
        report = {"suggestions": suggestions, "diverged": test.diverged, "lr": test.lr, "losses": test.losses}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(f"{chart.range_test(test)}\n")
    return WELL if suggestions else FOUND


def _tested(content: Mapping[str, Any], args: argparse.Namespace) -> Any:
    import torch

    from torch_bp.optim.range_test import lr_find

    options = {"min_lr": args.min_lr, "max_lr": args.max_lr, "steps": args.steps}
    torch.manual_seed(args.seed)
    wanted = ("model", "data") if "data" in content else ("model", "loss", "optimizer", "batches")
    if missing := [key for key in wanted if key not in content]:
        hints = (config.nearest(key, content, f" For {key} the nearest is ") for key in missing)
        raise config.ConfigError(
            f"{args.config}: the file must have model, loss, optimizer and batches, or model and data, got no "
            f"{', '.join(missing)}; it has {', '.join(map(str, content)) or 'no keys'}.{''.join(hints)}"
        )
    if "data" in content:
        try:
            from torch_bp import lightning
        except ImportError as error:
            raise ImportError(f'{error}. Remedy: pip install "torch_bp[lightning]"') from error
        return lightning.find_by_config(content, **options)
    model, loss, batches = (config.build(content[key]) for key in ("model", "loss", "batches"))
    return lr_find(model, loss, config.build(content["optimizer"], params=model.parameters()), batches, **options)
