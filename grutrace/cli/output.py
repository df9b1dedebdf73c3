"""Output of the commands: tables, JSON, progress bars and results of analyses."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, track

from grutrace.analysis.engine.result import Result
from grutrace.records import Array

Item = TypeVar("Item")

#: Text between two columns of a table.
COLUMN_GAP = "  "

#: Stands for the removed middle of a long name.
ELLIPSIS = "..."

#: Least width to which the first column of a table is shortened. Terminal columns.
MIN_FIRST_COLUMN = 20


@dataclass
class Column:
    """A column of a table.

    Attributes:
        header: The heading.
        justify: ``left`` or ``right``.
    """

    header: str
    justify: Literal["left", "right"] = "left"


class PlainTable:
    """A table of texts. Each row is printed on one line.

    Args:
        columns: Headings of the columns. The first column names the row.
    """

    def __init__(self, *columns: str) -> None:
        self.columns = [Column(header) for header in columns]
        self.rows: list[list[str]] = []

    def add_column(self, header: str, *, justify: Literal["left", "right"] = "left") -> None:
        """Add a column on the right."""
        self.columns.append(Column(header, justify))

    def add_row(self, *cells: object) -> None:
        """Add a row, escaped for the terminal; missing cells on the right are empty."""
        texts = ["" if cell is None else escape_control(cell) for cell in cells]
        self.rows.append([*texts, *[""] * (len(self.columns) - len(texts))])

    def lines(self, width: int) -> Iterator[str]:
        """Yield the header and the rows as lines.

        Lines wider than `width` are shortened in the first column, if that suffices. The middle of
        a long name is removed, because names of sites differ at their ends.
        """
        rows = [[column.header for column in self.columns], *self.rows]
        widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
        other_widths = sum(widths[1:]) + len(COLUMN_GAP) * (len(widths) - 1)
        widths[0] = min(widths[0], max(MIN_FIRST_COLUMN, width - other_widths))
        for name, *values in rows:
            cells = [shorten(name, widths[0]), *values]
            padded = (
                " " * (size - cell_len(cell)) + cell
                if column.justify == "right"
                else cell + " " * (size - cell_len(cell))
                for column, cell, size in zip(self.columns, cells, widths, strict=True)
            )
            yield COLUMN_GAP.join(padded).rstrip()


def shorten(text: str, width: int) -> str:
    """Shorten a text to `width` terminal columns by removing its middle."""
    if cell_len(text) <= width:
        return text
    remaining = width - len(ELLIPSIS)
    end = text[-(remaining - remaining // 2) :]
    return f"{set_cell_size(text, remaining // 2)}{ELLIPSIS}{end}"


def print_table(table: PlainTable) -> None:
    """Print a table, each row on one line that fits the terminal, or 80 columns without one."""
    console = new_console()
    header, *rows = table.lines(console.width)
    console.print(header, style="bold", soft_wrap=True)
    for row in rows:
        print(row)


def new_table(*columns: str) -> PlainTable:
    """Return an empty table in the style of all commands."""
    return PlainTable(*columns)


def new_console(*, stderr: bool = False) -> Console:
    """Return a console without markup, because names come from files of other people."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def escape_control(text: object) -> str:
    """Escape line breaks and control characters of a text that comes from a file."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in str(text)
    )


def echo(text: str, *, stderr: bool = False) -> None:
    """Print a line; control characters are escaped."""
    print(escape_control(text), file=sys.stderr if stderr else sys.stdout)


def percent(share: float) -> str:
    """Format a share as a percentage; NaN is empty."""
    return "" if math.isnan(share) else f"{100 * share:.1f} %"


def with_progress(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Iterate over the items, with a progress bar on a terminal."""
    console = new_console(stderr=True)
    return track(
        items,
        escape(escape_control(description)),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal.

    Yields:
        A function that takes the amount done and the total.
    """
    console = new_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(escape_control(description)))
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """Print a value as JSON.

    NaN becomes null, an infinity a text, a complex number a list of its two parts.
    """
    print(json.dumps(_to_json_value(value), indent=2, allow_nan=False))


def _to_json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json_value(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, complex):
        value = [value.real, value.imag]
    if isinstance(value, (list, tuple)):
        return [_to_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


#: Largest width of a value that is text. Terminal columns.
MAX_TEXT_WIDTH = 16

#: Quantiles that summarize a column, by heading.
QUANTILES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "most": 1.0}


def print_result(result: Result, all_values: bool) -> None:
    """Print the scalars of a result, then its columns: their quantiles, or all their values."""
    scalars = [f"{name} {_format_scalar(value)}" for name, value in result.scalars().items()]
    echo(f"{result.site}: {', '.join(scalars)}")
    columns = result.columns()
    index_name, *names = columns
    if all_values:
        table = new_table(index_name)
        for name in names:
            table.add_column(name.replace("_", " "), justify="right")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*map(format_value, row))
    else:
        table = new_table(f"over {index_name}s")
        for label in QUANTILES:
            table.add_column(label, justify="right")
        for name in names:
            if name not in result.index_columns:
                table.add_row(name.replace("_", " "), *_quantile_cells(columns[name]))
    if names:
        print_table(table)


def format_value(value: Any) -> str:
    """Format a value with three significant digits. NaN and False are empty."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else ""
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{value:.3g}"
    return str(value)


def _format_scalar(value: Any) -> str:
    """Format a single figure: unlike a cell, it is never empty."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "unknown"
    return format_value(value) or "no"


def _quantile_cells(column: Array) -> list[str]:
    """Return the quantiles of a column, without NaN.

    For booleans, the number of true values. For other values, such as texts, the most common ones
    with their counts.
    """
    if column.dtype == bool:
        return [f"{np.count_nonzero(column)} of {len(column)}", *[""] * (len(QUANTILES) - 1)]
    if column.dtype.kind not in "iuf":
        return _most_common_cells(column)
    numbers = column[~np.isnan(column)] if column.dtype.kind == "f" else column
    if not len(numbers):
        return [""] * len(QUANTILES)
    return [format_value(float(np.quantile(numbers, share))) for share in QUANTILES.values()]


def _most_common_cells(column: Array) -> list[str]:
    counts = Counter(map(format_value, column.tolist())).most_common()
    cell_count = len(QUANTILES)
    if len(counts) > cell_count:
        # The last cell counts the values that do not fit.
        other_count = sum(count for _, count in counts[cell_count - 1 :])
        counts = [*counts[: cell_count - 1], ("others", other_count)]
    cells = [f"{shorten(name, MAX_TEXT_WIDTH)}: {count}" for name, count in counts]
    return [*cells, *[""] * (cell_count - len(cells))]
