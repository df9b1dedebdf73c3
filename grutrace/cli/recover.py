"""`grutrace recover`: what is whole of a trace that was left behind or damaged, in a sound file."""

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
    """Write all that is committed in a trace to a new file, which any HDF5 tool opens.

    FILE may be left behind by a writer that was killed, cut short, damaged, or sound; it is not
    changed. Of a run, all parts are recovered. Exits with 1 if something that was committed is
    lost, and with 2 if nothing can be recovered.
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
    """Print what became of a file."""
    print(f"{recovery.path}: {recovery.calls} calls of {recovery.source}, {_state(recovery)}")
    if recovery.lost:
        lost = ", ".join(f"{count} {name}" for name, count in recovery.lost.items())
        print(f"lost of what was committed: {lost}; {recovery.reason}")
    if recovery.repaired:
        print(
            f"{recovery.repaired} structures of HDF5 were half written, as after a loss of power, "
            f"and were read all the same: have it verified (grutrace verify {recovery.path})"
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
