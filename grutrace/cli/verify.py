"""`grutrace verify`: check that a trace is consistent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from grutrace.cli.common import EXIT_ERROR, EXIT_NO, AsJSON, Files, open_traces
from grutrace.cli.output import echo, new_table, print_json, print_table, with_progress
from grutrace.storage.recovery.preflight import check_in_subprocess

if TYPE_CHECKING:
    from grutrace.analysis.verification.verify import SiteVerification


def verify(files: Files, as_json: AsJSON = False) -> None:
    """Check the gates against weights, inputs and states, or the states against the gates.

    Exit codes: 0 the trace is consistent, 1 it is not, 2 error, or nothing could be checked.
    """
    # Imported here because it loads torch, which takes longer than most commands.
    from grutrace.analysis.verification.verify import verify_site

    check_in_subprocess(files)
    with open_traces(files) as trace:
        results = [verify_site(trace, name) for name in with_progress(trace.sites, "verifying")]
    if as_json:
        print_json([dataclasses.asdict(result) | {"holds": result.holds} for result in results])
    else:
        print_verification(results)
    if not all(result.holds for result in results):
        raise typer.Exit(EXIT_NO)
    if not any(result.check for result in results):
        raise typer.Exit(EXIT_ERROR)


def print_verification(results: Sequence[SiteVerification]) -> None:
    """Print the check and the worst difference of every site."""
    table = new_table("site", "checked", "")
    table.add_column("steps", justify="right")
    table.add_column("worst difference", justify="right")
    table.add_column("of tolerance", justify="right")
    for result in results:
        verdict = ("holds" if result.holds else "DOES NOT HOLD") if result.check else ""
        row = [result.site, result.check or "nothing", verdict, str(result.steps)]
        if result.worst:
            row += [f"{result.worst.difference:.1e}", f"{result.worst.of_tolerance:.2g}"]
        table.add_row(*row)
    print_table(table)
    for result in results:
        if result.reason:
            echo(f"{result.site}: {result.reason}")
        if result.worst and not result.holds:
            worst = result.worst
            echo(
                f"{result.site}: sequence {worst.sequence}, step {worst.step}, unit {worst.unit}: "
                f"{worst.quantity} is {worst.recorded:.7g}, expected {worst.expected:.7g} "
                f"within {worst.tolerance:.1e}"
            )
