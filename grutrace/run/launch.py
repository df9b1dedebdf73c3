"""Start the script in a new interpreter, in the same process.

The process becomes `python script.py args`: its process id stays, so waiting for it and sending it
signals work as before. Python itself runs the script, so its ``__main__``, arguments, tracebacks,
exit code and output are the usual ones. The only addition is a `sitecustomize` on PYTHONPATH, which
Python loads before the script and which removes itself from PYTHONPATH (see bootstrap.py).
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from grutrace.distributed import detect_shard, shard_path
from grutrace.errors import OptionError, UnsupportedError
from grutrace.options import OPTIONS
from grutrace.run import parsing
from grutrace.run.settings import ENVIRONMENT_VARIABLE, Settings
from grutrace.storage.hdf5.filters import compression_filter
from grutrace.storage.shards.run_parts import check_writable

_BOOT = Path(__file__).with_name("boot")

#: Windows starts a new process instead, and ends this one at once, with exit code 0.
_CAN_BECOME_SCRIPT = os.name == "posix"


def launch(settings: Settings, program: Sequence[str], *, module: bool = False) -> NoReturn:
    """Replace this process by the script. Does not return.

    Args:
        settings: The settings of the run.
        program: The script, or the name of a module, followed by its arguments.
        module: Whether `program` names a module, as for ``python -m``.

    Raises:
        OptionError: An option has a wrong value.
        MissingExtraError: An option needs a package that is not installed.
        TraceFileError: The trace cannot be written.
        UnsupportedError: Python was started with -I, -E or -S, which ignore PYTHONPATH or site; or
            the system is Windows.
    """
    if not _CAN_BECOME_SCRIPT:
        raise UnsupportedError(
            "grutrace run needs a POSIX system such as Linux or macOS, where a process can become "
            f"the script; found {platform.system()}. Use grutrace.trace in the script"
        )
    _check_settings(settings)
    # Before the script starts, only the environment of torchrun tells the rank.
    check_writable(shard_path(Path(settings.output), detect_shard()), settings.mode)
    command = [*_interpreter(), *(["-m"] if module else []), *program]
    user_path = os.environ.get("PYTHONPATH")
    settings = replace(settings, output=os.path.realpath(settings.output), python_path=user_path)
    python_path = os.pathsep.join([str(_BOOT), *([user_path] if user_path else [])])
    environment = os.environ | {"PYTHONPATH": python_path, ENVIRONMENT_VARIABLE: settings.to_text()}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def _check_settings(settings: Settings) -> None:
    for option in sorted(OPTIONS.keys() & vars(settings).keys() - {"record"}):
        value = getattr(settings, option)
        if OPTIONS[option].values and value is not None:
            _check_values(option, [value])
    # Raises for a filter that is not installed, before the script starts.
    compression_filter(settings.compression)
    for option in ("every", "max_calls", "max_bytes"):
        number = getattr(settings, option)
        if number is not None and number < 1:
            raise OptionError(f"{option}: expected a whole number from 1, found {number}")
    if settings.steps is not None:
        parsing.parse_steps(settings.steps)
    if settings.units is not None:
        parsing.parse_units(settings.units)
        if settings.gates in ("background", "deferred"):
            raise OptionError(
                f"units: expected none with gates {settings.gates}, found {settings.units}"
            )
    _check_values("record", settings.record)
    if not settings.record:
        expected = ", ".join(OPTIONS["record"].values)
        raise OptionError(f"record: expected one or more of {expected}; found none")
    flags = sys.flags
    if flags.isolated or flags.ignore_environment or flags.no_site:
        raise UnsupportedError(
            "grutrace run needs site and PYTHONPATH: start Python without -I, -E and -S"
        )


def _check_values(option: str, values: Sequence[str]) -> None:
    allowed = OPTIONS[option].values
    for value in values:
        if value not in allowed:
            raise OptionError(f"{option}: expected one of {', '.join(allowed)}; found {value!r}")


def _interpreter() -> list[str]:
    """Return this Python and its own options, such as -u, -O, -W and -X."""
    option_count = len(sys.orig_argv) - len(sys.argv) - 1
    options = sys.orig_argv[1 : 1 + option_count]
    return [sys.executable, *(options[:-1] if options[-1:] in (["-m"], ["-c"]) else options)]
