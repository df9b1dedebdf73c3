"""Where records go and where they are read from: the only door to memory and files for others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from grutrace.errors import OptionError, short_repr
from grutrace.options import Mode
from grutrace.records import Sink, TraceHeader
from grutrace.storage.format.tables import Tables
from grutrace.storage.interfaces import Source
from grutrace.storage.memory import MemorySink
from grutrace.storage.read.file_source import FileSource
from grutrace.storage.read.trace import Trace
from grutrace.storage.shards.open_files import open_files
from grutrace.storage.write.stream_sink import FileSink, RecordTransform


@runtime_checkable
class SinkFactory(Protocol):
    """Something of the user's that keeps what is recorded: a `grutrace.Statistics`."""

    def attach(self, header: TraceHeader) -> Sink:
        """A sink for a trace of this header, which is a `Source` as well."""


def open_sink(
    path: str | os.PathLike[str] | None,
    header: TraceHeader,
    mode: Mode = "w",
    factory: SinkFactory | None = None,
    prepare: RecordTransform | None = None,
    *,
    fsync: bool = False,
) -> Sink:
    """A sink in memory if there is no path, one that streams to a file, or the user's.

    Args:
        path: Of the file.
        header: Of the trace.
        mode: "w" refuses a path that exists, "overwrite" replaces it, "a" appends to it.
        maker: Makes the sink, where there is no path.
        prepare: Finishes records outside the model's forward: on the thread that writes a file, or
            when a trace in memory is read.
        fsync: Whether what counts in a file is on the disk, and not only in the system's memory.

    Raises:
        OptionError: The mode is none of these; or the maker is none, cannot keep such a trace, or
            comes together with a path.
        TraceFileError: The file cannot be created or appended to.
    """
    if factory is None:
        if path is None:
            return MemorySink(header, prepare)
        return FileSink(path, header, mode, prepare=prepare, fsync=fsync)
    if isinstance(factory, type) or not isinstance(factory, SinkFactory):
        hint = f": make one, as in sink={factory.__name__}()" if isinstance(factory, type) else ""
        raise OptionError(
            f"sink: expected a grutrace.Statistics, found {short_repr(factory)}{hint}"
        )
    if path is not None:
        raise OptionError(
            f"path and sink: expected one of the two, found {os.fspath(path)!r} and "
            f"{short_repr(factory)}. (Statistics has a path of its own)"
        )
    return factory.attach(header)


def open_source(sink: Sink) -> Source:
    """What a sink of `open_sink` can be read from, while it is appended to and afterwards."""
    if isinstance(sink, FileSink):
        return _LiveSource(sink)
    if isinstance(sink, Source):
        return sink
    raise TypeError(f"expected a sink that open_sink made, found {type(sink).__name__}")


def recorded_calls(source: Source) -> int:
    """How many calls a source shows by now, or has counted if it keeps none."""
    counted: int | None = getattr(source, "counted_calls", None)
    return len(source.refresh().calls) if counted is None else counted


def open_trace(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Trace:
    """Open a trace file: complete, being written, or left behind by a writer that died.

    The first part of a `grutrace run` is opened with all other parts, as one trace; and so are the
    shards of several processes, by a glob such as ``run.rank*.h5`` or by their paths.

    Use it as a context manager, or close it.

    Args:
        path: Of a file; or a glob or paths of shards.

    Raises:
        OptionError: There is no path.
        TraceFileError: A file is not there, is no trace, is of a newer format, or is damaged; or
            shards are of different runs or models.

    Warns:
        GrutraceWarning: There is no file of some rank.
    """
    source = open_files(path)
    try:
        return Trace(source)
    except BaseException:
        source.close()
        raise


class _LiveSource(FileSource):
    """The file of a sink of this process, where whatever was appended is there to be read."""

    live = True

    def __init__(self, sink: FileSink) -> None:
        super().__init__(sink.path)
        self._sink = sink
        self._latest: Tables | None = None
        self._appended = 0

    def refresh(self) -> Tables:
        appended, ended = self._sink.appended, self._sink.ended
        if self._latest is None or appended != self._appended:
            if not ended:
                self._sink.flush()
            # Where writing failed, what was committed can be read all the same.
            self._latest = super().refresh()
            self._appended = appended
        return self._latest
