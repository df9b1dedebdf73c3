"""`grutrace derive`: gates that are derived when they are read, stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grutrace.cli.arguments import Files
from grutrace.cli.opening import opened
from grutrace.cli.output import progress_bar
from grutrace.storage.probe import look_from_outside


def derive(
    files: Files,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)
    ],
) -> None:
    """Write a trace file that stores what this one derives when it is read.

    Exits with 2 if the output exists, or there is nothing to derive.
    """
    # Here for the same reason.
    from grutrace.analysis.derivation import derive_file

    look_from_outside(files)
    with opened(files) as trace, progress_bar("deriving") as advance:
        derive_file(trace, output, advance)
