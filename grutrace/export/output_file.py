"""Output files of exports: atomic creation, and deferred errors for HDF5.

After a failed write, HDF5 cannot close its file: the file stays open until the process ends, which
may then abort (h5py 3.16, h5netcdf 1.8). Therefore HDF5 writes through `DeferredErrorFile`, which
stores the first error, ignores further writes and raises later.

`atomic_output` publishes an export when it is complete and never overwrites a file.
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


class DeferredErrorFile(io.FileIO):
    """A new file for HDF5 that stores write errors instead of raising them.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x+")
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the stored error, if any."""
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        """Write all data. After an error, do nothing."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self._error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._error = error
        return size

    def readinto(self, buffer: Any) -> int:
        """Read data. Bytes after the end of the file are zeros."""
        target = memoryview(buffer).cast("B")
        count = super().readinto(target) or 0
        target[count:] = bytes(len(target) - count)
        return len(target)

    def truncate(self, size: int | None = None) -> int:
        """Set the size. After an error, do nothing."""
        try:
            if self._error is None:
                return super().truncate(size)
        except OSError as error:
            self._error = error
        return self.tell() if size is None else size


@contextmanager
def open_for_hdf5(path: Path) -> Iterator[DeferredErrorFile]:
    """Yield a new file for HDF5 and raise its stored error at the end.

    Raises:
        OSError: A write failed.
    """
    with DeferredErrorFile(path) as file:
        yield file
        file.check()


@contextmanager
def atomic_output(path: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and rename it to `path` on success.

    Raises:
        TraceFileError: The path exists or cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise TraceFileError(f"{path} exists: choose another path")
    new = temporary_path(path, "w")
    try:
        with _writing(path):
            if folder:
                new.mkdir()
            yield new
            if folder:
                # Unlike a file, a folder never replaces a folder that is not empty.
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
        # An error of reading the trace names the file of the trace.
        raise
    except OSError as error:
        # The message of the error would name the temporary file.
        raise TraceFileError(f"{path} cannot be written: {short_message(error)}") from error
