"""`grutrace merge`: combine the shards of several processes in one file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from grutrace.cli.common import AsJSON, Files, display_name, require_local, warnings_as_lines
from grutrace.cli.output import echo, print_json, progress_bar
from grutrace.storage.shards.merge import MergeReport, merge_shards


def merge(
    files: Files,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)
    ],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy all rows, so that the shards can be deleted.")
    ] = False,
    as_json: AsJSON = False,
) -> None:
    """Make one trace file from the shards of several processes. The rows stay in the shards.

    Statistics files of several processes can be merged too. Exit codes: 0 success, 2 if the output
    exists, or if the files are not of one run.
    """
    from grutrace.statistics.file import is_statistics

    paths = require_local(files)
    if all(map(is_statistics, paths)):
        _merge_statistics(paths, output)
        return
    with warnings_as_lines(), progress_bar("copying") as advance:
        report = merge_shards(
            paths[0] if len(paths) == 1 else paths, output, copy=copy, progress=advance
        )
    if as_json:
        print_json(dataclasses.asdict(report) | {"unclosed": list(map(str, report.unclosed))})
    else:
        print_report(report, output, copy=copy)


def print_report(report: MergeReport, output: Path, *, copy: bool) -> None:
    """Print the merged calls and ranks, and the copied bytes."""
    calls = sum(shard.calls for shard in report.shards)
    ranks = ", ".join(str(shard.rank) for shard in report.shards)
    echo(f"{output}: {calls} calls of ranks {ranks}")
    if report.copied and not copy:
        names = ", ".join(path.name for path in report.unclosed)
        echo(f"copied {report.copied / 1e6:.1f} MB, because these shards were not closed: {names}")
    elif copy:
        echo(f"copied {report.copied / 1e6:.1f} MB")
    files = sum(len(shard.files) for shard in report.shards)
    if files:
        echo(
            f"rows stay in {files} other files: keep them in the same folder. For a file that "
            "leaves the folder, or goes on a server, merge with --copy; some programs also read "
            "no rows from a file that refers to others"
        )


def _merge_statistics(files: list[Path], output: Path) -> None:
    from functools import reduce

    from grutrace.statistics.running import Statistics

    merged = reduce(Statistics.merge, map(Statistics.load, files))
    merged.save(output)
    echo(f"{output}: {merged.calls} calls of {display_name(files)}")
