"""`grutrace recover`: copy the intact part of an unfinished or damaged trace to a new file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from grutrace.cli.common import EXIT_NO, AsJSON, File
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
    with progress_bar("recovering") as advance:
        found = recover_file(file, output, advance)
    if as_json:
        print_json([_as_json(each) for each in found])
    else:
        for each in found:
            print_recovery(each)
    if any(each.lost for each in found):
        raise typer.Exit(EXIT_NO)


def _as_json(recovery: RecoveryReport) -> dict[str, object]:
    paths = {"source": str(recovery.source), "path": str(recovery.path)}
    return dataclasses.asdict(recovery) | paths


def print_recovery(recovery: RecoveryReport) -> None:
    """Print the recovered calls, and the lost and the dropped items."""
    print(f"{recovery.path}: {recovery.calls} calls of {recovery.source}, {_state(recovery)}")
    if recovery.lost:
        lost = ", ".join(f"{count} {name}" for name, count in recovery.lost.items())
        print(f"lost of what was committed: {lost}; {recovery.reason}")
    if recovery.repaired:
        print(
            f"{recovery.repaired} HDF5 structures were incomplete, as after a power loss, and were "
            f"repaired: check the result with grutrace verify {recovery.path}"
        )
    if not recovery.dropped:
        print("nothing was dropped")
        return
    table = new_table("dropped from")
    table.add_column("items", justify="right")
    for place, count in recovery.dropped.items():
        table.add_row(place, str(count))
    print_table(table)
    reasons = ["were not committed"] + ["belong to what is lost"] * bool(recovery.lost)
    print(f"These {' or '.join(reasons)}.")


def _state(recovery: RecoveryReport) -> str:
    closed = "closed in order" if recovery.closed else "left behind by its writer"
    return f"which was {closed}"
