"""Print how many of torch's own inputs each class of ours passes; exit code 1 if one fails that is not meant to.

python -m tests.conformance [--markdown] [CLASS ...]
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable

from tests.conformance import CLASSES, KINDS, Group, Outcome, groups, optimizers

TABLES = [  # what stands above its names, the names, the columns, and what is run
    ("class", CLASSES, KINDS, groups),
    ("optimizer", optimizers.OPTIMIZERS, optimizers.KINDS, optimizers.groups),
]


def main() -> int:
    """Run everything, or the classes that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="of torch_bp.nn or torch_bp.optim; all without one")
    parser.add_argument("--markdown", action="store_true", help="print the tables as README has them")
    options = parser.parse_args()
    unknown = set(options.classes).difference(*(names for _, names, _, _ in TABLES))
    if unknown:
        parser.error(f"no class of torch_bp.nn or torch_bp.optim that mirrors torch's: {', '.join(sorted(unknown))}")
    found: list[Outcome] = []
    for heading, names, kinds, groups_of in TABLES:
        asked = [name for name in options.classes if name in names] if options.classes else names
        if asked:
            print("\n" * bool(found) + _table(heading, asked, kinds, groups_of(), found, options.markdown))
    for outcome in found:
        if outcome.failure:
            print(f"\n{outcome.name}\n    {outcome.failure}")
        elif outcome.reason and not options.markdown:
            print(f"\n{outcome.name}\n    meant: {outcome.reason}")
    return 1 if any(outcome.failure for outcome in found) else 0


def _table(
    heading: str,
    names: list[str],
    kinds: tuple[str, ...],
    groups: Iterable[Group],
    found: list[Outcome],
    markdown: bool,
) -> str:
    """Run what there is for these names; add it to `found` and give its table."""
    passed: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for group in groups:
        if group.name in names:
            for outcome in group.outcomes():
                total[group.name, group.kind] += 1
                passed[group.name, group.kind] += not outcome.deviation
                found.append(outcome)
    cells = _cells(heading, names, kinds, passed, total)
    return _markdown(cells) if markdown else _plain(cells)


def _cells(heading: str, names: list[str], kinds: tuple[str, ...], passed: Counter, total: Counter) -> list[list[str]]:
    """The table, heading and total included."""

    def cell(keys: list[tuple[str, str]]) -> str:
        count = sum(total[key] for key in keys)
        return f"{sum(passed[key] for key in keys)} of {count}" if count else ""

    def row(title: str, of: list[str]) -> list[str]:
        columns = [[(name, kind) for name in of] for kind in kinds]
        return [title, *map(cell, columns), cell([key for column in columns for key in column])]

    return [[heading, *kinds, "all"], *(row(f"`{name}`", [name]) for name in names), row("all", names)]


def _markdown(cells: list[list[str]]) -> str:
    heading, *rows = cells
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows])


def _plain(cells: list[list[str]]) -> str:
    rows = [[cell.strip("`") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
