"""The command-line application: all commands, and errors as one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Annotated

import numpy as np
import typer

from grutrace.cli.common import EXIT_ERROR
from grutrace.cli.output import echo
from grutrace.errors import GrutraceError
from grutrace.native.library import version_line
from grutrace.storage.hdf5.safe_open import disable_plugins

#: Module of each command, in the order of the help. The function has the command's name.
COMMANDS = {
    "run": "grutrace.cli.run",
    "info": "grutrace.cli.info",
    "stats": "grutrace.cli.stats",
    "plot": "grutrace.cli.pictures.plot",
    "report": "grutrace.cli.pictures.plot",
    "view": "grutrace.cli.pictures.view",
    "verify": "grutrace.cli.verify",
    "diff": "grutrace.cli.diff",
    "annotate": "grutrace.cli.labels.annotate",
    "derive": "grutrace.cli.convert",
    "export": "grutrace.cli.convert",
    "merge": "grutrace.cli.merge",
    "recover": "grutrace.cli.recover",
}

#: Settings of commands that Typer does not have by default.
_SETTINGS = {"run": {"allow_interspersed_args": False}}


def _print_version(requested: bool) -> None:
    if requested:
        echo(version_line())
        raise typer.Exit


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


def make_app(names: Sequence[str] = tuple(COMMANDS)) -> typer.Typer:
    """Return the application with these commands. Only their modules are imported."""
    app = typer.Typer(
        help="Trace the GRUs of a running PyTorch model, and read traces.",
        epilog="Exit codes: 0 yes or success, 1 no (verify, diff, recover), 2 error.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_global_options)
    for name in names:
        command = getattr(import_module(COMMANDS[name]), name)
        app.command(context_settings=_SETTINGS.get(name))(command)
    return app


@cache
def _parser(name: str | None) -> Callable[..., object]:
    """Return the parser of one command, or of all: of the help, and of errors that list them.

    The modules and parsers of all commands take longer than most commands.
    """
    return typer.main.get_command(make_app(tuple(COMMANDS) if name is None else [name]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    An error is printed as one line on standard error.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code: 0 yes or success, 1 no, 2 error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        # NaN and infinity in a file cause no NumPy warnings.
        with disable_plugins(), np.errstate(all="ignore"):
            _parser(name)(arguments, prog_name="grutrace")
    except GrutraceError as error:
        echo(f"grutrace: {error}", stderr=True)
        return EXIT_ERROR
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_ERROR * bool(ended.code)
    return 0
