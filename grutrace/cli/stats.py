"""`grutrace stats`: figures of every site."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from grutrace.analysis.summary import OPEN, SHUT, SiteSummary, summarize_site
from grutrace.cli.arguments import AsJSON, File
from grutrace.cli.output import new_table, percent, print_json, with_progress
from grutrace.statistics.file import is_statistics
from grutrace.statistics.statistics import Statistics
from grutrace.statistics.table import summarize_statistics
from grutrace.storage.sinks import open_trace
from grutrace.storage.trace import Trace


def stats(file: File, as_json: AsJSON = False) -> None:
    """Summarize every site: sequences, steps, residual, and how open its gates are.

    FILE is a trace, or what a grutrace.Statistics wrote.
    """
    if is_statistics(file):
        found = summarize_statistics(Statistics.load(file))
    else:
        with open_trace(file) as trace:
            found = summaries(trace)
    if as_json:
        print_json([dataclasses.asdict(each) for each in found])
    else:
        print_stats(found)


def summaries(trace: Trace) -> list[SiteSummary]:
    """Return the summary of every site."""
    return [summarize_site(trace[name]) for name in with_progress(trace.sites, "reading")]


def print_stats(found: Sequence[SiteSummary]) -> None:
    """Print a table of every site: sequences, steps, residual, and how open its gates are."""
    table = new_table("site")
    for name in ("sequences", "steps", "residual"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name in ("mean", f"< {SHUT}", f"> {OPEN}"):
        table.add_column(name, justify="right")
    for each in found:
        about = [each.site, str(each.sequences), str(each.steps), f"{each.residual:.1e}"]
        for name, gate in each.gates.items() or [("", None)]:
            shares = [f"{gate.mean:.3f}", percent(gate.below), percent(gate.above)] if gate else []
            table.add_row(*about, name, *shares)
            about = [""] * len(about)
    Console().print(table)
    print("Shares are of all steps and units; those of the candidate are of its size, |n|.")
