"""The command-line application: all commands, and errors as one line and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from typing import Annotated

import numpy as np
import typer

from grutrace.cli.common import EXIT_ERROR
from grutrace.cli.convert import derive, export
from grutrace.cli.diff import diff
from grutrace.cli.info import info
from grutrace.cli.labels.annotate import annotate
from grutrace.cli.merge import merge
from grutrace.cli.output import echo
from grutrace.cli.pictures.plot import plot, report
from grutrace.cli.pictures.view import view
from grutrace.cli.recover import recover
from grutrace.cli.run import run
from grutrace.cli.stats import stats
from grutrace.cli.verify import verify
from grutrace.errors import GrutraceError
from grutrace.native.library import instruction_set
from grutrace.storage.hdf5.safe_open import disable_plugins

app = typer.Typer(
    help="Trace the GRUs of a running PyTorch model, and read traces.",
    epilog="Exit codes: 0 yes or success, 1 no (verify, diff, recover), 2 error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        echo(f"grutrace {metadata.version('grutrace')} (compiled: {instruction_set()})")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version, and the instruction set of the compiled part, and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


# The help lists the commands in this order. Every command loads what this module imports, so heavy
# imports belong inside the functions of the commands.
app.command(context_settings={"allow_interspersed_args": False})(run)
app.command()(info)
app.command()(stats)
app.command()(plot)
app.command()(report)
app.command()(view)
app.command()(verify)
app.command()(diff)
app.command()(annotate)
app.command()(derive)
app.command()(export)
app.command()(merge)
app.command()(recover)


@cache
def _command() -> Callable[..., object]:
    """Return the parser of all commands. Making it takes longer than most commands."""
    return typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    An error is printed as one line on standard error.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code: 0 yes or success, 1 no, 2 error.
    """
    try:
        # NaN and infinity in a file cause no NumPy warnings.
        with disable_plugins(), np.errstate(all="ignore"):
            _command()(None if argv is None else list(argv), prog_name="grutrace")
    except GrutraceError as error:
        echo(f"grutrace: {error}", stderr=True)
        return EXIT_ERROR
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_ERROR * bool(ended.code)
    return 0
