"""Where a new file is made, and how it takes its place: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grutrace.errors import GrutraceError, TraceFileError
from grutrace.storage.hdf5.errors import short_message
from grutrace.storage.hdf5.locks import fcntl


def temporary_path(path: Path, mode: str) -> Path:
    """Where to make a file, which takes its place only once a crash would leave it readable."""
    if not path.parent.is_dir():
        raise TraceFileError(f"{path} cannot be created: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise TraceFileError(f"{path} cannot be written: it is not a file")
    if path.exists() and mode != "overwrite":
        raise _already_exists(path)
    return path.with_name(f"{path.name}.new-{secrets.token_hex(4)}")


def publish(new: Path, path: Path, mode: str) -> None:
    """Rename a file; one that may replace no other, only if there is none by now."""
    with contextlib.suppress(OSError, AttributeError):
        if mode != "overwrite":
            # Unlike renaming, this fails where there is one; and where there are no hard links.
            os.link(new, path)
            with contextlib.suppress(OSError):
                new.unlink()
            return
    if mode != "overwrite" and path.exists():
        raise _already_exists(path)
    with translate_write_errors(path, "created"):
        new.replace(path)


def fsync_file(descriptor: int) -> None:
    """Have the disk hold what was written to an open file.

    Raises:
        OSError: It could not. What was written since the last time may be gone.
    """
    if fcntl is not None and hasattr(fcntl, "F_FULLFSYNC"):
        # On macOS fsync stops at the disk's own cache.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def fsync_directory(path: Path) -> None:
    """Have the disk hold that a file is in its folder under this name.

    Raises:
        OSError: It could not.
    """
    if os.name == "nt":
        # A folder cannot be opened there, nor be told to be on the disk.
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fsync_file(folder)
    finally:
        os.close(folder)


def _already_exists(path: Path) -> TraceFileError:
    return TraceFileError(f"{path} exists: mode='overwrite' replaces it, mode='a' appends to it")


@contextmanager
def translate_write_errors(path: Path, done: str) -> Iterator[None]:
    """Turn what h5py raises into a `TraceFileError` that names the file."""
    try:
        yield
    except GrutraceError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise TraceFileError(f"{path} cannot be {done}: {short_message(error)}") from error
