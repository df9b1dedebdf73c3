"""`grutrace run`: an unchanged script, with the GRUs of its models traced."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grutrace.records import DEFAULT_RECORD, QUANTITIES
from grutrace.run.launch import launch
from grutrace.run.settings import (
    CHECKS,
    COMPILED,
    DTYPES,
    GATES,
    MODES,
    ON_ERROR,
    STACKS,
    WEIGHTS,
    Settings,
)
from grutrace.run.texts import size
from grutrace.storage.hdf5.filters import COMPRESSIONS


def run(
    program: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT [ARGS]...", help="A script and its own arguments."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace.")] = Path("run.h5"),
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module.")] = False,
    sites: Annotated[
        list[str] | None, typer.Option(help="Glob for names of sites. Can be repeated.")
    ] = None,
    record: Annotated[
        list[str] | None,
        typer.Option(help=f"Out of {', '.join(QUANTITIES)}; commas between. Can be repeated."),
    ] = None,
    mode: Annotated[str, typer.Option(help=f"For a trace that exists: {', '.join(MODES)}.")] = "w",
    check: Annotated[
        str, typer.Option(help=f"What a residual past rounding does: {', '.join(CHECKS)}.")
    ] = "warn",
    stacks: Annotated[
        str, typer.Option(help=f"How lower layers are seen: {', '.join(STACKS)}.")
    ] = "auto",
    gates: Annotated[
        str, typer.Option(help=f"When they are computed: {', '.join(GATES)}.")
    ] = "auto",
    every: Annotated[int, typer.Option(help="Of each module, only each n-th call.")] = 1,
    max_calls: Annotated[
        int | None, typer.Option(help="Record no more than this many calls.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Record no more than this: 10GB, 512MiB.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"What rows are kept as: {', '.join(DTYPES)}.")
    ] = None,
    units: Annotated[str | None, typer.Option(help="Only these units: 0,3,7 or 0:32.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Only these steps of each sequence: 5:20.")
    ] = None,
    on_error: Annotated[
        str, typer.Option(help=f"What a file that fails does to the script: {', '.join(ON_ERROR)}.")
    ] = "warn",
    fsync: Annotated[
        bool, typer.Option("--fsync", help="Have the disk itself hold what counts.")
    ] = False,
    compression: Annotated[
        str | None, typer.Option(help=f"Of the rows: {', '.join(COMPRESSIONS)}.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help=f"When every byte of them is compared: {', '.join(WEIGHTS)}.")
    ] = "auto",
    compiled: Annotated[
        str, typer.Option(help=f"How compiled code runs: {', '.join(COMPILED)}.")
    ] = "auto",
    state_memory: Annotated[
        str | None, typer.Option(help="Of states, to tell which sequence goes on: 64MiB.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing of our own.")] = False,
) -> None:
    """Run a script as python would, and trace the GRUs of every model in it."""
    asked = [name for names in record or [",".join(DEFAULT_RECORD)] for name in names.split(",")]
    settings = Settings(
        str(output),
        tuple(sites or ()),
        tuple(asked),
        mode,
        stacks,
        check,
        gates,
        every=every,
        max_calls=max_calls,
        max_bytes=None if max_bytes is None else size(max_bytes),
        dtype=dtype,
        units=units,
        steps=steps,
        on_error=on_error,
        fsync=fsync,
        compression=compression,
        weights=weights,
        compiled=compiled,
        state_memory=None if state_memory is None else size(state_memory),
        quiet=quiet,
    )
    launch(settings, program, module=module)
