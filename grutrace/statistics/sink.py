"""The sink that counts records on a thread of its own, while the model runs."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from grutrace.errors import NotRecordedError, SinkError, TraceFileError
from grutrace.records import (
    Array,
    CallBatch,
    CallRecord,
    Origin,
    Record,
    TraceHeader,
    WeightsRecord,
)
from grutrace.statistics.accumulator import Accumulator
from grutrace.statistics.file import StatisticsFile
from grutrace.storage.format.tables import Tables
from grutrace.storage.interfaces import SnapshotReader
from grutrace.storage.write.file_sink import ThreadedSink
from grutrace.storage.write.validation import RecordValidator
from grutrace.storage.write.writer_thread import WriterThread

_REFUSAL = (
    "a statistics sink keeps figures only, not rows, calls, sequences or weights. The figures "
    "are in the grutrace.Statistics that the tracer was given: statistics[site].update, "
    "statistics.calls"
)


class StatisticsOnlySource:
    """A `Source` with a header and no rows; reading anything else raises an error.

    Args:
        header: Header of the trace.
    """

    name = "statistics"
    live = True
    files: tuple[Path, ...] = ()

    def __init__(self, header: TraceHeader) -> None:
        self.header = header
        self._tables = _NoTables()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the header only."""
        return StatisticsOnlySource, (self.header,)

    def refresh(self) -> Tables:
        """Return tables that cannot be read."""
        return self._tables

    def as_of(self, tables: Tables) -> SnapshotReader:  # noqa: ARG002
        """Return the source itself."""
        return self

    def _refuse(self, *_arguments: Any, **_named: Any) -> NoReturn:
        raise NotRecordedError(_REFUSAL)

    rows = initial = checks = backward = weights = _refuse


class _NoTables(Tables):
    closed = False

    def __init__(self) -> None:
        """Set no table, so that reading any table raises an error."""

    def __getattr__(self, name: str) -> Any:
        if name in {field.name for field in fields(Tables)}:
            raise NotRecordedError(_REFUSAL)
        raise AttributeError(name)


#: Size of the queue, in bytes: some tens of calls. The model waits while it is full.
QUEUE_BYTES = 64 * 1024 * 1024

#: Size of a batch of calls that are counted together, in bytes. The calls of a stepwise decoder are
#: too small for NumPy.
BATCH_BYTES = 2 * 1024 * 1024

#: Size of a block of rows that is counted without joining it with others, in bytes.
LARGE_BYTES = 256 * 1024


class StatisticsSink(ThreadedSink, StatisticsOnlySource):
    """A sink that counts; as a source it has no rows.

    A record is counted within `seconds`, and at once on `flush`. A sink that is not closed is
    closed when it is garbage-collected or when Python exits.

    Args:
        header: Header of the trace.
        accumulator: The counts; its layout fits the header.
        lock: Lock of the accumulator.
        file: The file to keep up to date, if any.
        seconds: Interval between two saves while records arrive.

    Raises:
        TraceFileError: The file cannot be written.
    """

    def __init__(
        self,
        header: TraceHeader,
        accumulator: Accumulator,
        lock: threading.Lock,
        file: SinkFile | None,
        seconds: float,
    ) -> None:
        StatisticsOnlySource.__init__(self, header)
        self._file = file
        if file is not None:
            self.name = file.name
            # Written now, so that an error is raised before the run.
            file.open()
        self._counter = CountingConsumer(header, accumulator, lock, file)
        thread = WriterThread(
            self._counter, QUEUE_BYTES, commit_seconds=seconds, commit_bytes=math.inf
        )
        ThreadedSink.__init__(self, thread)
        # Without waiting: the thread of the garbage collector may hold the lock.
        weakref.finalize(self, thread.finish).atexit = False

    @property
    def counted_calls(self) -> int:
        """Number of calls counted, and saved if there is a file."""
        return self._counter.stored

    def flush(self) -> None:
        """Wait until all appended records are counted, and saved if there is a file.

        Raises:
            SinkError: Counting or saving failed, the file was deleted or replaced, or this process
                is a forked child.
        """
        super().flush()
        if self._file is not None and not self.thread.ended:
            try:
                self._file.require_in_place()
            except TraceFileError as error:
                raise SinkError(str(error)) from error


