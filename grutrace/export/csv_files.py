"""Export to CSV: a folder of tables for pandas, R or a spreadsheet.

Each site and quantity has a file with one row per step: sequence, time, token, labels and one
column per unit. Further files have the initial states of each site, the sequences and the calls.
Numbers have enough digits to be read back exactly.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from grutrace.export.portability import file_names
from grutrace.export.variables import ExportContent, Group, SiteContent, Variable
from grutrace.records import Array

#: Bytes of rows that are read at once. As Python floats and strings they take more.
BLOCK = 1024 * 1024

#: Digits that represent a number exactly, by type.
DIGITS = {"float16": 5, "float32": 9, "float64": 17}


def write_csv(content: ExportContent, path: Path) -> list[str]:
    """Write the tables into a folder. Returns no notes."""
    _write_table(path / "calls.csv", content.calls.variables)
    _write_sequences(path / "sequences.csv", content.sites)
    groups = [site.group() for site in content.sites]
    names = file_names(group.name for group in groups)
    for site, group in zip(content.sites, groups, strict=True):
        file = names[group.name]
        steps = tuple(site.per_step())
        for name in site.quantities:
            _write_rows(path / f"{file}.{name}.csv", group, steps, group[name])
        number = Variable(
            "sequence", ("instance",), (len(site.index),), np.dtype(np.int64), np.arange
        )
        _write_rows(path / f"{file}.initial.csv", group, (number,), group["initial"])
    return []


def _write_rows(path: Path, group: Group, leading: Sequence[Variable], rows: Variable) -> None:
    """Write one row per step or sequence: the leading columns, then its values."""
    if rows.axes[1] == "unit":
        names = [f"unit_{number}" for number in group["unit"].read(0, rows.shape[1])]
    else:
        names = [f"feature_{number}" for number in range(rows.shape[1])]
    digits = DIGITS[np.dtype(rows.dtype).name]
    pattern = ",".join([f"%.{digits}g"] * rows.shape[1])
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(
            [*(variable.name for variable in leading), *names]
        )
        for part, block in rows.blocks(rows.items_per_block(BLOCK)):
            columns = [_cells(variable.read(part.start, part.stop)) for variable in leading]
            for first, values in zip(_lines(columns), block.tolist(), strict=True):
                file.write(f"{first},{pattern % tuple(values)}\n")


def _write_table(path: Path, variables: Sequence[Variable]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow([variable.name for variable in variables])
        count = variables[0].shape[0]
        for start in range(0, count, 65536):
            stop = min(start + 65536, count)
            for line in _lines([_cells(variable.read(start, stop)) for variable in variables]):
                file.write(f"{line}\n")


def _write_sequences(path: Path, sites: Sequence[SiteContent]) -> None:
    """Write one row for each sequence of each module with an exported site."""
    modules = {site.number: site for site in sites}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for index, site in enumerate(modules.values()):
            columns = [variable for variable in site.per_sequence() if variable.name != "initial"]
            if not index:
                writer.writerow(["module", "sequence", *(variable.name for variable in columns)])
            count = len(site.index)
            cells = [_cells(variable.read(0, count)) for variable in columns]
            path_of = [site.module.path] * count
            for line in _lines([path_of, list(range(count)), *cells]):
                file.write(f"{line}\n")


def _cells(values: Array) -> list[Any]:
    """Return the values as Python numbers and strings. NaN is an empty cell."""
    if values.dtype.kind != "f":
        return list(values.tolist())
    digits = DIGITS[values.dtype.name]
    return ["" if value != value else f"%.{digits}g" % value for value in values.tolist()]


def _lines(columns: Sequence[Sequence[Any]]) -> list[str]:
    """Return the rows of some columns as lines of CSV, without line ends."""
    lines: list[str] = []
    # The csv module quotes a character that ends lines only if it is in its own line terminator.
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerows(zip(*columns, strict=True))
    return [line.removesuffix("\r\n") for line in lines]
