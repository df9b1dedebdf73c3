"""What commands have in common: arguments and exit codes.

What commands read: a trace in a file, or in the shards of several processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from grutrace.cli.output import echo
from grutrace.records import QUANTITIES
from grutrace.storage.open import open_trace
from grutrace.storage.read.trace import Trace

#: Exit codes beside 0: the answer is no; there is no answer.
EXIT_NO, EXIT_ERROR = 1, 2

File = Annotated[Path, typer.Argument(help="A trace file.", show_default=False)]
Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...",
        help="A trace file; or the shards of several processes: run.rank*.h5",
        show_default=False,
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

Sites = Annotated[list[str] | None, typer.Option(help="Glob for names of sites. Can be repeated.")]
Record = Annotated[
    list[str] | None,
    typer.Option(help=f"Out of {', '.join(QUANTITIES)}; commas between. Can be repeated."),
]


def split_names(given: list[str] | None) -> list[str] | None:
    """The names in what an option was given, once or more, with commas between."""
    return None if given is None else [name for each in given for name in each.split(",")]


@contextmanager
def open_traces(files: Sequence[Path]) -> Iterator[Trace]:
    """Open a trace. What is doubtful about it becomes a line on standard error.

    Args:
        files: One file or glob, or several shards.

    Raises:
        TraceFileError: As for `grutrace.open`.
    """
    with warnings_as_lines():
        trace = open_trace(files[0] if len(files) == 1 else files)
    with trace:
        yield trace


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Turn warnings into lines on standard error."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield
    for each in given:
        echo(f"grutrace: {each.message}", stderr=True)


def display_name(files: Sequence[Path]) -> str:
    """What output calls them."""
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
