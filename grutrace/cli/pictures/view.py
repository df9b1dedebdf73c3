"""`grutrace view`: show traces in the browser."""

from __future__ import annotations

import contextlib
import gc
import logging
from typing import Annotated

import typer

from grutrace.cli.common import warnings_as_lines
from grutrace.cli.output import echo
from grutrace.view.live.serve import view as show


def view(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="A trace file or its URL, shards such as run.rank*.h5, or a folder of runs.",
            show_default=False,
        ),
    ],
    port: Annotated[int, typer.Option(help="Port of the page; 0 for any free one.")] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
) -> None:
    """Show traces in the browser, also while they are written. Ctrl-C ends it.

    The page is for this machine only, and needs the token in its address.
    """
    # A page that is closed while a picture is on its way is no problem to tell of.
    logging.getLogger("bokeh.server.views.ws").setLevel(logging.ERROR)
    with warnings_as_lines():
        live = show(paths, port=port, browser=browser)
    # bokeh collects garbage when a page is closed, while another may be waiting.
    gc.freeze()
    with live:
        echo(f"grutrace view: {live.url}")
        echo("Ctrl-C ends it. People with this address on this machine can see the traces.")
        with contextlib.suppress(KeyboardInterrupt):
            live.wait()
