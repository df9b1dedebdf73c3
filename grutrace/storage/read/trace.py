"""The reading interface: a trace, in memory or in a file, finished or growing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from grutrace.errors import NotRecordedError, StateError, join_names, short_repr, suggest_name
from grutrace.records import Array, ModuleInfo, Site, TraceHeader
from grutrace.reprs import wrapped
from grutrace.storage.format.tables import Tables
from grutrace.storage.interfaces import InMemorySource, Source
from grutrace.storage.memory import MemoryCopy
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.snapshot import TraceSnapshot
from grutrace.storage.save import save_trace

if TYPE_CHECKING:
    import dask.array
    import xarray


class Trace:
    """What was recorded in one run: sites by name, calls and sequences as tables.

    It shows what there was when it was opened or last refreshed; or, in the process that records
    it, what there is.

    Args:
        source: Where it is read from.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._memory = source if isinstance(source, InMemorySource) else None
        self._load(source.refresh())

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the recorded sites, in the model's order."""
        return tuple(self._sites_by_name)

    def __getitem__(self, name: str) -> SiteTrace:
        """The site of this name.

        Raises:
            NotRecordedError: It was not recorded; the message says which were.
        """
        return SiteTrace(self._refresh_snapshot, *self._find_site(name))

    def _find_site(self, name: str) -> tuple[int, Site]:
        if name not in self._sites_by_name:
            suggestion = suggest_name(name, self.sites) if isinstance(name, str) else ""
            found = join_names(repr(site) for site in self.sites)
            raise NotRecordedError(
                f"site {short_repr(name)} was not recorded{suggestion}; recorded sites: {found}"
            )
        return self._sites_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __contains__(self, name: object) -> bool:
        return name in self._sites_by_name

    def __repr__(self) -> str:
        counts = f"{len(self.sites)} sites"
        # A sink that keeps no calls says so.
        with contextlib.suppress(NotRecordedError):
            tables = self._refresh_snapshot().tables
            sequences = sum(extent.sequences for extent in tables.extents)
            counts += f", {len(tables.calls)} calls, {sequences} sequences"
        return wrapped(f"<trace of {self.header.model} in {self._source.name}: {counts}>")

    @property
    def calls(self) -> Array:
        """One row a recorded call, in the order of recording.

        Fields: module (its path), tag (or None), weights (their version), training, batch, steps
        (of all its sequences together), time (seconds since the epoch), residual (the largest of
        the module's sites; NaN where gates are derived when read), proof ("proven"; "unchecked"
        where gates are derived when read, and the weights were not compared when the call ran;
        "unproven" where no known weights lead to its states), rank (of the process that made it; 0
        where there was but one). Calls of several ranks are in the order of the
        ranks.
        """
        # A copy: the trace keeps its own.
        return self._refresh_snapshot().calls.copy()

    @property
    def sequences(self) -> Array:
        """One row a sequence of each module, module by module.

        Fields: module (its path), sequence (its number there), call (its first, a row of `calls`),
        place (in that call's batch), steps, pieces (calls that it went through), parent and
        parent_steps (-1 where it did not begin inside another), tag (of its first call, or None),
        rank (of the process that recorded it; 0 where there was but one).
        """
        return self._refresh_snapshot().sequences.copy()

    @property
    def header(self) -> TraceHeader:
        """What was known when the trace began."""
        return self._snapshot.header

    @property
    def modules(self) -> tuple[ModuleInfo, ...]:
        """The traced modules."""
        return self.header.modules

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the trace."""
        return self.header.options

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from: a file, the parts of a run, shards; nothing for one in memory."""
        return self._source.files

    @property
    def snapshot(self) -> TraceSnapshot:
        """What there is now, which does not change: for code that goes through a whole trace."""
        return self._refresh_snapshot()

    @property
    def closed(self) -> bool:
        """Whether its writer closed the file in order; if not, it is at work or has died."""
        return self._refresh_snapshot().stored.closed

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory, about; 0 where its rows are in a file."""
        return 0 if self._memory is None else self._memory.nbytes

    def save(self, path: str | os.PathLike[str], *, mode: Literal["w", "overwrite"] = "w") -> None:
        """Write a trace in memory to a file: what a tracer with this path would have written.

        The file has the same rows bit for bit, and the same calls, sequences, weights, tokens,
        labels and options. It takes its place once it is whole. Calls that are recorded meanwhile
        are left out.

        Args:
            path: Of the file. It is taken as it is, also where several processes trace.
            mode: For a file that exists: ``w`` refuses, ``overwrite`` replaces it.

        Raises:
            OptionError: The path is none, or there is no such mode.
            StateError: The trace is in a file already, or has no rows.
            TraceFileError: The file exists, or cannot be written. Nothing is left behind.
        """
        snapshot, memory = self._refresh_snapshot(), self._require_memory("saved")
        items = memory.as_of(snapshot.tables).all_items(snapshot.tables)
        save_trace(path, self.header, items, mode)

    def clear(self) -> None:
        """Empty a trace in memory. What was read before stays as it is.

        Sites that were asked for go along, and have no rows any more; arrays, sequences and tables
        that were handed out keep what they show.

        Raises:
            StateError: The trace is in a file, or has no rows.
        """
        self._require_memory("cleared").clear()
        self.refresh()

    def _require_memory(self, done: str) -> InMemorySource:
        if self._memory is None:
            where = ", ".join(map(str, self.files[:1])) or self._source.name
            raise StateError(
                f"only a trace in memory can be {done}; this one is in {where}"
                + (": copy that file" if self.files and done == "saved" else "")
            )
        return self._memory

    def __reduce__(self) -> tuple[object, ...]:
        """A trace that is read from a file is pickled as its path, one in memory with its rows.

        What is unpickled only reads: it records nothing, and does not go along with this one.
        """
        snapshot = self._refresh_snapshot()
        if self._memory is None:
            return Trace, (self._source,)
        items = self._memory.as_of(snapshot.tables).all_items(snapshot.tables)
        return Trace, (MemoryCopy(self.header, items),)

    def to_dask(self, site: str, quantity: str) -> dask.array.Array:
        """The rows of a quantity as a dask array, (N, H), or (N, I) for the input.

        Nothing is read until it is computed, and then in chunks of about 16 MiB that are whole
        chunks of the file: on the threads of this process, in other processes, or on a cluster
        that can read the file, where only its path travels. It shows the rows that there are now,
        also once there are more, and after the trace is closed. Of a trace in memory the rows
        themselves travel.

        Args:
            site: Name of the site.
            quantity: Out of reset, update, candidate, hidden and input.

        Raises:
            NotRecordedError: The site or the quantity was not recorded.
            MissingExtraError: dask is not installed.
        """
        from grutrace.arrays.dask_arrays import to_dask

        return to_dask(self._refresh_snapshot(), *self._find_site(site), quantity)

    def to_xarray(self, site: str, *, padded: bool = False) -> xarray.Dataset:
        """A site as an xarray Dataset, which reads values only when they are needed.

        Its variables are all quantities that can be read, stored or derived, as of now. They are
        dask arrays where dask is installed, in chunks as for `to_dask`, and are otherwise read
        when somebody looks at their values.

        With the dimensions step and unit, or feature for the input: all steps of all sequences,
        one after another, with the coordinates sequence (its number), time (which step of it),
        call (a row of `calls`), tag, token and label_NAME, where there are any, and unit (its
        number). ``dataset["update"].groupby("sequence").mean()`` gives one row a sequence. (Not
        ``dataset.update``: that is a method of xarray.) Along the
        dimension instance, one item a sequence: initial, the state that it began from, and length.
        (These are the ragged arrays of the CF conventions, contiguous or indexed.)

        Padded, with the dimensions sequence, time and unit: one sequence a row, with nan after its
        end, and the coordinates length, call (its first), tag, token and label_NAME.

        Args:
            site: Name of the site.
            padded: Whether to give every sequence a row of its own.

        Raises:
            NotRecordedError: The site was not recorded.
            MissingExtraError: xarray is not installed.
        """
        from grutrace.arrays.xarray_dataset import to_xarray

        return to_xarray(self._refresh_snapshot(), *self._find_site(site), padded=padded)

    def refresh(self) -> None:
        """Take in what was recorded since. Sites that were asked for before go along.

        Raises:
            TraceFileError: The file is damaged.
        """
        tables = self._source.refresh()
        if tables is not self._snapshot.stored:
            self._load(tables)

    def _load(self, tables: Tables) -> None:
        # The sites too: a run may have come upon more modules since.
        self._snapshot = TraceSnapshot(self._source, tables)
        self._sites_by_name = {
            site.name: (number, site)
            for number, module in enumerate(self._source.header.modules)
            for site in module.sites
        }

    def close(self) -> None:
        """Let go of the file. Closing twice does nothing."""
        self._source.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _refresh_snapshot(self) -> TraceSnapshot:
        if self._source.live:
            self.refresh()
        return self._snapshot
