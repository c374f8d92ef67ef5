"""Print how many of torch's own inputs each class of ours passes; exit code 1 if one fails that is not meant to.

python -m tests.conformance [--markdown] [CLASS ...]
"""

import argparse
import sys
from collections import Counter

from tests.conformance import CLASSES, KINDS, Outcome, groups


def main() -> int:
    """Run everything, or the classes that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="of torch_bp.nn; all without one")
    parser.add_argument("--markdown", action="store_true", help="print the table as README has it")
    options = parser.parse_args()
    unknown = set(options.classes) - set(CLASSES)
    if unknown:
        parser.error(f"no class of torch_bp.nn that mirrors torch's: {', '.join(sorted(unknown))}")
    passed: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    found: list[Outcome] = []
    names = options.classes or CLASSES
    for group in groups():
        if group.name in names:
            for outcome in group.outcomes():
                total[group.name, group.kind] += 1
                passed[group.name, group.kind] += not outcome.deviation
                found.append(outcome)
    print(_markdown(names, passed, total) if options.markdown else _plain(names, passed, total))
    for outcome in found:
        if outcome.failure:
            print(f"\n{outcome.name}\n    {outcome.failure}")
        elif outcome.reason and not options.markdown:
            print(f"\n{outcome.name}\n    meant: {outcome.reason}")
    return 1 if any(outcome.failure for outcome in found) else 0


def _cells(names: list[str], passed: Counter, total: Counter) -> list[list[str]]:
    """The table, heading and total included."""

    def cell(keys: list[tuple[str, str]]) -> str:
        count = sum(total[key] for key in keys)
        return f"{sum(passed[key] for key in keys)} of {count}" if count else ""

    def row(title: str, of: list[str]) -> list[str]:
        columns = [[(name, kind) for name in of] for kind in KINDS]
        return [title, *map(cell, columns), cell([key for column in columns for key in column])]

    return [["class", *KINDS, "all"], *(row(f"`{name}`", [name]) for name in names), row("all", names)]


def _markdown(names: list[str], passed: Counter, total: Counter) -> str:
    heading, *rows = _cells(names, passed, total)
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows])


def _plain(names: list[str], passed: Counter, total: Counter) -> str:
    rows = [[cell.strip("`") for cell in row] for row in _cells(names, passed, total)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
