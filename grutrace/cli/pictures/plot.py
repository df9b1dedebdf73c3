"""`grutrace plot` draws a picture of a site; `grutrace report` writes a page about a trace."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from grutrace.cli.common import File, Files, open_traces
from grutrace.cli.output import progress_bar
from grutrace.cli.selection import EVERYTHING, Selection, with_selection
from grutrace.errors import OptionError, join_names
from grutrace.run.parsing import parse_steps, parse_units
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.trace import Trace
from grutrace.view.picture_files import require_format, save_plot
from grutrace.view.plot_specs import PLOTS, get_plot
from grutrace.view.report.report import report as write_report


@with_selection
def plot(
    file: File,
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(PLOTS)}.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="The picture: a .png, .svg or .pdf file.", show_default=False
        ),
    ],
    site: Annotated[
        str | None, typer.Option(help="Name of the site. Needed if there are several.")
    ] = None,
    quantity: Annotated[
        str | None, typer.Option(help="reset, update, candidate, hidden, input or gradient.")
    ] = None,
    sequence: Annotated[int | None, typer.Option(help="Number of the sequence.")] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="A:B", help="Steps A to B - 1 of the sequence.")
    ] = None,
    units: Annotated[str | None, typer.Option(metavar="N,N,...", help="The units to draw.")] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help="How units are sorted: similarity, timescale, label, last write, number."
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="NAME", help="A label, or tokens.")] = None,
    gate: Annotated[str | None, typer.Option(help="reset, update or candidate.")] = None,
    step: Annotated[int | None, typer.Option(help="The step whose state is decomposed.")] = None,
    points: Annotated[
        bool, typer.Option("--points", help="Search for fixed points and draw them.")
    ] = False,
    lags: Annotated[int | None, typer.Option(help="Largest lag.")] = None,
    count: Annotated[int | None, typer.Option(help="Number of stages.")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A later trace. May be repeated for checkpoints."),
    ] = None,
    paired: Annotated[
        bool, typer.Option("--paired", help="Both traces have the same inputs, step by step.")
    ] = False,
    selection: Selection = EVERYTHING,
) -> None:
    """Draw a picture of a site. An existing picture is replaced.

    Exit codes: 0 success, 2 error.
    """
    require_format(output)
    options: dict[str, Any] = {
        "quantity": quantity,
        "sequence": sequence,
        "steps": None if steps is None else parse_steps(steps),
        "units": None if units is None else parse_units(units),
        "order": order,
        "label": label,
        "gate": gate,
        "step": step,
        "points": points or None,
        "lags": lags,
        "count": count,
        "paired": paired or None,
        "against": against or None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    spec = get_plot(kind)
    spec.require(options)
    later = options.pop("against", [])
    if kind == "change" and len(later) > 1:
        raise OptionError(f"--against: expected one file for change, found {len(later)}")
    with ExitStack() as stack:
        trace, *traces = (
            selection.apply(stack.enter_context(open_traces([path]))) for path in (file, *later)
        )
        chosen = choose_site(trace, site)
        others = [other[chosen.name] for other in traces]
        save_plot(chosen, kind, output, others, options)


@with_selection
def report(
    files: Files,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The page: an .html file.", show_default=False)
    ],
    selection: Selection = EVERYTHING,
) -> None:
    """Write one HTML file with findings in words, their tests and pictures.

    It covers proofs, stuck units, labels, timescales, chaos, gradients and training. An existing
    file is replaced. Exit codes: 0 success, 2 error.
    """
    with open_traces(files) as trace, progress_bar("reporting") as advance:
        write_report(selection.apply(trace), output, progress=advance)


def choose_site(trace: Trace, name: str | None) -> SiteTrace:
    """Return the site of this name, or the only one.

    Raises:
        OptionError: No name was given, and there are several sites, or none.
        NotRecordedError: There is no site of this name.
    """
    if name is None and len(trace.sites) != 1:
        raise OptionError(f"choose one of the sites with --site: {join_names(trace.sites)}")
    return trace[trace.sites[0] if name is None else name]
