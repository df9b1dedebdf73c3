"""Comma-separated values: a folder of tables that pandas, R or a spreadsheet opens.

One file a site and quantity, one row a step: sequence, time, token, labels, then a column a unit.
Beside them the initial states of each site, the sequences and the calls. Numbers have as many
digits as it takes to get the same number back.
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

#: Rows that are brought into memory at once. As Python's numbers and texts they take more. Bytes.
BLOCK = 1024 * 1024

#: Digits that give back the same number, by type.
DIGITS = {"float16": 5, "float32": 9, "float64": 17}


def write_csv(content: ExportContent, path: Path) -> list[str]:
    """Write into a folder; there is nothing to note."""
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
    """One row a step, or a sequence: what it is, and its values."""
    if rows.axes[1] == "unit":
        names = [f"unit_{number}" for number in group["unit"].read(0, rows.shape[1])]
    else:
        names = [f"feature_{number}" for number in range(rows.shape[1])]
    digits = DIGITS[np.dtype(rows.dtype).name]
    pattern = ",".join([f"%.{digits}g"] * rows.shape[1])
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow([*(each.name for each in leading), *names])
        for part, block in rows.blocks(rows.items_per_block(BLOCK)):
            columns = [_cells(each.read(part.start, part.stop)) for each in leading]
            for first, values in zip(_lines(columns), block.tolist(), strict=True):
                file.write(f"{first},{pattern % tuple(values)}\n")


def _write_table(path: Path, variables: Sequence[Variable]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow([each.name for each in variables])
        count = variables[0].shape[0]
        for start in range(0, count, 65536):
            stop = min(start + 65536, count)
            for line in _lines([_cells(each.read(start, stop)) for each in variables]):
                file.write(f"{line}\n")


def _write_sequences(path: Path, sites: Sequence[SiteContent]) -> None:
    """One row a sequence of each module, of which some site is exported."""
    modules = {site.number: site for site in sites}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for index, site in enumerate(modules.values()):
            columns = [each for each in site.per_sequence() if each.name != "initial"]
            if not index:
                writer.writerow(["module", "sequence", *(each.name for each in columns)])
            count = len(site.index)
            cells = [_cells(each.read(0, count)) for each in columns]
            path_of = [site.module.path] * count
            for line in _lines([path_of, list(range(count)), *cells]):
                file.write(f"{line}\n")


def _cells(values: Array) -> list[Any]:
    """Python's numbers and texts; a number that is none is an empty cell."""
    if values.dtype.kind != "f":
        return list(values.tolist())
    digits = DIGITS[values.dtype.name]
    return ["" if each != each else f"%.{digits}g" % each for each in values.tolist()]


def _lines(columns: Sequence[Sequence[Any]]) -> list[str]:
    """Rows of some columns, as csv writes them, without the ends of the lines."""
    lines: list[str] = []
    # It puts quotes around what would end a line only if that is what ends its lines.
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerows(zip(*columns, strict=True))
    return [line.removesuffix("\r\n") for line in lines]
