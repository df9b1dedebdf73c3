"""What commands have in common: arguments and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grutrace.record import QUANTITIES

#: Exit codes beside 0: the answer is no; there is no answer.
NO, NO_ANSWER = 1, 2

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


def names(given: list[str] | None) -> list[str] | None:
    """The names in what an option was given, once or more, with commas between."""
    return None if given is None else [name for each in given for name in each.split(",")]
