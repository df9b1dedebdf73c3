"""`grutrace run`: run an unchanged script, and trace the GRUs of its models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grutrace.cli.common import split_names
from grutrace.options import OPTIONS
from grutrace.records import DEFAULT_RECORD
from grutrace.run.launch import launch
from grutrace.run.parsing import parse_size
from grutrace.run.settings import Settings


def run(
    program: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT [ARGS]...", help="A script and its arguments."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The trace file to write.")] = Path(
        "run.h5"
    ),
    module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is the name of a module, as for python -m.")
    ] = False,
    sites: Annotated[
        list[str] | None, typer.Option(help=f"{OPTIONS['sites'].help} May be repeated.")
    ] = None,
    record: Annotated[
        list[str] | None,
        typer.Option(help=f"{OPTIONS['record'].help} Separated by commas. May be repeated."),
    ] = None,
    mode: Annotated[str, typer.Option(help=OPTIONS["mode"].help)] = "w",
    check: Annotated[str, typer.Option(help=OPTIONS["check"].help)] = "warn",
    stacks: Annotated[str, typer.Option(help=OPTIONS["stacks"].help)] = "auto",
    gates: Annotated[str, typer.Option(help=OPTIONS["gates"].help)] = "auto",
    every: Annotated[int, typer.Option(help=OPTIONS["every"].help)] = 1,
    max_calls: Annotated[int | None, typer.Option(help=OPTIONS["max_calls"].help)] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help=f"{OPTIONS['max_bytes'].help} For example 10GB or 512MiB.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=OPTIONS["dtype"].help)] = None,
    units: Annotated[
        str | None, typer.Option(help=f"{OPTIONS['units'].help} For example 0,3,7 or 0:32.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help=f"{OPTIONS['steps'].help} For example 5:20.")
    ] = None,
    on_error: Annotated[str, typer.Option(help=OPTIONS["on_error"].help)] = "warn",
    fsync: Annotated[bool, typer.Option("--fsync", help=OPTIONS["fsync"].help)] = False,
    compression: Annotated[str | None, typer.Option(help=OPTIONS["compression"].help)] = None,
    checksums: Annotated[bool, typer.Option("--checksums", help=OPTIONS["checksums"].help)] = False,
    weights: Annotated[str, typer.Option(help=OPTIONS["weights"].help)] = "auto",
    compiled: Annotated[str, typer.Option(help=OPTIONS["compiled"].help)] = "auto",
    state_memory: Annotated[
        str | None, typer.Option(help=f"{OPTIONS['state_memory'].help} For example 64MiB.")
    ] = None,
    buffer: Annotated[
        str | None, typer.Option(help=f"{OPTIONS['buffer'].help} For example 64MiB.")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no messages of grutrace.")
    ] = False,
) -> None:
    """Run a script as python does, and trace the GRUs of every model in it.

    Exit code: that of the script; 2 if grutrace cannot start it.
    """
    settings = Settings(
        str(output),
        tuple(sites or ()),
        tuple(split_names(record) or DEFAULT_RECORD),
        mode,
        stacks,
        check,
        gates,
        every=every,
        max_calls=max_calls,
        max_bytes=None if max_bytes is None else parse_size(max_bytes),
        dtype=dtype,
        units=units,
        steps=steps,
        on_error=on_error,
        fsync=fsync,
        compression=compression,
        checksums=checksums,
        weights=weights,
        compiled=compiled,
        state_memory=None if state_memory is None else parse_size(state_memory, "state_memory"),
        buffer=None if buffer is None else parse_size(buffer, "buffer"),
        quiet=quiet,
    )
    launch(settings, program, module=module)