class SinkFile:
    """The statistics file, as used by one sink.

    Args:
        file: The file, shared by all sinks of the statistics.
        save: Writes the current counts to it.
    """

    def __init__(self, file: StatisticsFile, save: Callable[[], None]) -> None:
        self.name, self.save = str(file.path), save
        self.sync_directory, self.require_in_place = file.sync_directory, file.require_in_place
        self._file, self._is_open, self._process = file, False, os.getpid()

    def open(self) -> None:
        """Claim the file and write it for the first time.

        Raises:
            TraceFileError: It cannot be written, or another writer uses it.
        """
        self._file.acquire()
        self._is_open = True
        try:
            self.save()
            self.sync_directory()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up the claim. Closing twice, or in a forked child, does nothing."""
        if self._is_open and os.getpid() == self._process:
            self._is_open = False
            self._file.release()


class CountingConsumer:
    """The work of the thread that counts.

    Args:
        header: Header of the trace.
        accumulator: The counts; its layout fits the header.
        lock: Lock of the accumulator.
        file: The statistics file to keep up to date, if any.
    """

    def __init__(
        self,
        header: TraceHeader,
        accumulator: Accumulator,
        lock: threading.Lock,
        file: SinkFile | None = None,
    ) -> None:
        self.name = "a grutrace.Statistics" if file is None else file.name
        self._validator = RecordValidator(header.modules)
        self._accumulator, self._lock = accumulator, lock
        self._file = file
        self._sites: list[list[tuple[int, str]]] = [[] for _ in header.modules]
        suffixes = (site.suffix for module in header.modules for site in module.sites)
        for number, (site, suffix) in enumerate(zip(accumulator.layout, suffixes, strict=True)):
            self._sites[site.module].append((number, suffix))
        self._batch: list[CallRecord | CallBatch] = []
        self._bytes = 0
        self._unsaved = False
        self._counted = self.stored = 0

    def write(self, record: Record) -> None:
        """Accept a record."""
        self._validator.validate(record)
        self._unsaved = True
        if isinstance(record, CallRecord | CallBatch):
            self._batch.append(record)
            self._bytes += record.nbytes
            if self._bytes >= BATCH_BYTES:
                self._count()
            return
        with self._lock:
            if isinstance(record, WeightsRecord):
                self._accumulator.modules[record.module]["versions"] += 1
            else:
                self._accumulator.annotations += 1

    def commit(self) -> None:
        """Count the pending records and save the file."""
        self._count()
        if self._file is not None and self._unsaved:
            self._file.save()
            self._unsaved = False
        self.stored = self._counted
        if self._file is not None:
            self._file.sync_directory()

    def close(self) -> None:
        """Commit, and give up the claim on the file."""
        self.commit()
        if self._file is not None:
            self._file.close()

    def abandon(self) -> None:
        """Discard the pending records."""
        self._batch = []
        if self._file is not None:
            self._file.close()

    def _count(self) -> None:
        batch, self._batch, self._bytes = self._batch, [], 0
        if not batch:
            return
        with self._lock:
            # By module: the rows of its sites, by suffix, record by record.
            rows: list[list[Mapping[str, Mapping[str, Array]]]] = [[] for _ in self._sites]
            for record in batch:
                calls = record.series if isinstance(record, CallBatch) else (record,)
                for call in calls:
                    rows[call.module].append(
                        {suffix: site.rows for suffix, site in call.sites.items()}
                    )
                if isinstance(record, CallBatch):
                    self._count_batch(record)
                else:
                    self._count_call(record)
            for sites, blocks in zip(self._sites, rows, strict=True):
                for number, suffix in sites if blocks else ():
                    for quantity, accumulator in self._accumulator.accumulators[number].items():
                        for block in _join_small([rows[suffix][quantity] for rows in blocks]):
                            accumulator.add(block)

    def _count_call(self, record: CallRecord) -> None:
        call, sites = self._accumulator.calls, self._sites[record.module]
        sequences = len(record.sites[sites[0][1]].initial) - _count_segments(record.origins)
        for number, suffix in sites:
            self._accumulator.check(number, record.sites[suffix].residual, call)
        self._accumulator.count_calls(record.module, 1, sequences, int(record.steps.sum()))
        self._accumulator.annotations += len(record.annotations)
        self._counted += 1

    def _count_batch(self, batch: CallBatch) -> None:
        first = self._accumulator.calls
        for index, series in enumerate(batch.series):
            sites, calls = self._sites[series.module], first + np.flatnonzero(batch.order == index)
            segments = sum(map(_count_segments, series.origins.values()))
            sequences = len(series.sites[sites[0][1]].initial) - segments
            for number, suffix in sites:
                self._accumulator.check_calls(number, series.sites[suffix].residuals, calls)
            self._accumulator.count_calls(
                series.module, len(series), sequences, series.sequences.size
            )
        self._counted += len(batch)


def _count_segments(origins: Sequence[Origin]) -> int:
    """Count continued segments, which do not begin a sequence."""
    return sum(origin.mark == "continued" for origin in origins)


def _join_small(blocks: Sequence[Array]) -> Iterator[Array]:
    """Yield the same rows in blocks that are large enough to be counted at once."""
    small: list[Array] = []
    size = 0
    for block in blocks:
        small.append(block)
        size += block.nbytes
        if size >= LARGE_BYTES:
            yield small[0] if len(small) == 1 else np.concatenate(small)
            small, size = [], 0
    if small:
        yield small[0] if len(small) == 1 else np.concatenate(small)
