"""`grutrace stats`: summarize every site, or run an analysis on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer

from grutrace.analysis.descriptive.saturation import (
    SiteSummary,
    summarize_site,
    summarize_statistics,
)
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import as_site_data
from grutrace.analysis.registry import ANALYSES, AnalysisSpec, get_analysis
from grutrace.cli.common import AsJSON, open_traces
from grutrace.cli.output import (
    new_table,
    percent,
    print_json,
    print_result,
    print_table,
    progress_bar,
    with_progress,
)
from grutrace.cli.selection import EVERYTHING, Selection, with_selection
from grutrace.errors import OptionError, join_names
from grutrace.statistics.file import is_statistics
from grutrace.statistics.moments import HIGH, LOW
from grutrace.statistics.running import Statistics
from grutrace.storage.hdf5.remote import is_url
from grutrace.storage.read.trace import Trace


@with_selection
def stats(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE... [ANALYSIS]",
            help="A trace file or its URL, or the shards of several processes: run.rank*.h5. "
            f"ANALYSIS is one of {', '.join(ANALYSES)}.",
            show_default=False,
        ),
    ],
    site: Annotated[
        list[str] | None, typer.Option(help="Glob for site names. May be repeated.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="NAME", help="The label that ANALYSIS uses, or tokens.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="FILE", help="The later trace, for the analysis change.")
    ] = None,
    paired: Annotated[
        bool, typer.Option("--paired", help="Both traces have the same inputs, step by step.")
    ] = False,
    each: Annotated[bool, typer.Option("--each", help="Print a line for each unit.")] = False,
    as_json: AsJSON = False,
    selection: Selection = EVERYTHING,
) -> None:
    """Summarize every site: sequences, steps, residual and gate activation.

    FILE is a trace or a statistics file. With ANALYSIS, run this analysis on every site.
    """
    files, name = split_arguments(arguments)
    values = {"label": label, "against": against, "paired": paired or None}
    options: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    if name is not None:
        analysis = get_analysis(name)
        analysis.require(options)
        with ExitStack() as stack:
            trace = selection.apply(stack.enter_context(open_traces(files)))
            if against is not None:
                options["against"] = selection.apply(stack.enter_context(open_traces([against])))
            results = run_analysis(trace, analysis, matching_sites(trace, site), options)
            print_results(results, each, as_json)
        return
    if options:
        option = next(iter(options))
        raise OptionError(f"--{option} needs an ANALYSIS: one of {', '.join(ANALYSES)}")
    if all(map(is_statistics, files)):
        selection.require_empty("a statistics file has no sequences to select")
        summaries = summarize_statistics(reduce(Statistics.merge, map(Statistics.load, files)))
    else:
        with open_traces(files) as whole:
            trace = selection.apply(whole)
            summaries = summarize_sites(trace, matching_sites(trace, site))
    if as_json:
        print_json([dataclasses.asdict(summary) for summary in summaries])
    else:
        print_summaries(summaries)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Split the arguments into files and the name of an analysis, if the last is not a file."""
    *files, last = arguments
    if files and not Path(last).exists() and not is_url(last):
        return files, last
    return list(arguments), None


def matching_sites(trace: Trace, globs: Sequence[str] | None) -> tuple[str, ...]:
    """Return the sites that match any glob; all sites without globs.

    Raises:
        OptionError: A glob matches no site.
    """
    for glob in globs or ():
        if not any(fnmatchcase(name, glob) for name in trace.sites):
            raise OptionError(
                f"site: {glob!r} matches none of the sites: {join_names(trace.sites)}"
            )
    return tuple(
        name for name in trace.sites if not globs or any(fnmatchcase(name, glob) for glob in globs)
    )


def run_analysis(
    trace: Trace, analysis: AnalysisSpec, sites: Sequence[str], options: Mapping[str, Any]
) -> Iterator[Result]:
    """Run an analysis on each site, with a progress bar on a terminal.

    Args:
        trace: The trace.
        analysis: The analysis.
        sites: Names of the sites.
        options: Options of the analysis by name. A trace stands for its site of the same name.

    Yields:
        The result for each site.
    """
    analyse = analysis.load()
    for name in sites:
        site_options = {
            key: value[name] if isinstance(value, Trace) else value
            for key, value in options.items()
        }
        with progress_bar(f"{analysis.name} of {name}") as advance:
            site_data = as_site_data(trace[name])
            site_data.advance = advance
            result = analyse(site_data, **site_options)
        yield result


def print_results(results: Iterable[Result], all_values: bool, as_json: bool) -> None:
    """Print results as text, one after another, or as one JSON array."""
    if as_json:
        print_json([result.to_dict() for result in results])
        return
    for result in results:
        print_result(result, all_values)


def summarize_sites(trace: Trace, sites: Sequence[str] | None = None) -> list[SiteSummary]:
    """Return the summary of the given sites, or of all sites."""
    names = trace.sites if sites is None else sites
    return [summarize_site(trace[name]) for name in with_progress(names, "reading")]


def print_summaries(summaries: Sequence[SiteSummary]) -> None:
    """Print a table of sequences, steps, residual and gate activation for every site."""
    table = new_table("site")
    for name in ("sequences", "steps", "residual"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name in ("mean", f"< {LOW}", f"> {HIGH}"):
        table.add_column(name, justify="right")
    for summary in summaries:
        counts = [str(summary.sequences), str(summary.steps)]
        site_cells = [summary.site, *counts, f"{summary.residual:.1e}"]
        for name, gate in summary.gates.items() or [("", None)]:
            shares = [f"{gate.mean:.3f}", percent(gate.below), percent(gate.above)] if gate else []
            table.add_row(*site_cells, name, *shares)
            # Further gates of the site leave these cells empty.
            site_cells = [""] * len(site_cells)
    print_table(table)
    print("Shares are over all steps and units; for the candidate they are of its magnitude, |n|.")
