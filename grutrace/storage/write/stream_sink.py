"""Streaming a trace to its file while the model runs on.

Records on their way to a writer, some at a time through a function that finishes them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from grutrace.records import Collect, Record, TraceHeader
from grutrace.storage.write.claims import Claim
from grutrace.storage.write.writer import Writer
from grutrace.storage.write.writer_thread import QUEUE_BYTES, Consumer, WriterThread

#: Returns records as they are to be stored, as many, in the same order.
RecordTransform: TypeAlias = Callable[[Sequence[Record]], list[Record]]

#: Records are gathered up to this much, so that small calls are finished many at a time. Bytes.
BATCH_BYTES = 1024 * 1024


class TransformingConsumer:
    """A consumer in front of another.

    Args:
        consumer: Gets the finished records.
        prepare: Finishes them.
    """

    def __init__(self, consumer: Consumer, prepare: RecordTransform) -> None:
        self._consumer, self._prepare = consumer, prepare
        self._waiting: list[Record] = []
        self._bytes = 0

    @property
    def name(self) -> str:
        """What errors call it."""
        return self._consumer.name

    def write(self, record: Record) -> None:
        """Take a record."""
        self._waiting.append(record)
        self._bytes += record.nbytes
        if self._bytes >= BATCH_BYTES:
            self._pass_on()

    def commit(self) -> None:
        """Make everything taken so far count."""
        self._pass_on()
        self._consumer.commit()

    def close(self) -> None:
        """Commit, and release everything."""
        self._pass_on()
        self._consumer.close()

    def abandon(self) -> None:
        """Release everything without a commit."""
        self._waiting = []
        self._consumer.abandon()

    def _pass_on(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        for record in self._prepare(waiting) if waiting else ():
            self._consumer.write(record)


class FileSink:
    """A sink that writes a file from a thread of its own.

    What is appended counts in the file half a second later at most, and at once after `flush`. A
    sink that nobody closes is closed when it is forgotten, and when Python ends.

    Args:
        path: Of the file, which is created here.
        header: Of the trace.
        mode: As for `Writer`: "w", "overwrite" or "a".
        queue_bytes: How much waits to be written before `append` has to wait, beside the little
            that the writer gathers.
        prepare: Finishes records on the thread that writes.
        fsync: Whether what counts is on the disk, and not only in the system's memory.

    Raises:
        OptionError: The mode is none of these.
        TraceFileError: The file cannot be created or appended to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: TraceHeader,
        mode: str = "w",
        *,
        queue_bytes: int = QUEUE_BYTES,
        prepare: RecordTransform | None = None,
        fsync: bool = False,
    ) -> None:
        writer = Writer(path, header, mode, fsync=fsync)
        self._writer, self.path = writer, writer.path
        consumer = TransformingConsumer(writer, prepare) if prepare else writer
        self._thread = WriterThread(consumer, queue_bytes, commit_seconds=writer.commit_seconds)
        # Without waiting: whatever thread the collector runs in may hold HDF5's lock.
        weakref.finalize(self, _finish, self._thread, writer.claim).atexit = False

    @property
    def appended(self) -> int:
        """Records appended so far."""
        return self._thread.appended

    @property
    def ended(self) -> bool:
        """Whether the file is closed, in order or after an error."""
        return self._thread.ended

    @property
    def has_failed(self) -> bool:
        """Whether something could not be written."""
        return self._thread.has_failed

    def collect_from(self, collect: Collect) -> None:
        """Have the thread call this before each commit, and whenever it has waited as long."""
        self._thread.collect_from(collect)

    def gather(self) -> AbstractContextManager[None]:
        """Return a context in which the thread leaves what is appended until its end."""
        return self._thread.gather()

    def append(self, record: Record) -> None:
        """Queue a record; wait while the queue is full.

        Raises:
            SinkError: An earlier record could not be written, the sink is closed, or this process
                is a forked child of the one that opened it.
        """
        self._thread.submit(record)

    def flush(self) -> None:
        """Return once everything appended so far is committed to the file.

        Raises:
            SinkError: It could not be written, the file was deleted, moved or replaced, or this
                process is a forked child.
        """
        self._thread.flush()
        self._writer.require_in_place()

    def close(self) -> None:
        """Write what waits and close the file. Closing twice does nothing.

        Raises:
            SinkError: Something could not be written, and no earlier call has said so.
        """
        self._thread.close()


def _finish(thread: WriterThread, claim: Claim) -> None:
    """Have the file of a forgotten sink closed; a new writer of its path waits for that."""
    claim.closing = True
    thread.finish()
