"""`python -m tests.benchmarks [name ...]`: measure, print one table, keep it under `logs/benchmarks/`."""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks import (
    cross_entropy,
    exactness,
    fusion,
    gradient_check,
    guard,
    honesty,
    loops,
    mnist,
    monitor,
    network,
    normalised,
    operations,
    optimizers,
    start,
    train_step,
)
from tests.benchmarks.protocol import Result, machine, size


def both(group: str, pairs: int) -> Iterator[Result]:
    """Through autograd, and without."""
    yield from honesty.measure(group, pairs)
    yield from train_step.bare(group, pairs)


BENCHMARKS: dict[str, dict[str, Callable[[str, int], Iterator[Result]]]] = {
    "cpu": {
        "C1": optimizers.measure,
        "C2": optimizers.measure,
        "C3": train_step.measure,
        "C4": loops.measure,
        "C5": operations.measure,
        "C6": fusion.measure,
        "C7": cross_entropy.measure,
        "C8": normalised.measure,
        "C9": both,
        "C11": gradient_check.measure,
        "C10": monitor.measure,
        "C12": train_step.growth,
        "epoch": mnist.measure,
        "R5": exactness.measure,
        "guard": guard.measure,
        "start": start.measure,
    },
    "cuda": {
        "G1": train_step.measure_on_device,
        "G2": network.measure,
        "G4": both,
        "G5": optimizers.measure,
        "G6": optimizers.measure,
        "G7": cross_entropy.measure,
    },
}


def _value(result: Result, value: float) -> str:
    return {"us": f"{value:.0f} us", "s": f"{value:.2f} s", "bytes": size(value), "ulp": f"{value:.2g} ulp"}[
        result.unit
    ]


def _spread(result: Result) -> str:
    return "exact" if result.unit == "bytes" else f"{result.low:.2f}-{result.high:.2f}"


def table(results: list[Result]) -> Table:
    """Ratios below 1 mean that ours is faster, takes less memory, or is more exact."""
    columns = ("", "what", "workload", "working set", "against", "ours / peer", "95 %", "ours", "peer", "target", "")
    title = "time, ours / peer; medians of interleaved pairs. Memory: counted. Errors: median, and least to worst"
    drawn = Table(*columns, title=title)
    for r in results:
        verdict = {None: "", True: "met", False: "missed"}[r.met]
        numbers = f"{r.ratio:.2f}", _spread(r), _value(r, r.ours_value), _value(r, r.peer_value)
        working_set = "" if r.working_set is None else size(r.working_set)
        target = "" if r.target is None else f"{r.target}" + ("" if r.most is None else f", worst {r.most}")
        drawn.add_row(r.group, r.what, r.workload, working_set, r.peer, *numbers, target, verdict)
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; leave with code 2 where it asks for what is not there."""
    known = "; ".join(f"{device}: {', '.join(names)}" for device, names in BENCHMARKS.items())
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which of a device's benchmarks ({known}); all")
    parser.add_argument("--device", choices=list(BENCHMARKS), default="cpu", help="where to measure; cpu")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of samples for a line, up to 10 for long work; 30")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args(argv)
    unknown = [n for n in arguments.names if n not in BENCHMARKS[arguments.device]]
    if unknown:
        expected = ", ".join(BENCHMARKS[arguments.device])
        parser.error(f"unknown benchmark {unknown[0]!r} for {arguments.device}, expected one of {expected}")
    if arguments.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {arguments.pairs}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: --device cuda needs a CUDA device, and torch {torch.__version__} sees none\n")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    console = Console()
    wide = console if console.is_terminal else Console(width=180)
    console.print(machine(arguments.device))
    results = []
    for name in arguments.names or BENCHMARKS[arguments.device]:
        for result in BENCHMARKS[arguments.device][name](name, arguments.pairs):
            results.append(result)
            console.print(f"{result.group} {result.what}, {result.workload}, {result.peer}: {result.ratio:.2f}")
    wide.print(table(results))
    text = json.dumps({"machine": machine(arguments.device), "results": [r.as_dict() for r in results]}, indent=1)
    folder = Path("logs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}.json", arguments.json):
        if path is not None:
            path.write_text(text)
            console.print(f"written: {path}")


if __name__ == "__main__":
    main()
