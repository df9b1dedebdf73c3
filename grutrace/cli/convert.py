"""`grutrace derive` stores deferred gates; `grutrace export` writes other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grutrace.cli.common import File, Files, Record, Sites, open_traces, split_names
from grutrace.cli.output import echo, progress_bar
from grutrace.cli.selection import EVERYTHING, Selection, with_selection
from grutrace.export.formats import FORMATS, export_trace
from grutrace.storage.open import open_trace
from grutrace.storage.recovery.preflight import check_in_subprocess


def derive(
    files: Files,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)
    ],
) -> None:
    """Write a trace file that stores the gates of a deferred trace.

    Exit codes: 0 success, 2 if the output exists, or if no gates are deferred.
    """
    # Imported here because it loads torch.
    from grutrace.analysis.verification.materialize import materialize_file

    check_in_subprocess(files)
    with open_traces(files) as trace, progress_bar("deriving") as advance:
        materialize_file(trace, output, advance)


@with_selection
def export(
    file: File,
    to: Annotated[
        str, typer.Option("--to", help=f"Format: one of {', '.join(FORMATS)}.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The file or folder to write.", show_default=False),
    ],
    site: Sites = None,
    record: Record = None,
    selection: Selection = EVERYTHING,
) -> None:
    """Write a trace as npz, netcdf, zarr, csv (a folder) or for LSTMVis (a folder).

    Exit codes: 0 success, 2 if the output exists, or if nothing matches.
    """
    with open_trace(file) as trace, progress_bar("exporting") as advance:
        report = export_trace(
            selection.apply(trace),
            output,
            to,
            sites=site,
            record=split_names(record),
            progress=advance,
        )
    for note in report.notes:
        echo(f"grutrace: {note}", stderr=True)
