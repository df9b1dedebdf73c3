"""The commands put together, and errors turned into one line and an exit code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import typer

from grutrace.cli.common import EXIT_ERROR
from grutrace.cli.convert import derive, export
from grutrace.cli.diff import diff
from grutrace.cli.info import info
from grutrace.cli.merge import merge
from grutrace.cli.output import echo
from grutrace.cli.recover import recover
from grutrace.cli.run import run
from grutrace.cli.stats import stats
from grutrace.cli.verify import verify
from grutrace.errors import GrutraceError
from grutrace.storage.hdf5.safe_open import disable_plugins

app = typer.Typer(
    help="See inside the GRUs of a running model: trace a script, look into traces.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# In the order in which the help lists them. What is loaded here is loaded by every command: heavy
# imports belong inside the command's function.
app.command(context_settings={"allow_interspersed_args": False})(run)
app.command()(info)
app.command()(stats)
app.command()(verify)
app.command()(diff)
app.command()(derive)
app.command()(export)
app.command()(merge)
app.command()(recover)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code. An error becomes one line."""
    try:
        # What is no number in a file is no reason for a line that nobody asked for.
        with disable_plugins(), np.errstate(all="ignore"):
            app(None if argv is None else list(argv), prog_name="grutrace")
    except GrutraceError as error:
        echo(f"grutrace: {error}", stderr=True)
        return EXIT_ERROR
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_ERROR * bool(ended.code)
    return 0
