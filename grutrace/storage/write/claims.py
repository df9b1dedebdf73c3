"""Claims on the paths that this process writes: each path has one writer at a time."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from grutrace.errors import TraceFileError
from grutrace.storage.hdf5.locks import HeldFile
from grutrace.storage.hdf5.safe_open import has_writer_flag

#: Seconds that a new writer waits for an abandoned one that is closing its file.
CLAIM_TIMEOUT = 30.0

#: Guards the claims; notified when a claim is released.
_changed = threading.Condition()

_claims: set[Claim] = set()


class Claim:
    """The exclusive right of a writer to a path in this process, until it is released.

    Args:
        path: A path without symbolic links. The file need not exist.

    Attributes:
        path: The path.
        closing: Whether the writer is about to release the path. Then other writers wait.

    Raises:
        TraceFileError: Another writer of this process has claimed the path or its file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.closing = path, False
        self._held: HeldFile | None = None
        with _changed:
            _changed.wait_for(lambda: not _is_closing(path), CLAIM_TIMEOUT)
            if _claims_on(path):
                raise TraceFileError(
                    f"{path} is being written by another tracer or grutrace.Statistics of this "
                    "process: close that one first, or choose another path"
                )
            _claims.add(self)

    def hold(self, file: HeldFile) -> None:
        """Keep the file that was published at the path open, to notice when it is replaced."""
        previous, self._held = self._held, file
        if previous is not None:
            previous.close()

    def displacement_error(self) -> str:
        """Return the error message for a file that is no longer at the path; empty if it is."""
        if self._held is None:
            return ""
        try:
            if self._held.is_at(self.path):
                return ""
            change = "was replaced by another file"
        except FileNotFoundError:
            change = "was deleted or moved"
        except OSError:
            return ""
        return f"{self.path} {change} while it was written: recording to it has stopped"

    def overwrite_error(self) -> str:
        """Return the error message for a file without its writer flag; empty if it has the flag."""
        with contextlib.suppress(OSError):
            if not self.displacement_error() and not has_writer_flag(self.path):
                return (
                    f"{self.path} was overwritten by another program: recording to it has stopped"
                )
        return ""

    def release(self) -> None:
        """Release the path. Releasing twice does nothing."""
        with _changed:
            _claims.discard(self)
            _changed.notify_all()
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def covers(self, path: Path) -> bool:
        """Return whether a path, or a hard link at it, belongs to this claim."""
        if path == self.path:
            return self._held is None or path.exists()
        try:
            return self._held is not None and self._held.is_at(path)
        except OSError:
            return False


def require_unclaimed(path: Path) -> None:
    """Refuse a path that this process is writing.

    Raises:
        TraceFileError: A writer of this process has claimed the path.
    """
    Claim(path).release()


def _claims_on(path: Path) -> list[Claim]:
    return [claim for claim in _claims if claim.covers(path)]


def _is_closing(path: Path) -> bool:
    claims = _claims_on(path)
    return bool(claims) and all(claim.closing for claim in claims)


def _release_all_after_fork() -> None:
    """In a forked child: release all claims. The parent keeps writing and keeps its locks."""
    global _changed
    _changed = threading.Condition()
    for claim in list(_claims):
        claim.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _changed.acquire(),
        after_in_parent=lambda: _changed.release(),
        after_in_child=_release_all_after_fork,
    )
