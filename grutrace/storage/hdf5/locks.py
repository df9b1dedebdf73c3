"""Detect whether another process writes to a file: a writer holds a shared flock() on it.

HDF5 releases its own lock once a file is open for SWMR writing, because readers may open it then.
A shared lock admits readers, but an attempt to take an exclusive lock fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Not available on Windows.
    fcntl = None

#: Error numbers of flock() on a file system without locks. 524 is Linux's internal ENOTSUPP, which
#: some network file systems return.
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, 524})

#: A reader holds a lock for a moment while it opens the file. So a lock counts only if it is still
#: held after this many tries, with this pause between them, in seconds.
TRIES, PAUSE = 5, 0.02


class HeldFile:
    """A file kept open and locked: other processes see its writer, and its inode stays in use.

    Args:
        path: Path of an existing file.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._status = path.stat()
        self._descriptor: int | None = None
        if fcntl is None:
            # Windows does not rename or replace an open file.
            return
        # A new descriptor: child processes would inherit the one of HDF5.
        self._descriptor = os.open(path, os.O_RDONLY)
        self._status = os.fstat(self._descriptor)
        # On a file system without locks, only the inode is kept.
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """Hold the file at a path. Return None if it cannot be opened."""
        try:
            return cls(path)
        except OSError:
            return None

    def is_at(self, path: Path) -> bool:
        """Return whether this file is the one at a path.

        Raises:
            FileNotFoundError: No file exists at the path.
            OSError: The path cannot be examined.
        """
        status = self._status if self._descriptor is None else os.fstat(self._descriptor)
        return os.path.samestat(path.stat(), status)

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # Do not unlock: a forked child shares the lock with its parent.
            os.close(descriptor)


def is_locked(path: Path) -> bool | None:
    """Return whether another process or another descriptor of this one holds a lock on a file.

    Returns:
        None if unknown: the file system has no locks, or the platform has no flock().
    """
    if fcntl is None:
        return None
    try:
        descriptor = _open(path)
    except OSError:
        return None
    try:
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError:
                return None
            return False
        return True
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        # NFS grants an exclusive lock only on a file that is open for writing.
        return os.open(path, os.O_RDWR)
    except OSError:
        return os.open(path, os.O_RDONLY)
