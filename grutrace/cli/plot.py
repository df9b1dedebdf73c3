"""`grutrace plot`: draw a picture of a site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grutrace.cli.common import File, open_traces
from grutrace.errors import OptionError, join_names
from grutrace.run.parsing import parse_steps, parse_units
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.trace import Trace
from grutrace.view.picture_files import require_format, save_plot
from grutrace.view.plot_specs import PLOTS, get_plot


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
) -> None:
    """Draw a picture of a site. An existing picture is replaced.

    Exit codes: 0 success, 2 error.
    """
    require_format(output)
    values = {
        "quantity": quantity,
        "sequence": sequence,
        "steps": steps,
        "units": units,
        "order": order,
        "label": label,
    }
    given = {name: value for name, value in values.items() if value is not None}
    get_plot(kind).require(given)
    options: dict[str, Any] = dict(given)
    if steps is not None:
        options["steps"] = parse_steps(steps)
    if units is not None:
        options["units"] = parse_units(units)
    with open_traces([file]) as trace:
        save_plot(choose_site(trace, site), kind, output, options)


def choose_site(trace: Trace, name: str | None) -> SiteTrace:
    """Return the site of this name, or the only one.

    Raises:
        OptionError: No name was given, and there are several sites, or none.
        NotRecordedError: There is no site of this name.
    """
    if name is None and len(trace.sites) != 1:
        raise OptionError(f"choose one of the sites with --site: {join_names(trace.sites)}")
    return trace[trace.sites[0] if name is None else name]
