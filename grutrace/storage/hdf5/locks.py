"""Which process writes to a file: told by a shared flock() that a writer holds on it.

HDF5 takes its own lock off once a file is open for SWMR writing, since readers may come then. A
shared lock does not keep them out, and whoever asks for an exclusive one is told that it is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Self

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # There is none on Windows.
    fcntl = None

#: What flock() fails with where the file system has no locks. 524 is Linux's own ENOTSUPP, which
#: some network file systems pass on.
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, 524})

#: A reader that opens the file holds a lock for a moment: so a lock counts only if it is still
#: there after so many tries, with so long between them. Seconds.
TRIES, PAUSE = 5, 0.02


class HeldFile:
    """A file kept open and locked, so that others see that it is written and its inode stays.

    Args:
        path: Of a file that exists.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._status = path.stat()
        self._descriptor: int | None = None
        if fcntl is None:
            # On Windows nobody could rename or replace a file that is open.
            return
        # Not HDF5's own descriptor: that one would be inherited by other programs.
        self._descriptor = os.open(path, os.O_RDONLY)
        self._status = os.fstat(self._descriptor)
        # Without locks there is still the inode.
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """The file at a path; None if it cannot be opened."""
        try:
            return cls(path)
        except OSError:
            return None

    def is_at(self, path: Path) -> bool:
        """Whether this is the file at a path.

        Raises:
            OSError: It cannot be told; a FileNotFoundError if there is no file.
        """
        held = self._status if self._descriptor is None else os.fstat(self._descriptor)
        return os.path.samestat(path.stat(), held)

    def close(self) -> None:
        """Let go of the file. Closing twice does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # Not unlocked: a forked child has the same lock as its parent.
            os.close(descriptor)


def is_locked(path: Path) -> bool | None:
    """Whether another process, or another descriptor of this one, holds a lock on a file.

    Returns:
        None where that cannot be known: the file system has no locks, or Python no flock().
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
        # Over NFS an exclusive lock needs a file that is open for writing.
        return os.open(path, os.O_RDWR)
    except OSError:
        return os.open(path, os.O_RDONLY)
