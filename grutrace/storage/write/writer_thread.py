"""A thread that writes records, with a queue that is bounded in bytes."""

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

# Import h5py first: exit functions run in reverse order, so h5py closes files after ours.
import h5py  # noqa: F401

from grutrace.errors import GrutraceWarning, SinkError
from grutrace.records import CallBatch, CallRecord, CallSeries, Collect, Record

#: Bytes of queued records above which the model waits: some hundredths of a second for a disk, and
#: little memory for a machine that runs models.
QUEUE_BYTES = 64 * 1024 * 1024

#: Longest time in seconds before a record is committed, so that a live reader, or a reader after a
#: crash, misses little.
COMMIT_SECONDS = 0.5

#: Bytes of uncommitted records after which a commit is due.
COMMIT_BYTES = 128 * 1024 * 1024

#: Bytes of queued records at which the thread wakes. Waking for every record would slow down a
#: stepwise decoder.
WAKE_BYTES = 1024 * 1024

#: Memory overhead in bytes of the Python objects of a record, and of each of its sites, about.
RECORD_OVERHEAD = 1024

#: The writer threads that are running.
_running: set[WriterThread] = set()


class Consumer(Protocol):
    """Writes or counts the records of a `WriterThread`, the only thread that calls it."""

    @property
    def name(self) -> str:
        """Name of the consumer in errors: the path of its file, or a description."""

    def write(self, record: Record) -> None:
        """Write a record."""

    def commit(self) -> None:
        """Commit everything written so far."""

    def close(self) -> None:
        """Commit, and release all resources."""

    def abandon(self) -> None:
        """Release all resources without a commit: after an error, or in a forked child."""


