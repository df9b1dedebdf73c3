"""Write a new file under a temporary name, then publish it under its own in one step."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from grutrace.errors import TraceFileError
from grutrace.storage.hdf5.errors import translate_write_errors
from grutrace.storage.hdf5.locks import fcntl


def temporary_path(path: Path, mode: str) -> Path:
    """Return the temporary path at which to write a file before it is published.

    Args:
        path: Final path of the file.
        mode: "overwrite" if the file may replace an existing one.

    Raises:
        TraceFileError: The folder does not exist, or the path is in use.
    """
    if not path.parent.is_dir():
        raise TraceFileError(f"{path} cannot be created: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise TraceFileError(f"{path} cannot be written: it is not a file")
    if path.exists() and mode != "overwrite":
        raise _already_exists(path)
    return path.with_name(f"{path.name}.new-{secrets.token_hex(4)}")


@contextlib.contextmanager
def unlink_on_error(path: Path) -> Iterator[None]:
    """Return a context that deletes the file if an exception is raised inside."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path, mode: str) -> None:
    """Rename a finished file to its final path.

    Args:
        temporary: Temporary path of the file.
        path: Final path.
        mode: "overwrite" replaces an existing file; any other mode refuses to.

    Raises:
        TraceFileError: A file exists at the path, or the rename failed.
    """
    with contextlib.suppress(OSError, AttributeError):
        if mode != "overwrite":
            # Unlike a rename, a hard link never replaces a file. Some file systems have none.
            os.link(temporary, path)
            with contextlib.suppress(OSError):
                temporary.unlink()
            return
    if mode != "overwrite" and path.exists():
        raise _already_exists(path)
    with translate_write_errors(path, "created"):
        temporary.replace(path)


def fsync_file(descriptor: int) -> None:
    """Flush an open file to the disk.

    Raises:
        OSError: The disk refused. Data written since the last call may be lost.
    """
    if fcntl is not None and hasattr(fcntl, "F_FULLFSYNC"):
        # On macOS fsync stops at the cache of the disk.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def fsync_directory(path: Path) -> None:
    """Flush the folder of a file to the disk, so that the file keeps its name after a crash.

    Raises:
        OSError: The disk refused.
    """
    if os.name == "nt":
        # Windows can neither open nor flush a folder.
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fsync_file(folder)
    finally:
        os.close(folder)


def _already_exists(path: Path) -> TraceFileError:
    return TraceFileError(
        f"{path} exists: use mode='overwrite' to replace it or mode='a' to append to it"
    )
