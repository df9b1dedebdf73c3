"""A thread that consumes records, and a queue in front of it that is bounded in bytes."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# Before ours is registered below, so that at exit its own function runs after it.
import h5py  # noqa: F401

from grutrace.errors import GrutraceWarning, SinkError
from grutrace.records import CallRecord, Collect, Record

#: How much waits to be written before the model has to wait: some hundredths of a second of a disk,
#: and little beside the memory of a machine that runs models. Bytes.
QUEUE_BYTES = 64 * 1024 * 1024

#: How long a record waits at most before it is committed, so that a reader that follows the run,
#: or finds its writer dead, misses little. Seconds.
COMMIT_SECONDS = 0.5

#: A commit is also due after this much. Bytes.
COMMIT_BYTES = 128 * 1024 * 1024

#: The thread is woken when this much waits, rather than for every record of a stepwise decoder,
#: whose model it would hold up. Bytes.
WAKE_BYTES = 1024 * 1024

#: Memory of the Python objects of a record, and of each site in it, beside the arrays' elements,
#: about. Bytes.
RECORD_OVERHEAD = 1024

#: Those whose threads are at work.
_running: set[WriterThread] = set()


class Consumer(Protocol):
    """Writes or counts the records of a `WriterThread`, the only thread that calls it."""

    @property
    def name(self) -> str:
        """What errors call it: the path of its file, or what it is."""

    def write(self, record: Record) -> None:
        """Take a record."""

    def commit(self) -> None:
        """Make everything taken so far count."""

    def close(self) -> None:
        """Commit, and release everything."""

    def abandon(self) -> None:
        """Release everything without a commit: after an error, or in a forked child."""


class WriterThread:
    """Takes records from any thread and has them written by one.

    Args:
        writer: Nobody else uses it from now on.
        queue_bytes: How much waits at most. A larger record goes through on its own.
        commit_seconds: How long a record waits at most before it is committed.
        commit_bytes: A commit is also due after this much.
    """

    def __init__(
        self,
        writer: Consumer,
        queue_bytes: int,
        *,
        commit_seconds: float = COMMIT_SECONDS,
        commit_bytes: float = COMMIT_BYTES,
    ) -> None:
        self._writer = writer
        self._limit = queue_bytes
        self._commit_seconds, self._commit_bytes = commit_seconds, commit_bytes
        self._process = os.getpid()
        self._changed = threading.Condition()
        # All below belongs to whoever holds `_changed`.
        self._queue: deque[tuple[Record, int]] = deque()
        self._waiting = 0  # bytes in the queue
        self._held = 0  # bytes in the queue and on their way from it to the file
        self._uncommitted = 0  # bytes written since the last commit
        self._appended = 0  # records
        self._committed = 0  # records
        self._commit_target = 0  # records that somebody waits to see committed
        self._deadline: float | None = None  # of the next commit
        self._gathering = 0  # contexts in which records are put together
        self._space_wanted = False  # somebody waits for room
        self._finishing = False
        self._ended = False
        self._error: BaseException | None = None
        self._collect: weakref.WeakMethod[Collect] | None = None
        self._error_raised = False
        self._thread = threading.Thread(target=self._run, name="grutrace writer", daemon=True)
        _running.add(self)
        self._thread.start()

    @property
    def appended(self) -> int:
        """Records queued so far."""
        return self._appended

    @property
    def ended(self) -> bool:
        """Whether the file is closed, in order or after an error."""
        return self._ended

    @property
    def has_failed(self) -> bool:
        """Whether something could not be written."""
        return self._error is not None

    def collect_from(self, collect: Collect) -> None:
        """Have the thread call this before each commit, and whenever it has waited as long.

        Args:
            collect: A method that puts records that wait elsewhere, and never raises. Its object is
                not kept alive: it may be what closes this.
        """
        with self._changed:
            self._collect = weakref.WeakMethod(collect)
            self._changed.notify_all()

    def collect(self, *, wait: bool = True) -> None:
        """Have records put that wait elsewhere.

        Args:
            wait: Whether to wait for another thread that is just about it.
        """
        collect = None if self._collect is None else self._collect()
        if collect is not None:
            collect(wait)

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Have the thread leave what is put until the end of the context, while there is room.

        At every operation of PyTorch's the two would hand Python's lock to each other.
        """
        with self._changed:
            self._gathering += 1
        try:
            yield
        finally:
            with self._changed:
                self._gathering -= 1
                if self._should_wake():
                    self._changed.notify_all()

    def submit(self, record: Record) -> None:
        """Queue a record; wait while the queue is full, but not in the thread that empties it.

        Raises:
            SinkError: Something could not be written, the file is closed, or this process is a
                forked child of the one that writes it.
        """
        self._require_own_process()
        size = _size(record)
        with self._changed:
            waits = threading.current_thread() is not self._thread
            while waits and self._held and self._held + size > self._limit and not self._ended:
                self._space_wanted = True
                self._changed.notify_all()
                self._changed.wait()
            self._require_running()
            self._queue.append((record, size))
            self._waiting += size
            self._held += size
            self._appended += 1
            if self._deadline is None:
                self._deadline = time.monotonic() + self._commit_seconds
                self._changed.notify_all()
            elif self._should_wake():
                self._changed.notify_all()

    def flush(self) -> None:
        """Return once everything so far is committed; at once if the file is closed.

        Raises:
            SinkError: Something could not be written, or this process is a forked child.
        """
        self._require_own_process()
        self.collect()
        with self._changed:
            target = self._commit_target = self._appended
            self._changed.notify_all()
            while self._committed < target and not self._ended:
                self._changed.wait()
            self._raise_error()

    def finish(self) -> None:
        """Have everything written and the file closed, without waiting for it."""
        if os.getpid() == self._process:
            with self._changed:
                self._finishing = True
                self._changed.notify_all()

    def close(self) -> None:
        """Have everything written and the file closed. A forked child does nothing.

        Raises:
            SinkError: Something could not be written, and no earlier call has said so.
        """
        if os.getpid() != self._process:
            return
        self.finish()
        with self._changed:
            while not self._ended:
                self._changed.wait()
        # Not at once: a join that was interrupted makes the next one return too early (bpo-45274).
        self._thread.join()
        if not self._error_raised:
            self._raise_error()

    def abandon_after_fork(self) -> None:
        """In a forked child: leave the file to the parent."""
        self._writer.abandon()

    def _run(self) -> None:
        try:
            while self._run_once():
                pass
            self._writer.close()
        except BaseException as error:
            try:
                self._commit_remaining()
            finally:
                # The frames that failed hold records.
                traceback.clear_frames(error.__traceback__)
                self._error = error
        finally:
            with self._changed:
                self._queue.clear()
                self._waiting = self._held = 0
                self._ended = True
                self._changed.notify_all()
            _running.discard(self)

    def _run_once(self) -> bool:
        """Write what waits, and commit if that is due. False once nothing more will come."""
        if self._wait():
            self.collect(wait=False)
            with self._changed:
                if self._queue:
                    # What was collected has waited already.
                    self._deadline = time.monotonic()
        records, last, finishing = self._pop_queue()
        while records:
            record, size = records.popleft()
            self._writer.write(record)
            del record
            with self._changed:
                self._held -= size
                self._uncommitted += size
                self._changed.notify_all()
        if self._commit_due():
            self._writer.commit()
            self._note_commit(last)
        return not finishing

    def _wait(self) -> bool:
        """Wait until there is something to do; whether it is time to collect before that."""
        with self._changed:
            asked = time.monotonic() + self._commit_seconds
            while not (self._should_wake() or self._space_wanted or self._commit_due()):
                until = asked if self._deadline is None else self._deadline
                if self._collect is None and self._deadline is None:
                    self._changed.wait()
                elif (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    return True
            return self._deadline is not None and time.monotonic() >= self._deadline

    def _should_wake(self) -> bool:
        return self._waiting >= WAKE_BYTES and not self._gathering

    def _pop_queue(self) -> tuple[deque[tuple[Record, int]], int, bool]:
        """What waits, the number of the last record, and whether the end has come."""
        with self._changed:
            records, self._queue = self._queue, deque()
            self._waiting = 0
            self._space_wanted = False
            return records, self._appended, self._finishing

    def _commit_due(self) -> bool:
        return (
            self._finishing
            or self._commit_target > self._committed
            or self._uncommitted >= self._commit_bytes
            or (self._deadline is not None and time.monotonic() >= self._deadline)
        )

    def _note_commit(self, last: int) -> None:
        with self._changed:
            self._committed = last
            self._uncommitted = 0
            self._deadline = time.monotonic() + self._commit_seconds if self._queue else None
            self._changed.notify_all()

    def _commit_remaining(self) -> None:
        """Commit the records that were written before the one that failed, if the file lets us."""
        with contextlib.suppress(Exception):
            self._writer.commit()
        self._writer.abandon()

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise SinkError(
                f"{self._writer.name} is written by process {self._process}; a forked child, here "
                f"{os.getpid()}, cannot write to it. Start a trace of its own there"
            )

    def _require_running(self) -> None:
        self._raise_error()
        if self._finishing or self._ended:
            raise SinkError(f"{self._writer.name} is closed: nothing more can be written to it")

    def _raise_error(self) -> None:
        if self._error is not None:
            self._error_raised = True
            raise SinkError(
                f"{self._writer.name}: writing stopped, and what was not committed by then is "
                f"lost: {self._error}"
            ) from self._error


def _size(record: Record) -> int:
    sites = len(record.sites) if isinstance(record, CallRecord) else 0
    return record.nbytes + RECORD_OVERHEAD * (1 + sites)


def _close_all() -> None:
    """At the end of the interpreter: close what its users forgot."""
    for thread in list(_running):
        try:
            thread.collect()
            thread.close()
        except SinkError as error:
            warnings.warn(str(error), GrutraceWarning, stacklevel=1)


def _abandon_all_after_fork() -> None:
    """In a forked child: the threads are not there, and the files are the parent's."""
    for thread in _running:
        # The parent may just have been closing it.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            thread.abandon_after_fork()
    _running.clear()


# After h5py's own, and so, at exit, before it.
atexit.register(_close_all)
if hasattr(os, "register_at_fork"):  # There is none on Windows.
    os.register_at_fork(after_in_child=_abandon_all_after_fork)
