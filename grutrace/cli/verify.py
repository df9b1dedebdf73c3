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
        print_json([dataclasses.asdict(each) | {"holds": each.holds} for each in results])
    else:
        print_verification(results)
    if not all(each.holds for each in results):
        raise typer.Exit(EXIT_NO)
    if not any(each.check for each in results):
        raise typer.Exit(EXIT_ERROR)


def print_verification(results: Sequence[SiteVerification]) -> None:
    """Print the check and the worst difference of every site."""
    table = new_table("site", "checked", "")
    table.add_column("steps", justify="right")
    table.add_column("worst difference", justify="right")
    table.add_column("of tolerance", justify="right")
    for each in results:
        verdict = ("holds" if each.holds else "DOES NOT HOLD") if each.check else ""
        row = [each.site, each.check or "nothing", verdict, str(each.steps)]
        if each.worst:
            row += [f"{each.worst.difference:.1e}", f"{each.worst.of_tolerance:.2g}"]
        table.add_row(*row)
    print_table(table)
    for each in results:
        if each.reason:
            echo(f"{each.site}: {each.reason}")
        if each.worst and not each.holds:
            worst = each.worst
            echo(
                f"{each.site}: sequence {worst.sequence}, step {worst.step}, unit {worst.unit}: "
                f"{worst.quantity} is {worst.recorded:.7g}, expected {worst.expected:.7g} "
                f"within {worst.tolerance:.1e}"
            )
