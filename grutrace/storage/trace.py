"""The reading interface: a trace, in memory or in a file, finished or growing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grutrace.errors import NotRecordedError
from grutrace.record import Array, Header, Module, Site
from grutrace.storage.moment import Moment
from grutrace.storage.site import SiteTrace
from grutrace.storage.source import Source
from grutrace.storage.tables import Tables

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
        self._take(source.refresh())

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the recorded sites, in the model's order."""
        return tuple(self._places)

    def __getitem__(self, name: str) -> SiteTrace:
        """The site of this name.

        Raises:
            NotRecordedError: It was not recorded; the message says which were.
        """
        return SiteTrace(self._look, *self._place(name))

    def _place(self, name: str) -> tuple[int, Site]:
        if name not in self._places:
            found = ", ".join(repr(site) for site in self.sites) or "none"
            raise NotRecordedError(f"site {name!r} was not recorded; recorded sites: {found}")
        return self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __repr__(self) -> str:
        counts = f"{len(self.sites)} sites"
        # A sink that keeps no calls says so.
        with contextlib.suppress(NotRecordedError):
            tables = self._look().tables
            sequences = sum(extent.sequences for extent in tables.extents)
            counts += f", {len(tables.calls)} calls, {sequences} sequences"
        return f"<trace of {self.header.model} in {self._source.name}: {counts}>"

    @property
    def calls(self) -> Array:
        """One row a recorded call, in the order of recording.

        Fields: module (its path), tag (or None), weights (their version), training, batch, steps
        (of all its sequences together), time (seconds since the epoch), residual (the largest of
        the module's sites; not a number where gates are derived when read), rank (of the process
        that made it; 0 where there was but one). Calls of several ranks are in the order of the
        ranks.
        """
        return self._look().calls

    @property
    def sequences(self) -> Array:
        """One row a sequence of each module, module by module.

        Fields: module (its path), sequence (its number there), call (its first, a row of `calls`),
        place (in that call's batch), steps, pieces (calls that it went through), parent and
        parent_steps (-1 where it did not begin inside another), tag (of its first call, or None),
        rank (of the process that recorded it; 0 where there was but one).
        """
        return self._look().sequences

    @property
    def header(self) -> Header:
        """What was known when the trace began."""
        return self._moment.header

    @property
    def modules(self) -> tuple[Module, ...]:
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
    def moment(self) -> Moment:
        """What there is now, which does not change: for code that goes through a whole trace."""
        return self._look()

    @property
    def closed(self) -> bool:
        """Whether its writer closed the file in order; if not, it is at work or has died."""
        return self._look().stored.closed

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
        from grutrace.arrays.chunked import to_dask

        return to_dask(self._look(), *self._place(site), quantity)

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
        from grutrace.arrays.labelled import to_xarray

        return to_xarray(self._look(), *self._place(site), padded=padded)

    def refresh(self) -> None:
        """Take in what was recorded since. Sites that were asked for before go along.

        Raises:
            TraceFileError: The file is damaged.
        """
        tables = self._source.refresh()
        if tables is not self._moment.stored:
            self._take(tables)

    def _take(self, tables: Tables) -> None:
        # The sites too: a run may have come upon more modules since.
        self._moment = Moment(self._source, tables)
        self._places = {
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

    def _look(self) -> Moment:
        if self._source.live:
            self.refresh()
        return self._moment
