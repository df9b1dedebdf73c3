"""A thread that owns the writer, and a queue in front of it that is bounded in bytes."""

from __future__ import annotations

import atexit
import os
import threading
import time
import traceback
import warnings
from collections import deque

from grutrace.errors import GrutraceWarning, SinkError
from grutrace.record import Block, Record
from grutrace.storage.writer import Writer

#: How much waits to be written before the model has to wait. A second of a fast disk, and little
#: beside the memory of a machine that trains models. Bytes.
QUEUE_BYTES = 256 * 1024 * 1024

#: What an uncommitted record waits at most before it is committed, so that a reader that follows
#: the run, or finds it dead, misses little. Seconds.
COMMIT_SECONDS = 0.5

#: A commit is also due after this much. Bytes.
COMMIT_BYTES = 128 * 1024 * 1024

#: The thread is woken when this much waits, not for every record of a stepwise decoder. Bytes.
WAKE_BYTES = 1024 * 1024

#: Python objects of a record, and of a site in it, beside their arrays' elements. Bytes.
OBJECT_OVERHEAD = 1024

_running: set[Pump] = set()


class Pump:
    """Moves records from any thread to a writer in a thread of its own.

    Args:
        writer: Nobody else may use it from now on.
        queue_bytes: What waits at most. A larger record goes through on its own.
    """

    def __init__(self, writer: Writer, queue_bytes: int) -> None:
        self._writer = writer
        self._limit = queue_bytes
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._queue: deque[tuple[Record, int]] = deque()
        self._queued = 0
        self._since_commit = 0
        self._appended = 0
        self._written = 0
        self._committed = 0
        self._wanted = 0
        self._due: float | None = None
        self._finishing = False
        self._ended = False
        self._error: BaseException | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, name="grutrace writer", daemon=True)
        _running.add(self)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Queue a record; wait while the queue is full.

        Raises:
            SinkError: An earlier record could not be written, or the file is closed, or this is a
                forked child of the process that writes it.
        """
        self._require_own_process()
        size = _size(record)
        with self._changed:
            while self._queued and self._queued + size > self._limit and not self._ended:
                self._wake()
                self._changed.wait()
            self._require_running()
            self._queue.append((record, size))
            self._queued += size
            self._appended += 1
            if self._due is None or self._queued >= WAKE_BYTES:
                self._wake()

    def flush(self) -> None:
        """Return once everything queued so far is committed. On a closed file do nothing.

        Raises:
            SinkError: It could not be written, or this is a forked child.
        """
        self._require_own_process()
        with self._changed:
            target = self._appended
            self._wanted = max(self._wanted, target)
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
        """Have everything written and the file closed. In a forked child do nothing.

        Raises:
            SinkError: It could not be written, and nobody was told so far.
        """
        if os.getpid() != self._process:
            return
        self.finish()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            if not self._told:
                self._raise_error()
