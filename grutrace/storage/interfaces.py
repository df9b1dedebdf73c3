"""The protocols of reading: sources of traces, in memory and in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from grutrace.records import AnnotationRecord, Array, TraceHeader
from grutrace.storage.format.tables import Tables


class Rows(Protocol):
    """A two-dimensional array, in memory or in a file. `numpy.asarray` reads all of it."""

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
        """Return what NumPy returns for one or two integers, slices, integer arrays or masks."""


class SnapshotReader(Protocol):
    """Reads rows, states, checks and weights. `module` is an index, `suffix` names the site."""

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Rows:
        """Return the first `count` rows, (count, H or I)."""

    def initial(self, module: int, suffix: str, count: int) -> Rows:
        """Return the initial states of the first `count` sequences, (count, H)."""

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Return the checks of the module's first `count` calls, (count,), type `schema.CHECK`."""

    def backward(self, module: int, suffix: str, count: int) -> Array:
        """Return facts about the backward passes of these calls, (count,), `schema.BACKWARD`."""

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """Return one version of the weights: (3H, I), (3H, H) and two biases (3H,), if any."""


@runtime_checkable
class Source(Protocol):
    """The storage of a trace. Readers get the tables and read only the rows that they count.

    `as_of` returns the reader. The reader of files is pickled as their paths; the unpickled source
    opens them again, in the same process or another. Pickling the reader of a trace in memory, or
    of shards that may still grow, raises a `TypeError`.
    """

    name: str
    header: TraceHeader

    #: Whether this process records the trace. A trace of a live source is always up to date.
    live: bool

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the trace; empty in memory."""

    def refresh(self) -> Tables:
        """Return the present tables, always of a consistent prefix of the trace.

        Without new records, it returns the same object again.
        """

    def as_of(self, tables: Tables) -> SnapshotReader:
        """Return the reader of the rows that earlier tables of `refresh` count.

        It is the source itself if rows are only appended. Concatenated shards insert rows and need
        a reader of their own.
        """

    def close(self) -> None:
        """Close all files. Closing twice has no effect."""


@runtime_checkable
class AnnotatableSource(Source, Protocol):
    """A source whose sequences can get tokens and labels after they were recorded."""

    def annotate(self, annotations: Sequence[AnnotationRecord]) -> None:
        """Add annotations. Their sequences are numbered as in the tables of the source."""


class AppendOnlySource(Source, SnapshotReader, Protocol):
    """A source that only appends rows, so it is its own reader at any time."""


@runtime_checkable
class InMemoryReader(SnapshotReader, Protocol):
    """A reader that can return the whole trace at once."""

    def all_items(self, tables: Tables) -> dict[str, Array]:
        """Return the items of each dataset that these tables count, read-only, by path."""


@runtime_checkable
class InMemorySource(Source, Protocol):
    """A source in the memory of this process."""

    @property
    def nbytes(self) -> int:
        """Approximate size, in bytes."""

    def as_of(self, tables: Tables) -> InMemoryReader:
        """Return the reader of the rows that these tables count."""

    def clear(self) -> None:
        """Delete all records. Arrays that were read before keep their content."""
