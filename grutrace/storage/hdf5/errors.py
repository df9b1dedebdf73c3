"""Errors of a trace file: raised short where they are found, named in full where a user called.

Code that meets a fault says what it expected, what it found and where in the file. Only the public
boundary knows which file that was, and adds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grutrace.errors import GrutraceError, TraceFileError

#: What h5py raises when a file, or HDF5's metadata in it, cannot be read.
H5PY_ERRORS = (
    *(OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError),
    # More than the machine has: the file can hold as much, or it would have been refused.
    MemoryError,
)


#: What HDF5 says where the system refused, and what the system said.
_SYSTEM = re.compile(r"errno = \d+, error message = '([^']*)'")

#: What it says where another process has locked the file.
_LOCKED = re.compile(r"unable to lock file, errno = (11|35)\b")

#: What it says of a file that is shorter than it was.
_TRUNCATED = re.compile(r"truncated file: eof = (\d+),.* stored_eof = (\d+)")

#: What it says otherwise, with the cause in brackets.
_HDF5 = re.compile(r"(?:Unable to|Can't|Couldn't|Unspecified error in) [^(]*\((.*)\)$", re.DOTALL)


class FormatError(Exception):
    """Something in the file is not as docs/format.md has it. Never leaves this package."""

    def __init__(self, place: str, expected: object, found: object) -> None:
        super().__init__(f"{place}: expected {expected}, found {found}")


class UnsupportedVersion(Exception):
    """The file is of a later major version than this code reads. Never leaves this package."""

    def __init__(self, found: str, newest: int) -> None:
        super().__init__(
            f"is of version {found} of the format, and this grutrace reads version {newest}: "
            "a newer grutrace reads it"
        )


def require(holds: Any, place: str, expected: object, found: object) -> None:
    """Raise a `FormatError` unless the condition holds."""
    if not holds:
        raise FormatError(place, expected, found)


@contextmanager
def translate_read_errors(path: Path, what: str = "trace") -> Iterator[None]:
    """Turn whatever goes wrong inside into one `TraceFileError` that names the file.

    Args:
        path: Of the file.
        what: What it should have been.
    """
    try:
        yield
    except GrutraceError:
        raise
    except UnsupportedVersion as newer:
        raise TraceFileError(f"{path} {newer}") from None
    except FormatError as fault:
        raise TraceFileError(f"{path} is damaged or is no {what}: {fault}") from None
    except H5PY_ERRORS as error:
        raise TraceFileError(f"{path} cannot be read: {short_message(error)}") from error


def short_message(error: BaseException) -> str:
    """What an error of h5py or of the system says, in one line of plain words.

    HDF5 adds where in its code it was, the time and addresses in memory; the system adds the name
    of the file, which may be a temporary one.
    """
    # The text of a KeyError is that of its key, in quotes.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if _LOCKED.search(text):
        return "another program has it open for writing"
    if found := _SYSTEM.search(text):
        return found[1]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if found := _TRUNCATED.search(text):
        return f"it is cut short: {found[1]} of {found[2]} bytes are there"
    if "embedded NULLs" in text:
        return "a name in it has a NUL character, which HDF5 cannot store"
    if found := _HDF5.match(text):
        return f"HDF5 reports {' '.join(found[1].split())!r}"
    return " ".join(text.split()) or type(error).__name__
