"""The reading contract: what a trace can be read from, in memory or in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from grutrace.records import Array, TraceHeader
from grutrace.storage.format.tables import Tables


class Rows(Protocol):
    """A two-dimensional array that may still lie in a file. `numpy.asarray` reads all of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, width)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""

    @property
    def ndim(self) -> int:
        """Always 2."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Any:
        """What NumPy gives for an integer, slice, integer array or mask, or two of them."""


class SnapshotReader(Protocol):
    """Rows, states, checks and weights, of modules by their place and sites by their suffix."""

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Rows:
        """The first `count` rows, (count, H or I)."""

    def initial(self, module: int, suffix: str, count: int) -> Rows:
        """The states that the first `count` sequences began from, (count, H)."""

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Of the module's first `count` calls, (count,) of type `schema.CHECK`."""

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """One version of a site's weights: (3H, I), (3H, H) and, if it has biases, twice (3H,)."""


@runtime_checkable
class Source(Protocol):
    """Where a trace is read from. A reader asks for the tables, and for no more than they count.

    Modules are named by their place in the header.

    What reads its files (see `as_of`) can be pickled: that takes little, and gives a source that
    opens the same files anew, in the same process or another. Of one in memory, or of shards that
    may still grow, that raises a `TypeError`.
    """

    name: str
    header: TraceHeader

    #: Whether this process is the one that records, and a trace shows at any time all there is.
    live: bool

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from; nothing where it is in memory."""

    def refresh(self) -> Tables:
        """The tables of everything there is by now, always a consistent prefix of the trace.

        If nothing came since the last time, they are the same object.
        """

    def as_of(self, tables: Tables) -> SnapshotReader:
        """What reads just the rows that these tables count, which `refresh` gave earlier.

        Mostly the source itself, since a trace grows at its end. One of several shards does not.
        """

    def close(self) -> None:
        """Let go of everything. Closing twice does nothing."""


class AppendOnlySource(Source, SnapshotReader, Protocol):
    """A source whose rows stay where they are, so that it reads them at any time."""


class InMemoryReader(SnapshotReader, Protocol):
    """What reads a trace and can give all of it at once."""

    def all_items(self, tables: Tables) -> dict[str, Array]:
        """By its place in the file, what these tables count of each dataset, read-only."""


@runtime_checkable
class InMemorySource(Source, Protocol):
    """A source whose rows are in the memory of this process."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about."""

    def as_of(self, tables: Tables) -> InMemoryReader:
        """What reads just the rows that these tables count."""

    def clear(self) -> None:
        """Drop everything. What was read before keeps its rows for as long as it is held."""
