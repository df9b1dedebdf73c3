"""`grutrace recover`: copy the intact part of an unfinished or damaged trace to a new file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from grutrace.cli.common import EXIT_NO, AsJSON, File, require_local
from grutrace.cli.output import new_table, print_json, print_table, progress_bar
from grutrace.storage.recovery.recover import RecoveryReport, recover_file


def recover(
    file: File,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)
    ],
    as_json: AsJSON = False,
) -> None:
    """Write all committed rows of a trace to a new file, which any HDF5 tool can open.

    FILE may be unfinished (its writer was killed), truncated, damaged or intact; it is not changed.
    All parts of a run are recovered. Exit codes: 0 everything committed was recovered, 1 some of it
    is lost, 2 nothing can be recovered.
    """
    (path,) = require_local([file])
    with progress_bar("recovering") as advance:
        reports = recover_file(path, output, advance)
    if as_json:
        print_json([_to_json(report) for report in reports])
    else:
        for report in reports:
            print_recovery(report)
    if any(report.lost for report in reports):
        raise typer.Exit(EXIT_NO)


def _to_json(report: RecoveryReport) -> dict[str, object]:
    paths = {"source": str(report.source), "path": str(report.path)}
    return dataclasses.asdict(report) | paths


def print_recovery(report: RecoveryReport) -> None:
    """Print the recovered calls, and the lost and the dropped items."""
    print(f"{report.path}: {report.calls} calls of {report.source}, {_state(report)}")
    if report.lost:
        lost = ", ".join(f"{count} {name}" for name, count in report.lost.items())
        print(f"lost of what was committed: {lost}; {report.reason}")
    if report.repaired:
        print(
            f"{report.repaired} HDF5 structures were incomplete, as after a power loss, and were "
            f"repaired: check the result with grutrace verify {report.path}"
        )
    if not report.dropped:
        print("nothing was dropped")
        return
    table = new_table("dropped from")
    table.add_column("items", justify="right")
    for dataset_path, count in report.dropped.items():
        table.add_row(dataset_path, str(count))
    print_table(table)
    reasons = ["were not committed"] + ["belong to what is lost"] * bool(report.lost)
    print(f"These {' or '.join(reasons)}.")


def _state(report: RecoveryReport) -> str:
    closed = "closed in order" if report.closed else "left behind by its writer"
    return f"which was {closed}"
