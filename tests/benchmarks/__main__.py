"""`python -m tests.benchmarks [name ...] [--json FILE]`: measure, print one table, keep it under `logs/benchmarks/`."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks import operations, optimizers, start
from tests.benchmarks.protocol import Result, machine

BENCHMARKS: dict[str, Callable[[str], Iterator[Result]]] = {
    "C1": optimizers.measure,
    "C2": optimizers.measure,
    "C5": operations.measure,
    "start": start.measure,
}


def table(results: list[Result]) -> Table:
    """Ratios below 1 mean that ours is faster."""
    columns = ("", "what", "workload", "against", "ours / peer", "95 %", "ours", "peer", "target", "")
    drawn = Table(*columns, title="time, ours / peer; medians of interleaved pairs")
    for r in results:
        verdict = {None: "", True: "met", False: "missed"}[r.met]
        numbers = f"{r.ratio:.2f}", f"{r.low:.2f}-{r.high:.2f}", f"{r.ours_us:.0f} us", f"{r.peer_us:.0f} us"
        drawn.add_row(r.group, r.what, r.workload, r.peer, *numbers, f"{r.target}" if r.target else "", verdict)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    unknown = [n for n in arguments.names if n not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}, expected one of {', '.join(BENCHMARKS)}")
    console = Console()
    wide = console if console.is_terminal else Console(width=160)
    console.print(machine())
    results = []
    for name in arguments.names or BENCHMARKS:
        for result in BENCHMARKS[name](name):
            results.append(result)
            console.print(f"{result.group} {result.what}, {result.workload}, {result.peer}: {result.ratio:.2f}")
    wide.print(table(results))
    text = json.dumps({"machine": machine(), "results": [r.as_dict() for r in results]}, indent=1)
    folder = Path("logs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}.json", arguments.json):
        if path is not None:
            path.write_text(text)
            console.print(f"written: {path}")


if __name__ == "__main__":
    main()