class WriterThread:
    """Queues records from any thread and writes them in its own thread.

    Args:
        writer: Consumer of the records. Only this object uses it from now on.
        queue_bytes: Most bytes in the queue. A larger record passes alone.
        commit_seconds: Longest time before a record is committed.
        commit_bytes: Uncommitted bytes after which a commit is due.
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
        # `_changed` guards all attributes below.
        self._queue: deque[tuple[Record, int]] = deque()
        self._queued = 0  # bytes in the queue
        self._unwritten = 0  # bytes in the queue or being written
        self._uncommitted = 0  # bytes written since the last commit
        self._appended = 0  # records
        self._committed = 0  # records
        self._commit_target = 0  # records that a caller of flush() waits for
        self._deadline: float | None = None  # of the next commit
        self._gathering = 0  # open contexts of gather()
        self._space_wanted = False  # a caller of submit() waits for space
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
        """Number of records queued so far."""
        return self._appended

    @property
    def ended(self) -> bool:
        """Whether the file is closed, in order or after an error."""
        return self._ended

    @property
    def has_failed(self) -> bool:
        """Whether writing has failed."""
        return self._error is not None

    def collect_from(self, collect: Collect) -> None:
        """Call a function on the writer thread before each commit, or when a commit would be due.

        Args:
            collect: A method that submits pending records of its object. It must not raise. Only
                a weak reference is kept, because the object may own this thread.
        """
        with self._changed:
            self._collect = weakref.WeakMethod(collect)
            self._changed.notify_all()

    def collect(self, *, wait: bool = True) -> None:
        """Call the function of `collect_from`, so that it submits pending records.

        Args:
            wait: Whether to wait for another thread that is collecting.
        """
        collect = None if self._collect is None else self._collect()
        if collect is not None:
            collect(wait)

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Return a context in which the writer thread lets records accumulate, while space lasts.

        Otherwise the two threads would exchange the GIL at every operation of PyTorch.
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
        """Queue a record. Wait while the queue is full, except in the writer thread itself.

        Raises:
            SinkError: Writing failed, the file is closed, or this process is a forked child of
                the process that writes it.
        """
        self._require_own_process()
        size = _size(record)
        with self._changed:
            waits = threading.current_thread() is not self._thread
            while (
                waits
                and self._unwritten
                and self._unwritten + size > self._limit
                and not self._ended
            ):
                self._space_wanted = True
                self._changed.notify_all()
                self._changed.wait()
            self._require_running()
            self._queue.append((record, size))
            self._queued += size
            self._unwritten += size
            self._appended += 1
            if self._deadline is None:
                self._deadline = time.monotonic() + self._commit_seconds
                self._changed.notify_all()
            elif self._should_wake():
                self._changed.notify_all()

    def flush(self) -> None:
        """Return once all queued records are committed; at once if the file is closed.

        Raises:
            SinkError: Writing failed, or this process is a forked child.
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
        """Start writing all queued records and closing the file, without waiting."""
        if os.getpid() == self._process:
            with self._changed:
                self._finishing = True
                self._changed.notify_all()

    def close(self) -> None:
        """Write all queued records and close the file. Does nothing in a forked child.

        Raises:
            SinkError: Writing failed, and no earlier call raised the error.
        """
        if os.getpid() != self._process:
            return
        self.finish()
        with self._changed:
            while not self._ended:
                self._changed.wait()
        # Join only now: an interrupted join makes the next one return too early (bpo-45274).
        self._thread.join()
        if not self._error_raised:
            self._raise_error()

    def abandon_after_fork(self) -> None:
        """In a forked child: release the file without writing. The parent writes it."""
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
                # The frames of the traceback hold records.
                traceback.clear_frames(error.__traceback__)
                self._error = error
        finally:
            with self._changed:
                self._queue.clear()
                self._queued = self._unwritten = 0
                self._ended = True
                self._changed.notify_all()
            _running.discard(self)

    def _run_once(self) -> bool:
        """Write the queue, and commit if due. Return False after the last record."""
        if self._wait():
            self.collect(wait=False)
            with self._changed:
                if self._queue:
                    # Collected records were pending for a while, so commit them now.
                    self._deadline = time.monotonic()
        records, number, finishing = self._pop_queue()
        while records:
            record, size = records.popleft()
            self._writer.write(record)
            del record
            with self._changed:
                self._unwritten -= size
                self._uncommitted += size
                self._changed.notify_all()
        if self._commit_due():
            self._writer.commit()
            self._note_commit(number)
        return not finishing

    def _wait(self) -> bool:
        """Wait until there is work. Return whether to collect pending records first."""
        with self._changed:
            collect_time = time.monotonic() + self._commit_seconds
            while not (self._should_wake() or self._space_wanted or self._commit_due()):
                deadline = collect_time if self._deadline is None else self._deadline
                if self._collect is None and self._deadline is None:
                    self._changed.wait()
                elif (seconds := deadline - time.monotonic()) > 0:
                    self._changed.wait(seconds)
                else:
                    return True
            return self._deadline is not None and time.monotonic() >= self._deadline

    def _should_wake(self) -> bool:
        return self._queued >= WAKE_BYTES and not self._gathering

    def _pop_queue(self) -> tuple[deque[tuple[Record, int]], int, bool]:
        """Return the queued records, the number of the last one, and whether to finish."""
        with self._changed:
            records, self._queue = self._queue, deque()
            self._queued = 0
            self._space_wanted = False
            return records, self._appended, self._finishing

    def _commit_due(self) -> bool:
        return (
            self._finishing
            or self._commit_target > self._committed
            or self._uncommitted >= self._commit_bytes
            or (self._deadline is not None and time.monotonic() >= self._deadline)
        )

    def _note_commit(self, number: int) -> None:
        """Note that the records up to this number are committed."""
        with self._changed:
            self._committed = number
            self._uncommitted = 0
            self._deadline = time.monotonic() + self._commit_seconds if self._queue else None
            self._changed.notify_all()

    def _commit_remaining(self) -> None:
        """Try to commit the records that were written before the one that failed."""
        with contextlib.suppress(Exception):
            self._writer.commit()
        self._writer.abandon()

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise SinkError(
                f"{self._writer.name} is written by process {self._process}, so its forked child "
                f"{os.getpid()} cannot write to it: start a separate trace in the child"
            )

    def _require_running(self) -> None:
        self._raise_error()
        if self._finishing or self._ended:
            raise SinkError(f"{self._writer.name} is closed: no more records can be written to it")

    def _raise_error(self) -> None:
        if self._error is not None:
            self._error_raised = True
            raise SinkError(
                f"{self._writer.name}: writing stopped, and uncommitted records are lost: "
                f"{self._error}"
            ) from self._error


def _size(record: Record) -> int:
    parts = record.series if isinstance(record, CallBatch) else (record,)
    sites = sum(len(part.sites) for part in parts if isinstance(part, CallRecord | CallSeries))
    return record.nbytes + RECORD_OVERHEAD * (len(parts) + sites)


def _close_all() -> None:
    """At exit: close the files that were left open."""
    for thread in list(_running):
        try:
            thread.collect()
            thread.close()
        except SinkError as error:
            warnings.warn(str(error), GrutraceWarning, stacklevel=1)


def _abandon_all_after_fork() -> None:
    """In a forked child, which has no writer threads: leave the files to the parent."""
    for thread in _running:
        # The parent may have been closing the file at the time of the fork.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            thread.abandon_after_fork()
    _running.clear()


# Registered after h5py's exit function, so it runs before it.
atexit.register(_close_all)
if hasattr(os, "register_at_fork"):  # Not available on Windows.
    os.register_at_fork(after_in_child=_abandon_all_after_fork)
