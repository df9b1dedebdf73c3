"""How the examples print: one table, the paper's figures beside ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

Cell = str | int | float | None


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a table in Markdown, with its title above."""
    lines = [tuple(header), tuple("---" for _ in header), *(tuple(map(text, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    print(f"\n{title}\n")
    for line in lines:
        cells = (
            cell.ljust(width, "-" if cell == "---" else " ")
            for cell, width in zip(line, widths, strict=True)
        )
        print(f"| {' | '.join(cells)} |")


def text(cell: Cell) -> str:
    """Write a figure with three digits."""
    if cell is None:
        return ""
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def arguments(description: str | None) -> bool:
    """Read the command line; return whether the size is the small one."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="the size that the tests run")
    return bool(parser.parse_args().small)


def run(description: str | None, report: Callable[[bool], None]) -> None:
    """Print the report of an example, in the size that the command line asks for."""
    report(arguments(description))
