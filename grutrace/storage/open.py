"""The entry points of storage: create the sink of a recording, and open a trace for reading."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from grutrace.errors import OptionError, StateError, short_repr
from grutrace.options import Mode
from grutrace.records import AnnotationRecord, Sink, TraceHeader
from grutrace.storage.format.tables import Tables
from grutrace.storage.interfaces import Source
from grutrace.storage.memory import MemorySink
from grutrace.storage.read.file_source import FileSource
from grutrace.storage.read.trace import Trace
from grutrace.storage.shards.open_files import open_files
from grutrace.storage.write.file_sink import FileSink, RecordTransform
from grutrace.storage.write.writer_thread import Consumer, WriterThread


@runtime_checkable
class SinkFactory(Protocol):
    """An object of the user that creates the sink of a recording: a `grutrace.Statistics`."""

    def attach(self, header: TraceHeader) -> Sink:
        """Return a sink for a trace of this header. The sink is a `Source` too."""

    def counter(self, header: TraceHeader) -> Consumer:
        """Return what counts the records of a trace of this header beside its file."""

    def follow(self, thread: WriterThread) -> None:
        """Note the thread that passes records to the counter."""


def open_sink(
    path: str | os.PathLike[str] | None,
    header: TraceHeader,
    mode: Mode = "w",
    factory: SinkFactory | None = None,
    transform: RecordTransform | None = None,
    *,
    fsync: bool = False,
) -> Sink:
    """Create the sink of a recording: in memory, in a file, or by the factory of the user.

    Args:
        path: Path of the file; None for memory or a factory.
        header: Header of the trace.
        mode: "w" raises an error if the file exists, "overwrite" replaces it, "a" appends to it.
        factory: Creates the sink; with a path, counts what is written to the file.
        transform: Completes records outside the forward pass: on the writer thread of a
            file, or when a trace in memory is read.
        fsync: Whether every commit is written to the disk with fsync.

    Raises:
        OptionError: The mode is unknown; or the factory is invalid, does not support such a trace,
            or has a file of its own and is given together with a path.
        TraceFileError: The file cannot be created or appended to.
    """
    if factory is None:
        if path is None:
            return MemorySink(header, transform)
        return FileSink(path, header, mode, transform=transform, fsync=fsync)
    if isinstance(factory, type) or not isinstance(factory, SinkFactory):
        hint = f": make one, as in sink={factory.__name__}()" if isinstance(factory, type) else ""
        raise OptionError(
            f"sink: expected a grutrace.Statistics, found {short_repr(factory)}{hint}"
        )
    if path is None:
        return factory.attach(header)
    counter = factory.counter(header)
    sink = FileSink(path, header, mode, transform=transform, fsync=fsync, counter=counter)
    factory.follow(sink.thread)
    return sink


def open_source(sink: Sink) -> Source:
    """Return the source that reads a sink of `open_sink`, during recording and afterwards."""
    if isinstance(sink, FileSink):
        return _LiveSource(sink)
    if isinstance(sink, Source):
        return sink
    raise TypeError(f"expected a sink that open_sink made, found {type(sink).__name__}")


def recorded_calls(source: Source) -> int:
    """Return the number of recorded calls, also of a source that stores none but counts them."""
    counted: int | None = getattr(source, "counted_calls", None)
    return len(source.refresh().calls) if counted is None else counted


def open_trace(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Trace:
    """Open a trace file: a complete file, a file that is being written, or one after a crash.

    The first part of a `grutrace run` opens all parts of the run as one trace. A glob such as
    ``run.rank*.h5``, or several paths, open the shards of several processes as one trace.

    A URL (``https://``, ``s3://`` and whatever fsspec knows) opens one complete file on a server.
    Only the parts that are needed are fetched, in blocks of 64 KiB. This needs the extra `cloud`.

    Use the trace as a context manager, or close it.

    Args:
        path: Path or URL of a file; or a glob, or paths, of shards.
        storage_options: Arguments for the file system of fsspec, such as credentials; only with a
            URL.

    Raises:
        OptionError: There is no path, or `storage_options` without a URL.
        MissingExtraError: A URL needs a library that is not installed.
        TraceFileError: A file does not exist, is not a trace, has a newer format, or is damaged;
            or the shards belong to different runs or models. A file on a server has a writer, or
            needs other files.

    Warns:
        GrutraceWarning: The file of a rank is missing.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru = torch.nn.GRU(2, 3)
        >>> with grutrace.trace(gru, "run.h5") as tracer:
        ...     output, state = gru(torch.randn(5, 4, 2))
        >>> with grutrace.open("run.h5") as trace:
        ...     print(trace)
        <trace of torch.nn.modules.rnn.GRU in run.h5: 1 site, 1 call, 4 sequences
            l0: 4 sequences, 20 steps of reset, update, candidate, hidden>
    """
    source = open_files(path, storage_options)
    try:
        return Trace(source)
    except BaseException:
        source.close()
        raise


class _LiveSource(FileSource):
    """The file of a sink of this process. Reading flushes the sink first."""

    live = True

    def __init__(self, sink: FileSink) -> None:
        super().__init__(sink.path)
        self._sink = sink
        self._latest: Tables | None = None
        self._appended = 0

    def annotate(self, annotations: Sequence[AnnotationRecord]) -> None:
        """Add annotations to the file once the sink is closed."""
        if not self._sink.ended:
            raise StateError(
                f"{self.name} is being recorded: annotate within a recording block "
                "(`Recording.annotate`), or close the tracer first"
            )
        super().annotate(annotations)
        self._latest = None

    def refresh(self) -> Tables:
        appended, ended = self._sink.appended, self._sink.ended
        if self._latest is None or appended != self._appended:
            if not ended:
                self._sink.flush()
            # After a failed write, the committed rows are still readable.
            self._latest = super().refresh()
            self._appended = appended
        return self._latest
