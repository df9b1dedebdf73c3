"""Arguments, exit codes and the opening of traces, shared by the commands."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from grutrace.cli.output import echo
from grutrace.errors import OptionError
from grutrace.records import QUANTITIES
from grutrace.storage.hdf5.remote import is_url
from grutrace.storage.open import open_trace
from grutrace.storage.read.trace import Trace

#: Exit codes other than 0: the answer is no; an error, or nothing to answer.
EXIT_NO, EXIT_ERROR = 1, 2

File = Annotated[str, typer.Argument(help="A trace file, or its URL.", show_default=False)]
Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...",
        help="A trace file or its URL, or the shards of several processes: run.rank*.h5",
        show_default=False,
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

Sites = Annotated[list[str] | None, typer.Option(help="Glob for site names. May be repeated.")]
Record = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Quantities, separated by commas: {', '.join(QUANTITIES)}. May be repeated."
    ),
]


def split_names(values: list[str] | None) -> list[str] | None:
    """Split the values of an option that takes names separated by commas."""
    return None if values is None else [name for value in values for name in value.split(",")]


@contextmanager
def open_traces(files: Sequence[str | Path]) -> Iterator[Trace]:
    """Open a trace, and print warnings as lines on standard error.

    Args:
        files: One file, URL or glob, or several shards.

    Raises:
        TraceFileError: As for `grutrace.open`.
    """
    with warnings_as_lines():
        trace = open_trace(files[0] if len(files) == 1 else files)
    with trace:
        yield trace


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings as lines on standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        echo(f"grutrace: {warning.message}", stderr=True)


def require_local(files: Sequence[str]) -> list[Path]:
    """Return files on this machine as paths.

    Raises:
        OptionError: One of them is a URL.
    """
    for file in files:
        if is_url(file):
            raise OptionError(f"FILE: expected a file on this machine, found {file}: download it")
    return [Path(file) for file in files]


def display_name(files: Sequence[str | Path]) -> str:
    """Return the name of the files in the output."""
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
