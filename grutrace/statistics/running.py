"""`grutrace.Statistics`: running statistics that can be read, merged, saved and loaded."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from grutrace.distributed import Shard, detect_shard, shard_path
from grutrace.errors import (
    NotRecordedError,
    OptionError,
    StateError,
    as_path,
    join_names,
    reject_unknown_options,
    require_one_of,
    short_repr,
    suggest_name,
)
from grutrace.records import TraceHeader
from grutrace.reprs import wrap_text
from grutrace.statistics.accumulator import Accumulator, SiteLayout, site_layouts
from grutrace.statistics.file import StatisticsFile, load
from grutrace.statistics.histogram import BINS, require_bins
from grutrace.statistics.results import SiteStatistics
from grutrace.statistics.sink import CountingConsumer, SinkFile, StatisticsSink
from grutrace.storage.format.shard_stamp import read_shard
from grutrace.storage.read.lazy_rows import blocks
from grutrace.storage.read.trace import Trace
from grutrace.storage.write.writer_thread import WriterThread

if TYPE_CHECKING:
    from typing_extensions import Self

#: Default interval between two saves, in seconds.
SAVE_SECONDS = 10.0


class Statistics:
    """Running statistics of a model's GRUs, for each unit and quantity, in constant memory.

    As the sink of a tracer, it counts what the tracer records and keeps no rows. It can be read
    while it counts. Several tracers may count into one instance, at once or in turn, if they record
    the same sites of models of the same sizes.

    Args:
        path: A file that is kept up to date: every `save_seconds` while counting, and whenever the
            tracer is flushed or closed or the statistics are read. It is replaced atomically, so a
            killed run leaves the last state. Each of several processes has its own file, as for
            `Tracer`: ``stats.rank0003.h5``.
        mode: For an existing file: ``w`` refuses, ``overwrite`` replaces it if grutrace wrote it,
            ``a`` continues from its counts. A file with another writer is refused.
        bins: Number of bins of each histogram, a power of two from 2 to 1024.
        save_seconds: Interval between two saves while counting, in seconds.
        fsync: Whether to fsync each new file before it replaces the previous one, so that a loss of
            power leaves one of the two.

    Raises:
        OptionError: An option has an invalid value.
        TraceFileError: The file exists, cannot be continued, or cannot be written.

    Examples:
        >>> import torch, grutrace
        >>> layer, statistics = torch.nn.GRU(2, 3), grutrace.Statistics()
        >>> with grutrace.trace(layer, sink=statistics):
        ...     _ = layer(torch.randn(5, 4, 2))
        >>> statistics.sites, statistics.calls, statistics.steps
        (('l0',), 1, 20)
        >>> statistics["l0"].update.mean.shape, statistics["l0"].update.histogram.shape
        ((3,), (3, 32))
    """

    @reject_unknown_options
    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        mode: Literal["w", "overwrite", "a"] = "w",
        bins: int = BINS,
        save_seconds: float = SAVE_SECONDS,
        fsync: bool = False,
    ) -> None:
        if not save_seconds > 0:
            raise OptionError(
                f"save_seconds: expected more than 0, found {short_repr(save_seconds)}"
            )
        self._bins, self._seconds = require_bins(bins), save_seconds
        self._requested_file = None if path is None else (path, mode)
        self._fsync, self._shard = fsync, detect_shard()
        self._attached = False
        self._open()

    def _open(self) -> None:
        """Claim the file, if there is one, and load its counts."""
        self._file: StatisticsFile | None = None
        if self._requested_file is not None:
            path, mode = self._requested_file
            self._file = StatisticsFile(
                shard_path(as_path(path), self._shard), mode, fsync=self._fsync
            )
        self._start_counting(self._file.load_existing() if self._file else None)
        if self._file and self._accumulator and self._accumulator.bins != self._bins:
            raise OptionError(
                f"bins: expected {self._accumulator.bins}, as in {self._file.path}; "
                f"found {self._bins}"
            )

    def _start_counting(self, accumulator: Accumulator | None) -> None:
        self._accumulator = accumulator
        self._lock = threading.Lock()
        self._threads: list[WriterThread] = []
        self._process = os.getpid()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load statistics from a file. The file is not written to afterwards.

        Args:
            path: Path of the file.

        Raises:
            TraceFileError: It is missing, not a statistics file, of a newer format, or damaged.

        Examples:
            >>> import torch, grutrace
            >>> layer, path = torch.nn.GRU(2, 3), "statistics.h5"
            >>> with grutrace.trace(layer, sink=grutrace.Statistics(path)):
            ...     _ = layer(torch.randn(5, 4, 2))
            >>> grutrace.Statistics.load(path).steps
            20
        """
        return cls._from_accumulator(load(path))

    @classmethod
    def of(cls, trace: Trace, *, bins: int = BINS) -> Self:
        """Compute the same statistics from the rows of a trace, read in blocks.

        Args:
            trace: A trace, in memory or in a file; deferred gates are recomputed.
            bins: As for `Statistics`.

        Raises:
            TraceFileError: The file is damaged.

        Examples:
            >>> import torch, grutrace
            >>> layer = torch.nn.GRU(2, 3)
            >>> with grutrace.trace(layer) as trace:
            ...     _ = layer(torch.randn(5, 4, 2))
            >>> grutrace.Statistics.of(trace)["l0"].hidden.count
            array([20, 20, 20])
        """
        header = trace.header
        accumulator = Accumulator(
            header.model, header.created, site_layouts(header), require_bins(bins)
        )
        accumulator.annotations = len(trace.snapshot.tables.annotations)
        for number, site in enumerate(accumulator.layout):
            site_trace = trace[site.name]
            extent = site_trace.extent
            accumulator.modules[site.module] = (
                extent.calls, extent.sequences, extent.rows, extent.versions
            )  # fmt: skip
            calls = trace.snapshot.index(site.module).call_numbers
            for call, residual in zip(calls, site_trace.checks["residual"], strict=True):
                accumulator.check(number, float(residual), int(call))
            for quantity, counts in accumulator.accumulators[number].items():
                for block in blocks(site_trace.rows(quantity)):
                    counts.add(block)
        return cls._from_accumulator(accumulator)

    @classmethod
    def _from_accumulator(cls, accumulator: Accumulator) -> Self:
        statistics = cls(bins=accumulator.bins)
        statistics._accumulator = accumulator
        return statistics

    def attach(self, header: TraceHeader) -> StatisticsSink:
        """Return a sink that counts into these statistics. Called by the tracer.

        Raises:
            OptionError: The trace has other sites or sizes than were counted before, or its gates
                are not computed with the calls.
            TraceFileError: The file cannot be written.
        """
        accumulator = self._prepare(header)
        target = None
        if self._file is not None:
            target = SinkFile(self._file, partial(self._save, self._file, accumulator))
        sink = StatisticsSink(header, accumulator, self._lock, target, self._seconds)
        self.follow(sink.thread)
        return sink

    def counter(self, header: TraceHeader) -> CountingConsumer:
        """Return what counts the records of a trace file as they are written. For the tracer.

        Raises:
            OptionError: As for `attach`, or these statistics have a file of their own.
        """
        if self._requested_file is not None:
            raise OptionError(
                "sink: with a path expected a grutrace.Statistics without a file of its own, found "
                f"one in {short_repr(os.fspath(self._requested_file[0]))}. To keep the figures, "
                "use statistics.save(...)"
            )
        return CountingConsumer(header, self._prepare(header), self._lock)

    def follow(self, thread: WriterThread) -> None:
        """Note a thread that counts into these statistics, so that reading flushes it."""
        self._threads = [thread for thread in self._threads if not thread.ended]
        self._threads.append(thread)

    def _prepare(self, header: TraceHeader) -> Accumulator:
        """Return the accumulator for a trace of this header."""
        if header.options.get("gates", "inline") != "inline":
            raise OptionError(
                "gates and sink: expected gates='inline' with a statistics sink, found "
                f"{header.options.get('gates')!r}, where a call brings no gates to count"
            )
        self._require_own_process()
        self._claim_file(read_shard(header))
        with self._lock:
            if self._accumulator is None:
                self._accumulator = Accumulator(
                    header.model, header.created, site_layouts(header), self._bins
                )
            self._accumulator.require_same(site_layouts(header))
            return self._accumulator

    def _claim_file(self, shard: Shard | None) -> None:
        """Open the file of the tracer's shard, which may be known only now."""
        if not self._attached and self._requested_file and shard != self._shard:
            self._shard = shard
            self._open()
        self._attached = True

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the counted sites, in the model's order."""
        return tuple(site.name for site in self._layout)

    def __getitem__(self, name: str) -> SiteStatistics:
        """Return the current statistics of a site.

        Raises:
            NotRecordedError: The site was not counted; the message lists those that were.
            SinkError: Something could not be counted or saved.
        """
        if name not in self.sites:
            near = suggest_name(name, self.sites) if isinstance(name, str) else ""
            names = join_names(map(repr, self.sites))
            raise NotRecordedError(
                f"site {short_repr(name)} was not counted{near}; counted sites: {names}"
            )
        with self._reading() as accumulator:
            return accumulator.site(self.sites.index(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __contains__(self, name: object) -> bool:
        return name in self.sites

    def __repr__(self) -> str:
        where = f" in {self._file.path}" if self._file else ""
        calls = self._accumulator.calls if self._accumulator else 0
        return wrap_text(f"<statistics{where}: {len(self.sites)} sites, {calls} calls counted>")

    @property
    def calls(self) -> int:
        """Number of calls of all modules."""
        return self._total("calls")

    @property
    def sequences(self) -> int:
        """Number of sequences of all modules."""
        return self._total("sequences")

    @property
    def steps(self) -> int:
        """Number of steps of all sequences of all modules."""
        return self._total("steps")

    @property
    def annotations(self) -> int:
        """Number of annotations: tokens or a label of one sequence. Values are not kept."""
        with self._reading() as accumulator:
            return accumulator.annotations

    @property
    def residual(self) -> float:
        """Largest residual of all sites; NaN if there is none.

        `residual` and `residual_call` of each site say where it is.
        """
        if self._accumulator is None:
            return float("nan")
        with self._reading() as accumulator:
            checked = accumulator.checked
            return float(checked["residual"].max()) if (checked["call"] >= 0).any() else np.nan

    @property
    def nbytes(self) -> int:
        """Size of the counts in bytes; independent of the length of the run."""
        return self._accumulator.nbytes if self._accumulator else 0

    def pop(self) -> Statistics:
        """Return the figures so far, and count from 0 again: the figures of an interval.

        Tracers that count into these statistics continue. A file of the statistics has the figures
        since the last `pop`.

        Returns:
            New statistics, in memory.

        Raises:
            SinkError: Something could not be counted or saved.

        Examples:
            >>> import torch, grutrace
            >>> layer, statistics = torch.nn.GRU(2, 3), grutrace.Statistics()
            >>> with grutrace.trace(layer, sink=statistics):
            ...     _ = layer(torch.randn(5, 4, 2))
            ...     first = statistics.pop()
            ...     _ = layer(torch.randn(6, 4, 2))
            ...     second = statistics.pop()
            >>> first.steps, second.steps, statistics.steps
            (20, 24, 0)
        """
        if self._accumulator is None:
            return Statistics(bins=self._bins)
        with self._reading() as accumulator:
            popped = copy.deepcopy(accumulator)
            accumulator.clear()
        return self._from_accumulator(popped)

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of two runs together, of which this one is the first.

        Args:
            other: Statistics of the same sites.

        Returns:
            New statistics, in memory; neither of the two is changed.

        Raises:
            OptionError: The other has other sites, sizes or bins; the message says where.

        Examples:
            >>> import torch, grutrace
            >>> layer = torch.nn.GRU(2, 3)
            >>> first, second = grutrace.Statistics(), grutrace.Statistics()
            >>> for statistics in (first, second):
            ...     with grutrace.trace(layer, sink=statistics):
            ...         _ = layer(torch.randn(5, 4, 2))
            >>> first.merge(second).steps
            40
        """
        if not isinstance(other, Statistics):
            raise OptionError(f"merge: expected a grutrace.Statistics, found {short_repr(other)}")
        ours, theirs = self._snapshot(), other._snapshot()
        if ours is None or theirs is None:
            if self._bins != other._bins:
                raise OptionError(
                    f"statistics do not match: bins: expected {self._bins}, found {other._bins}"
                )
            merged = ours or theirs
            return Statistics(bins=self._bins) if merged is None else self._from_accumulator(merged)
        ours.merge(theirs)
        return self._from_accumulator(ours)

    def save(self, path: str | os.PathLike[str], *, mode: Literal["w", "overwrite"] = "w") -> None:
        """Write the current counts to a file of their own.

        Args:
            path: Path of the file.
            mode: For an existing file: ``w`` refuses, ``overwrite`` replaces it.

        Raises:
            OptionError: There is no such mode.
            StateError: Nothing was counted yet.
            TraceFileError: The file exists, or cannot be written.

        Examples:
            >>> import torch, grutrace
            >>> layer, statistics = torch.nn.GRU(2, 3), grutrace.Statistics()
            >>> with grutrace.trace(layer, sink=statistics):
            ...     _ = layer(torch.randn(5, 4, 2))
            >>> statistics.save("saved.h5")
            >>> grutrace.Statistics.load("saved.h5").calls
            1
        """
        require_one_of("mode", mode, ("w", "overwrite"))
        snapshot = self._snapshot()
        if snapshot is None:
            raise StateError("nothing to save: no tracer has these statistics as its sink")
        file = StatisticsFile(as_path(path), mode)
        file.acquire()
        try:
            file.save(snapshot)
        finally:
            file.release()

    @property
    def _layout(self) -> tuple[SiteLayout, ...]:
        return self._accumulator.layout if self._accumulator else ()

    def _total(self, name: str) -> int:
        if self._accumulator is None:
            return 0
        with self._reading() as accumulator:
            return int(accumulator.modules[name].sum())

    @contextmanager
    def _reading(self) -> Iterator[Accumulator]:
        """Lock the counts and flush all tracers, so that everything recorded so far is included."""
        if self._accumulator is None:
            raise NotRecordedError(
                "nothing counted yet: no tracer has used these statistics as its sink"
            )
        self._require_own_process()
        for thread in self._threads:
            # The counts before an error can still be read.
            if not thread.ended:
                thread.flush()
        with self._lock:
            yield self._accumulator

    def _snapshot(self) -> Accumulator | None:
        if self._accumulator is None:
            return None
        with self._reading() as accumulator:
            return copy.deepcopy(accumulator)

    def _save(self, file: StatisticsFile, accumulator: Accumulator) -> None:
        """Write the current counts to the file."""
        with self._lock:
            snapshot = copy.deepcopy(accumulator)
        file.save(snapshot)

    def _require_own_process(self) -> None:
        # The lock may be held by a thread that does not exist in the child.
        if os.getpid() != self._process and not all(thread.ended for thread in self._threads):
            raise StateError(
                f"these statistics are counted in process {self._process}; a forked child, here "
                f"{os.getpid()}, can neither read nor extend them: create others there, and merge"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return the counts so far. A copy has no file and no tracers."""
        return {"bins": self._bins, "seconds": self._seconds, "accumulator": self._snapshot()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bins, self._seconds, self._file = state["bins"], state["seconds"], None
        self._requested_file, self._shard, self._attached = None, None, True
        self._start_counting(state["accumulator"])
