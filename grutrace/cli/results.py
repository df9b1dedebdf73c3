"""How a result of an analysis looks in a terminal."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from grutrace.analysis.result import Result
from grutrace.cli.output import new_table, print_table, say, shortened
from grutrace.record import Array

#: Columns of a terminal that a value takes at most which is no number.
LONGEST = 16

#: What is said of a column whose every value is not printed.
QUANTILES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "most": 1.0}


def print_result(result: Result, each: bool) -> None:
    """Print what is one number, then the columns: their quantiles, or each of their values."""
    figures = [f"{name} {_figure(found)}" for name, found in result.figures().items()]
    say(f"{result.site}: {', '.join(figures)}")
    columns = result.columns()
    numbers, *others = columns
    if each:
        table = new_table(numbers)
        for name in others:
            table.add_column(name.replace("_", " "), justify="right")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*map(value, row))
    else:
        table = new_table(f"over {numbers}s")
        for label in QUANTILES:
            table.add_column(label, justify="right")
        for name in (other for other in others if other not in result.places):
            table.add_row(name.replace("_", " "), *_quantiles(columns[name]))
    if others:
        print_table(table)


def value(found: Any) -> str:
    """Write a number as short as it is still told apart."""
    if isinstance(found, (bool, np.bool_)):
        return "yes" if found else ""
    if isinstance(found, (float, np.floating)):
        return "" if np.isnan(found) else f"{found:.3g}"
    return str(found)


def _figure(found: Any) -> str:
    """Write a figure that stands by itself: nothing at all would not do."""
    if found is None or (isinstance(found, float) and np.isnan(found)):
        return "unknown"
    return value(found) or "no"


def _quantiles(column: Array) -> list[str]:
    """Of the values that are numbers; of what is true or false, how many are true.

    Of other values, such as texts, the commonest and how often each comes.
    """
    if column.dtype == bool:
        return [f"{np.count_nonzero(column)} of {len(column)}", *[""] * (len(QUANTILES) - 1)]
    if column.dtype.kind not in "iuf":
        return _commonest(column)
    numbers = column[~np.isnan(column)] if column.dtype.kind == "f" else column
    if not len(numbers):
        return [""] * len(QUANTILES)
    return [value(float(np.quantile(numbers, share))) for share in QUANTILES.values()]


def _commonest(column: Array) -> list[str]:
    counts = Counter(map(value, column.tolist())).most_common()
    room = len(QUANTILES)
    if len(counts) > room:
        # The last cell is for all that do not fit.
        rest = sum(count for _, count in counts[room - 1 :])
        counts = [*counts[: room - 1], ("others", rest)]
    cells = [f"{shortened(name, LONGEST)}: {count}" for name, count in counts]
    return [*cells, *[""] * (room - len(cells))]
