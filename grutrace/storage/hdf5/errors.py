"""Errors of a trace file.

Code that finds an error raises a `FormatError` with the place in the file, the expected content and
the content found. The public function that opened the file adds the path and raises a
`TraceFileError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grutrace.errors import GrutraceError, TraceFileError

#: The errors that h5py raises when it cannot read a file or its metadata.
H5PY_ERRORS = (
    *(OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError),
    # A dataset can be larger than the memory of the machine.
    MemoryError,
)


#: The kind of file that is expected unless a caller expects another one.
TRACE = "grutrace trace"

#: HDF5's message for an error of the operating system, with the system's own message.
_SYSTEM = re.compile(r"errno = \d+, error message = '([^']*)'")

#: HDF5's message for a file that another process has locked.
_LOCKED = re.compile(r"unable to lock file, errno = (11|35)\b")

#: HDF5's message for a file that a writer other than grutrace has marked as open.
_NOT_SWMR = "file is not already open for SWMR writing"

#: HDF5's messages for a chunk whose checksum or compressed form is wrong: from 2.0 on, and before.
_BAD_CHUNK = re.compile("filter returned failure during read|detected by Fletcher32 checksum")

#: HDF5's message for a truncated file.
_TRUNCATED = re.compile(r"truncated file: eof = (\d+),.* stored_eof = (\d+)")

#: Any other message of HDF5, with the cause in parentheses.
_HDF5 = re.compile(r"(?:Unable to|Can't|Couldn't|Unspecified error in) [^(]*\((.*)\)$", re.DOTALL)


class FormatError(Exception):
    """The file differs from the format in docs/format.md. Only used inside this package.

    Args:
        where: Dataset, group or attribute.
        expected: The content that the format requires.
        found: The content of the file.
    """

    def __init__(self, where: str, expected: object, found: object) -> None:
        super().__init__(f"{where}: expected {expected}, found {found}")


class ForeignFile(FormatError):
    """The file has another format. Only used inside this package.

    Args:
        kind: Actual kind of the file, as in "another HDF5 file".
    """

    def __init__(self, kind: str) -> None:
        super(FormatError, self).__init__(kind)


class UnsupportedVersion(Exception):
    """The file has a newer major format version than this code reads. Package-internal."""

    def __init__(self, found: str, newest: int) -> None:
        super().__init__(
            f"has format version {found}, but this grutrace reads versions up to {newest}.x: "
            "upgrade grutrace to read it"
        )


def require(condition: Any, where: str, expected: object, found: object) -> None:
    """Raise a `FormatError` unless the condition holds."""
    if not condition:
        raise FormatError(where, expected, found)


@contextmanager
def translate_read_errors(path: Path | str, expected: str = TRACE) -> Iterator[None]:
    """Raise errors of reading as one `TraceFileError` that names the file.

    Args:
        path: Path or URL of the file.
        expected: Expected kind of file, for the message.
    """
    try:
        yield
    except GrutraceError:
        raise
    except UnsupportedVersion as error:
        raise TraceFileError(f"{path} {error}") from None
    except ForeignFile as error:
        raise TraceFileError(f"{path} is not a {expected} (it is {error})") from None
    except FormatError as error:
        raise TraceFileError(f"{path} is damaged: {error}") from None
    except H5PY_ERRORS as error:
        raise TraceFileError(f"{path} cannot be read: {short_message(error)}") from error


@contextmanager
def translate_write_errors(path: Path, action: str) -> Iterator[None]:
    """Raise errors of h5py and of the system as a `TraceFileError` that names the file.

    Args:
        path: Path of the file.
        action: The action that failed, for the message: "created", "written" or "appended to".
    """
    try:
        yield
    except GrutraceError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise TraceFileError(f"{path} cannot be {action}: {short_message(error)}") from error


def short_message(error: BaseException) -> str:
    """Return the cause of an h5py or system error in one line.

    The original messages also hold source locations, times and memory addresses of HDF5, and the
    name of the file, which may be a temporary one.
    """
    # str() of a KeyError adds quotes.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if _LOCKED.search(text):
        return "another program has the file open for writing"
    if _NOT_SWMR in text:
        return (
            "another program opened it for writing and did not close it. `grutrace recover` makes "
            "a file that opens"
        )
    if match := _SYSTEM.search(text):
        return match[1]
    if _BAD_CHUNK.search(text):
        return "bytes of a chunk have changed: its checksum, or its compression, does not match"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if match := _TRUNCATED.search(text):
        return f"the file is truncated to {match[1]} of {match[2]} bytes"
    if "embedded NULLs" in text:
        return "a name contains a NUL character, which HDF5 cannot store"
    if match := _HDF5.match(text):
        return f"HDF5 reports {' '.join(match[1].split())!r}"
    return " ".join(text.split()) or type(error).__name__
