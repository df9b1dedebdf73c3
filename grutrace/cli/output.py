"""How commands print: tables, JSON, bars of progress."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, track
from rich.table import Table

Item = TypeVar("Item")

#: Rows of a table that is printed as it fits the terminal.
LONG = 200


class PlainTable(Table):
    """A table whose cells are texts, and nothing more."""

    def __init__(self, *columns: str, **options: Any) -> None:
        super().__init__(*columns, **options)
        self.lines: list[list[str]] = []

    def add_row(self, *cells: object, **options: Any) -> None:
        """Add a row, written as `plain` does."""
        texts = ["" if cell is None else plain(cell) for cell in cells]
        self.lines.append(texts)
        super().add_row(*texts, **options)


def print_table(table: PlainTable) -> None:
    """Print a table; a long one with each row on a line of its own, since to wrap it takes long."""
    if len(table.lines) <= LONG:
        new_console().print(table)
        return
    count = len(table.columns)
    rows = [[str(column.header) for column in table.columns]]
    rows += [[*line, *[""] * (count - len(line))] for line in table.lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [column.justify == "right" for column in table.columns]
    for row in rows:
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        print("  ".join(cells).rstrip())


def new_table(*columns: str) -> PlainTable:
    """Return an empty table in the style of all commands."""
    return PlainTable(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))


def new_console(*, stderr: bool = False) -> Console:
    """Return a console that takes no text for markup: names come from files of others."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def plain(text: object) -> str:
    """Write a text that comes from a file as one line that does nothing to a terminal."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in str(text)
    )


def say(text: str, *, stderr: bool = False) -> None:
    """Print a line, of which parts may come from a file."""
    print(plain(text), file=sys.stderr if stderr else sys.stdout)


def percent(share: float) -> str:
    """Write a share in percent."""
    return "" if math.isnan(share) else f"{100 * share:.1f} %"


def with_progress(items: Sequence[Item], doing: str) -> Iterable[Item]:
    """Yield the items, with a bar on a terminal."""
    console = new_console(stderr=True)
    return track(
        items,
        escape(plain(doing)),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, which is told how much is done of how much."""
    console = new_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(plain(doing)))
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """Print a value as JSON.

    What is no number is null, an infinity a text, a complex number its two parts.
    """
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, complex):
        value = [value.real, value.imag]
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
