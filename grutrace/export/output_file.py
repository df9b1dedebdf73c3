"""A file that HDF5 can close whatever the disk says.

Where a write fails, HDF5 cannot close its file any more: it stays open until the process ends,
which may then abort (seen with h5py 3.16 and h5netcdf 1.8). So HDF5 writes through this, which
keeps the first error to itself and takes no more. What was written is discarded then.

What is exported appears under its name whole, or not at all; nothing is overwritten.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grutrace.errors import GrutraceError, TraceFileError
from grutrace.storage.hdf5.atomic_write import publish, temporary_path
from grutrace.storage.hdf5.errors import short_message


class DeferredErrorFile(io.RawIOBase):
    """A new file for writing and reading that raises nothing while HDF5 is at it.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("x+b", buffering=0)
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise what has gone wrong by now, if anything has."""
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        """Write all of it, or pretend to."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self._error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error
        return size

    def readinto(self, buffer: Any) -> int:
        """Read; what is not there is zeros."""
        target = memoryview(buffer).cast("B")
        count = self._file.readinto(target) or 0
        target[count:] = bytes(len(target) - count)
        return len(target)

    def truncate(self, size: int | None = None) -> int:
        """Make it so long, or pretend to."""
        try:
            if self._error is None:
                return self._file.truncate(size)
        except OSError as error:
            self._error = error
        return self._file.tell() if size is None else size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The present place."""
        return self._file.tell()

    def readable(self) -> bool:
        """Always."""
        return True

    def writable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Close it. Closing twice does nothing."""
        self._file.close()
        super().close()


@contextmanager
def open_for_hdf5(path: Path) -> Iterator[DeferredErrorFile]:
    """A new file for HDF5, which is closed within.

    Raises:
        OSError: Something could not be written.
    """
    with DeferredErrorFile(path) as file:
        yield file
        file.check()


@contextmanager
def atomic_output(path: Path, *, folder: bool) -> Iterator[Path]:
    """Where to make a file or folder; it takes its place when all went well.

    Raises:
        TraceFileError: There is something in its place, or it cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise TraceFileError(f"{path} exists: name another place to export to")
    new = temporary_path(path, "w")
    try:
        with _writing(path):
            if folder:
                new.mkdir()
            yield new
            if folder:
                # Unlike a file, a folder does not replace another one that has something in it.
                new.rename(path)
            else:
                publish(new, path, "w")
    finally:
        shutil.rmtree(new, ignore_errors=True)
        new.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except GrutraceError:
        # The trace cannot be read: an error that names another file.
        raise
    except OSError as error:
        # Without the name of the file that is being made, which is a temporary one.
        raise TraceFileError(f"{path} cannot be written: {short_message(error)}") from error
