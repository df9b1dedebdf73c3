"""A sink that writes a trace to its file from another thread, while the model runs.

`TransformingConsumer` passes batches of records through a function before they are written,
`PairedConsumer` passes them to a counter as well.
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

#: Completes records before they are stored. Returns them in the same order; a batch of calls may
#: become single calls.
RecordTransform: TypeAlias = Callable[[Sequence[Record]], list[Record]]

#: Bytes of records that are transformed together, so that many small calls share the overhead.
BATCH_BYTES = 1024 * 1024


class TransformingConsumer:
    """A consumer that transforms batches of records and passes them to another consumer.

    Args:
        consumer: Consumer of the transformed records.
        transform: Function that transforms a batch.
    """

    def __init__(self, consumer: Consumer, transform: RecordTransform) -> None:
        self._consumer, self._transform = consumer, transform
        self._batch: list[Record] = []
        self._bytes = 0

    @property
    def name(self) -> str:
        """Name of the consumer in errors."""
        return self._consumer.name

    def write(self, record: Record) -> None:
        """Add a record to the batch."""
        self._batch.append(record)
        self._bytes += record.nbytes
        if self._bytes >= BATCH_BYTES:
            self._flush()

    def commit(self) -> None:
        """Commit everything written so far."""
        self._flush()
        self._consumer.commit()

    def close(self) -> None:
        """Commit, and release everything."""
        self._flush()
        self._consumer.close()

    def abandon(self) -> None:
        """Release everything without a commit."""
        self._batch = []
        self._consumer.abandon()

    def _flush(self) -> None:
        batch, self._batch, self._bytes = self._batch, [], 0
        for record in self._transform(batch) if batch else ():
            self._consumer.write(record)


class PairedConsumer:
    """A consumer that passes every record to two others.

    Args:
        first: The consumer that writes; records that it refuses do not reach the second.
        second: A consumer that holds no file.
    """

    def __init__(self, first: Consumer, second: Consumer) -> None:
        self._first, self._second = first, second

    @property
    def name(self) -> str:
        """Name of the first consumer."""
        return self._first.name

    def write(self, record: Record) -> None:
        """Write a record to both."""
        self._first.write(record)
        self._second.write(record)

    def commit(self) -> None:
        """Commit both."""
        self._first.commit()
        self._second.commit()

    def close(self) -> None:
        """Commit, and release everything."""
        self._second.commit()
        self._first.close()

    def abandon(self) -> None:
        """Release everything without a commit."""
        self._first.abandon()
        self._second.abandon()


class ThreadedSink:
    """A sink whose records are taken in by a thread of its own.

    Args:
        thread: The thread.
    """

    def __init__(self, thread: WriterThread) -> None:
        self._thread = thread

    @property
    def thread(self) -> WriterThread:
        """The thread."""
        return self._thread

    @property
    def appended(self) -> int:
        """Number of records appended so far."""
        return self._thread.appended

    @property
    def has_failed(self) -> bool:
        """Whether taking in a record, or a commit, failed."""
        return self._thread.has_failed

    def collect_from(self, collect: Collect) -> None:
        """Call a function on the thread before each commit, and at least as often."""
        self._thread.collect_from(collect)

    def gather(self) -> AbstractContextManager[None]:
        """Return a context in which the thread lets records accumulate."""
        return self._thread.gather()

    def append(self, record: Record) -> None:
        """Queue a record; wait while the queue is full.

        Raises:
            SinkError: An earlier record could not be taken in, the sink is closed, or this process
                is a forked child of the process that opened it.
        """
        self._thread.submit(record)

    def flush(self) -> None:
        """Return once everything appended so far is taken in and committed.

        Raises:
            SinkError: That failed, or this process is a forked child.
        """
        self._thread.flush()

    def close(self) -> None:
        """Take in all queued records and end the thread. Closing twice does nothing.

        Raises:
            SinkError: That failed, and no earlier call raised the error.
        """
        self._thread.close()


class FileSink(ThreadedSink):
    """A sink that writes records to a file from its own thread.

    A record is committed within half a second, or at `flush`. A sink that is not closed is closed
    when it is garbage-collected, or when Python exits.

    Args:
        path: Path of the file, which is opened here.
        header: Header of the trace.
        mode: "w", "overwrite" or "a", as for `Writer`.
        queue_bytes: Bytes of queued records above which `append` waits.
        transform: Function that completes records on the writer thread.
        fsync: Whether each commit waits until the disk has stored it.
        counter: A consumer that also gets the records, on the same thread; it holds no file.

    Raises:
        OptionError: The mode is unknown.
        TraceFileError: The file cannot be created or appended to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: TraceHeader,
        mode: str = "w",
        *,
        queue_bytes: int = QUEUE_BYTES,
        transform: RecordTransform | None = None,
        fsync: bool = False,
        counter: Consumer | None = None,
    ) -> None:
        writer = Writer(path, header, mode, fsync=fsync)
        self._writer, self.path = writer, writer.path
        consumer: Consumer = PairedConsumer(writer, counter) if counter else writer
        if transform:
            consumer = TransformingConsumer(consumer, transform)
        super().__init__(WriterThread(consumer, queue_bytes, commit_seconds=writer.commit_seconds))
        # Do not wait: the thread that runs the garbage collector may hold the lock of HDF5.
        weakref.finalize(self, _finish, self._thread, writer.claim).atexit = False

    @property
    def ended(self) -> bool:
        """Whether the file is closed, in order or after an error."""
        return self._thread.ended

    def flush(self) -> None:
        """Return once everything appended so far is committed to the file.

        Raises:
            SinkError: Writing failed, the file was deleted, moved or replaced, or this process is
                a forked child.
        """
        super().flush()
        self._writer.require_in_place()


def _finish(thread: WriterThread, claim: Claim) -> None:
    """Start closing the file of a garbage-collected sink. A new writer of its path waits for it."""
    claim.closing = True
    thread.finish()
