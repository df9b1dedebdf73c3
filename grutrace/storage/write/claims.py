"""Paths that writers of this process write to: each has one writer at a time."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from grutrace.errors import TraceFileError
from grutrace.storage.hdf5.locks import HeldFile

#: How long a new writer waits for one that was given up and is closing its file. Seconds.
CLAIM_TIMEOUT = 30.0

#: Guards all below; told when a path is given back.
_changed = threading.Condition()

_claims: set[Claim] = set()


class Claim:
    """A path that nobody else of this process writes to until it is released.

    Args:
        path: Without symbolic links in it. There need not be a file.

    Attributes:
        path: It.
        closing: Whether the writer is about to release it: then others wait for that.

    Raises:
        TraceFileError: Another writer has the path, or the file that is there now.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.closing = path, False
        self._held: HeldFile | None = None
        with _changed:
            _changed.wait_for(lambda: not _is_closing(path), CLAIM_TIMEOUT)
            if _holders(path):
                raise TraceFileError(
                    f"{path} is being written by another tracer or grutrace.Statistics of this "
                    "process: close that one first, or name another file"
                )
            _claims.add(self)

    def hold(self, file: HeldFile) -> None:
        """Take a file as the one that belongs at the path."""
        before, self._held = self._held, file
        if before is not None:
            before.close()

    def displaced(self) -> str:
        """What became of the file that belongs at the path; empty if it is there."""
        if self._held is None:
            return ""
        try:
            there = self._held.is_at(self.path)
        except FileNotFoundError:
            return "was deleted or moved while it was written"
        except OSError:
            return ""
        return "" if there else "was replaced by another file while it was written"

    def release(self) -> None:
        """Give the path back. Releasing twice does nothing."""
        with _changed:
            _claims.discard(self)
            _changed.notify_all()
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def covers(self, path: Path) -> bool:
        """Whether a path, or a hard link at it, is this one."""
        if path == self.path:
            return self._held is None or path.exists()
        try:
            return self._held is not None and self._held.is_at(path)
        except OSError:
            return False


def require_unclaimed(path: Path) -> None:
    """Refuse a path that a writer of this process writes to.

    Raises:
        TraceFileError: One does.
    """
    Claim(path).release()


def _holders(path: Path) -> list[Claim]:
    return [each for each in _claims if each.covers(path)]


def _is_closing(path: Path) -> bool:
    holders = _holders(path)
    return bool(holders) and all(each.closing for each in holders)


def _release_all_after_fork() -> None:
    """In a forked child: the files are written by the parent, which keeps its locks."""
    global _changed
    _changed = threading.Condition()
    for each in list(_claims):
        each.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _changed.acquire(),
        after_in_parent=lambda: _changed.release(),
        after_in_child=_release_all_after_fork,
    )
