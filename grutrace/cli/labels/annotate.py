"""`grutrace annotate`: add tokens and labels to a finished file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from grutrace.cli.common import File, open_traces, require_local
from grutrace.cli.output import echo
from grutrace.errors import GrutraceError, OptionError, join_names, short_repr
from grutrace.storage.read.trace import Trace
from grutrace.storage.recovery.preflight import check_in_subprocess

#: Columns of a table that are no label. `token` and `tokens` are the same.
SEQUENCE, STEP, MODULE = "sequence", "step", "module"
TOKENS = ("token", "tokens")


def annotate(
    file: File,
    labels: Annotated[Path, typer.Argument(help="A .csv, .tsv or .json file.", show_default=False)],
    module: Annotated[
        str | None,
        typer.Option(
            metavar="GLOB", help="Path of the modules. [default: those that the values fit]"
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A column whose numbers are texts. May be repeated."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace values that steps have already.")
    ] = False,
) -> None:
    """Add tokens and labels to the sequences of a finished trace file.

    LABELS is a table with the columns sequence, step, and one per label (tokens for tokens), with a
    row per step; without step, a row gives a label to all steps of a sequence. An empty cell is no
    label. A .json file has {"tokens": ..., "labels": {NAME: ...}}, as Trace.annotate takes them.
    Exit codes: 0 success, 2 if the values do not fit, or the file cannot be written.
    """
    check_in_subprocess(require_local([file]))
    with open_traces([file]) as trace:
        for arguments in _read(labels, text or [], trace, module):
            trace.annotate(**arguments, replace=replace)
            names = [*(["tokens"] if "tokens" in arguments else []), *arguments.get("labels", {})]
            echo(f"{file}: added {join_names(names)}")


def _read(
    path: Path, texts: Sequence[str], trace: Trace, module: str | None
) -> Iterator[dict[str, Any]]:
    """Yield arguments of `Trace.annotate`."""
    if path.suffix.lower() == ".json":
        yield _read_json(path) | ({} if module is None else {"module": module})
        return
    table = _read_table(path)
    yield from _arguments_of_table(path, table, texts, trace, module)


def _read_json(path: Path) -> dict[str, Any]:
    with _translated(path):
        content = json.loads(path.read_text(encoding="utf-8"))
    known = ("tokens", "labels", "module")
    if not isinstance(content, dict) or not content or not set(content) <= set(known):
        raise OptionError(
            f'{path}: expected {{"tokens": ..., "labels": {{NAME: ...}}, "module": ...}}; found '
            f"{short_repr(content)}"
        )
    return content


def _read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table, by the names of its columns."""
    with _translated(path), path.open(encoding="utf-8-sig", newline="") as stream:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        names = list(reader.fieldnames or ())
        if SEQUENCE not in names or not _label_columns(names) or len(set(names)) < len(names):
            raise OptionError(
                f"{path}: expected the columns sequence, step (optional) and one per label, "
                f"found {join_names(names)}"
            )
        rows = []
        for row in reader:
            # A row of another length has a key None, or a value None.
            if None in row or None in row.values():
                raise OptionError(
                    f"{path}, line {reader.line_num}: expected {len(names)} columns, found another "
                    "number"
                )
            rows.append({**row, "": str(reader.line_num)})
    return rows


def _label_columns(names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in (SEQUENCE, STEP, MODULE, "")]


def _arguments_of_table(
    path: Path,
    table: Sequence[Mapping[str, str]],
    texts: Sequence[str],
    trace: Trace,
    module: str | None,
) -> Iterator[dict[str, Any]]:
    if not table:
        raise OptionError(f"{path}: expected a row per step or per sequence, found none")
    columns = _label_columns(list(table[0]))
    unknown = [name for name in texts if name not in columns]
    if unknown:
        raise OptionError(f"text: {unknown[0]!r} is no column of {path}: {join_names(columns)}")
    numbers = [name for name in columns if name not in texts and _are_numbers(table, name)]
    for path_of_module, lengths in _lengths(path, table, trace, module).items():
        values: dict[str, dict[int, Any]] = {name: {} for name in columns}
        for row in table:
            if row.get(MODULE, path_of_module) != path_of_module:
                continue
            where = f"{path}, line {row['']}"
            sequence = _index(where, SEQUENCE, row[SEQUENCE], len(lengths))
            step = None
            if STEP in row:
                step = _index(where, STEP, row[STEP], lengths[sequence])
            for name in columns:
                cell: str | float | None = row[name] or None
                if cell is not None and name in numbers:
                    cell = float(cell)
                if cell is None:
                    continue
                steps = values[name].setdefault(sequence, [None] * lengths[sequence])
                where_set = range(len(steps)) if step is None else (step,)
                for position in where_set:
                    if steps[position] is not None:
                        raise OptionError(
                            f"{where}: {name} of sequence {sequence}, step {position} was given "
                            "before"
                        )
                    steps[position] = cell
        arguments: dict[str, Any] = {"module": path_of_module, "labels": {}}
        for name, of_sequences in values.items():
            if name in TOKENS:
                arguments["tokens"] = of_sequences
            else:
                arguments["labels"][name] = of_sequences
        yield arguments


def _lengths(
    path: Path, table: Sequence[Mapping[str, str]], trace: Trace, module: str | None
) -> dict[str, list[int]]:
    """Return the lengths of the sequences of each module that the table is for."""
    modules = {info.path: trace[info.sites[0].name].lengths.tolist() for info in trace.modules}
    if MODULE in table[0]:
        wanted = dict.fromkeys(row[MODULE] for row in table)
    elif module is not None:
        wanted = {module: None}
    else:
        # A table need not name all sequences: it is for the one module that there is.
        wanted = dict.fromkeys(modules)
    unknown = [name for name in wanted if name not in modules]
    if unknown or (len(wanted) > 1 and MODULE not in table[0]):
        paths = join_names(map(repr, modules))
        raise OptionError(
            f"{path}: expected --module, or a column module, with one of {paths}; found "
            f"{repr(unknown[0]) if unknown else 'neither'}"
        )
    return {name: modules[name] for name in wanted}


def _index(where: str, column: str, cell: str, count: int) -> int:
    try:
        number = int(cell)
    except ValueError:
        number = -1
    if not 0 <= number < count:
        raise OptionError(f"{where}: {column}: expected a number below {count}, found {cell!r}")
    return number


def _are_numbers(table: Sequence[Mapping[str, str]], name: str) -> bool:
    """Return whether all cells of a column that are not empty are numbers."""
    for row in table:
        try:
            float(row[name] or 0)
        except ValueError:
            return False
    return True


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into one line."""
    try:
        yield
    except GrutraceError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"{path} cannot be read: {reason}") from None
