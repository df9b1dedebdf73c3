"""Errors of a trace file: raised short where they are found, named in full where a user called.

Code that meets a fault says what it expected, what it found and where in the file. Only the public
boundary knows which file that was, and adds it.
"""

from __future__ import annotations

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


class Fault(Exception):
    """Something in the file is not as docs/format.md has it. Never leaves this package."""

    def __init__(self, place: str, expected: object, found: object) -> None:
        super().__init__(f"{place}: expected {expected}, found {found}")


class NewerFormat(Exception):
    """The file is of a later major version than this code reads. Never leaves this package."""

    def __init__(self, found: str, newest: int) -> None:
        super().__init__(
            f"is of version {found} of the format, and this grutrace reads version {newest}: "
            "a newer grutrace reads it"
        )


def require(holds: Any, place: str, expected: object, found: object) -> None:
    """Raise a `Fault` unless the condition holds."""
    if not holds:
        raise Fault(place, expected, found)


@contextmanager
def reading(path: Path, what: str = "trace") -> Iterator[None]:
    """Turn whatever goes wrong inside into one `TraceFileError` that names the file.

    Args:
        path: Of the file.
        what: What it should have been.
    """
    try:
        yield
    except GrutraceError:
        raise
    except NewerFormat as newer:
        raise TraceFileError(f"{path} {newer}") from None
    except Fault as fault:
        raise TraceFileError(f"{path} is damaged or is no {what}: {fault}") from None
    except H5PY_ERRORS as error:
        raise TraceFileError(f"{path} cannot be read: {error}") from error
