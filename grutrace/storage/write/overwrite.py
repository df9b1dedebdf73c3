"""Refuse to overwrite files that grutrace did not write or that another process is writing.

`file_signature` tells whether the file at a path has changed.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import h5py

from grutrace.errors import GrutraceWarning, TraceFileError
from grutrace.storage.format.attributes import format_of
from grutrace.storage.format.schema import FORMAT, STATISTICS_FORMAT
from grutrace.storage.hdf5.errors import H5PY_ERRORS, FormatError
from grutrace.storage.hdf5.handle import lock_readers
from grutrace.storage.hdf5.locks import is_locked
from grutrace.storage.hdf5.safe_open import HEAD_BYTES, has_writer_flag, sniff_format
from grutrace.storage.hdf5.superblock import SIGNATURE, RepairedFile, open_repaired

#: Bytes of the chunk cache. Only attributes are read here.
CACHE = 4096


def require_replaceable(path: Path) -> None:
    """Refuse to overwrite a file that grutrace did not write or that another process is writing.

    Args:
        path: A path without symbolic links. The file need not exist.

    Raises:
        TraceFileError: The file has another format, is too damaged to identify, or is being
            written.

    Warns:
        GrutraceWarning: The file system has no locks, so another process may be writing the file.
    """
    if not path.exists():
        return
    kind = _foreign_kind(path)
    if kind is not None:
        raise TraceFileError(
            f"{path} cannot be overwritten: expected a file that grutrace wrote, found {kind}. "
            "Move the file, or choose another path"
        )
    require_no_writer(path)


def require_no_writer(path: Path) -> None:
    """Refuse a trace or a statistics file that another process is writing.

    Args:
        path: Path of a file that grutrace wrote and that no writer of this process has claimed.

    Raises:
        TraceFileError: Another process is writing the file.

    Warns:
        GrutraceWarning: The file system has no locks, so another process may be writing the file.
    """
    # A closed trace has no writer. A statistics file does not record whether it has one.
    if not has_writer_flag(path) and not is_statistics_file(path):
        return
    locked = is_locked(path)
    if locked:
        raise TraceFileError(
            f"{path} is being written by another process: wait until it has closed the file, or "
            "choose another path"
        )
    if locked is None:
        warnings.warn(
            f"{path}: no file locks are available, so another process may be writing this file",
            GrutraceWarning,
            stacklevel=2,
        )


def is_statistics_file(path: Path) -> bool:
    """Return whether a file declares to be a statistics file. False if it cannot be read."""
    try:
        return _format(path) == STATISTICS_FORMAT
    except (FormatError, *H5PY_ERRORS):
        return False


def file_signature(path: Path) -> tuple[int, int, int, int] | None:
    """Return values that change when the file at a path changes; None if no file exists."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _foreign_kind(path: Path) -> str | None:
    """Return the kind of a file that grutrace did not write; None if grutrace wrote it."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not head.startswith(SIGNATURE):
            return sniff_format(head)
        declared_format = _format(path)
    except (FormatError, *H5PY_ERRORS) as error:
        return f"an HDF5 file that cannot be read ({error})"
    if declared_format in (FORMAT, STATISTICS_FORMAT):
        return None
    return "another HDF5 file"


def _format(path: Path) -> str | None:
    """Return the format that an HDF5 file declares; None if it declares none.

    Raises:
        FormatError: The superblock is damaged.
        OSError: The file cannot be read.
    """
    with path.open("rb") as stream:
        version = stream.read(9)[8:]
        stream.seek(0)
        # HDF5 neither locks a Python file object nor waits for its writer.
        if version in (b"\2", b"\3"):
            with lock_readers(), RepairedFile(path) as image, open_repaired(image, CACHE) as file:
                return _format_of(file)
        with lock_readers(), h5py.File(stream, "r") as file:
            return _format_of(file)


def _format_of(file: h5py.File) -> str | None:
    try:
        return format_of(file)
    except FormatError:
        return None
