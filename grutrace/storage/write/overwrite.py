"""What may be overwritten: files that grutrace wrote, and that no other process writes to now."""

from __future__ import annotations

import warnings
from pathlib import Path

import h5py

from grutrace.errors import GrutraceWarning, TraceFileError
from grutrace.storage.format.header import format_of
from grutrace.storage.format.schema import FORMAT, STATISTICS_FORMAT
from grutrace.storage.hdf5.errors import H5PY_ERRORS, FormatError
from grutrace.storage.hdf5.handle import lock_readers
from grutrace.storage.hdf5.locks import is_locked
from grutrace.storage.hdf5.safe_open import HEAD_BYTES, SIGNATURE, has_writer_flag, sniff_format
from grutrace.storage.hdf5.superblock import RepairedFile, open_repaired

#: Memory for chunks while a file's origin is read: no chunk is. Bytes.
CACHE = 4096


def require_replaceable(path: Path) -> None:
    """Refuse to overwrite a file that grutrace did not write, or that another process writes to.

    Args:
        path: Without symbolic links in it. There may be no file.

    Raises:
        TraceFileError: The file is something else, or too damaged to tell, or being written.

    Warns:
        GrutraceWarning: It cannot be known whether another process writes to it.
    """
    if not path.exists():
        return
    found = _found(path)
    if found is not None:
        raise TraceFileError(
            f"{path} cannot be overwritten: expected a file that grutrace wrote, found {found}. "
            "Move it away, or name another file"
        )
    require_no_writer(path)


def require_no_writer(path: Path) -> None:
    """Refuse a trace or a file of statistics that another process writes to.

    Args:
        path: Of a file that grutrace wrote and no writer of this process has claimed.

    Raises:
        TraceFileError: It is being written.

    Warns:
        GrutraceWarning: It cannot be known whether another process writes to it.
    """
    # A closed trace has no writer. Files of statistics do not say whether they have one.
    if not has_writer_flag(path) and not is_statistics_file(path):
        return
    locked = is_locked(path)
    if locked:
        raise TraceFileError(
            f"{path} is being written by another process: wait until that one has closed it, or "
            "name another file"
        )
    if locked is None:
        warnings.warn(
            f"{path}: its file system has no locks, so it cannot be known whether another process "
            "writes to it",
            GrutraceWarning,
            stacklevel=2,
        )


def is_statistics_file(path: Path) -> bool:
    """Whether a file is one of statistics by its own account. False if it cannot be read."""
    try:
        return _format(path) == STATISTICS_FORMAT
    except (FormatError, *H5PY_ERRORS):
        return False


def _found(path: Path) -> str | None:
    """What a file is that grutrace did not write; None of one that it did."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not head.startswith(SIGNATURE):
            return sniff_format(head)
        written = _format(path)
    except (FormatError, *H5PY_ERRORS) as error:
        return f"an HDF5 file that cannot be read ({error})"
    if written in (FORMAT, STATISTICS_FORMAT):
        return None
    return "another HDF5 file"


def _format(path: Path) -> str | None:
    """What format an HDF5 file says it is of; None if it does not say.

    Raises:
        FormatError: Its superblock is damaged.
        OSError: It cannot be read.
    """
    with path.open("rb") as plain:
        version = plain.read(9)[8:]
        plain.seek(0)
        # Through Python: HDF5 neither locks the file nor waits for its writer then.
        if version in (b"\2", b"\3"):
            with lock_readers(), RepairedFile(path) as file, open_repaired(file, CACHE) as opened:
                return _format_of(opened)
        with lock_readers(), h5py.File(plain, "r") as opened:
            return _format_of(opened)


def _format_of(file: h5py.File) -> str | None:
    try:
        return format_of(file)
    except FormatError:
        return None
