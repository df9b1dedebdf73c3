"""Rows of a trace as dask arrays, whose chunks are whole chunks of the file.

The rows of a quantity, and its padded sequences, as arrays that are read when they are indexed.

N rows, S sequences, L steps of the longest of them, W units or features.
"""

from __future__ import annotations

import uuid
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from grutrace.arrays.reopen import SnapshotHandle
from grutrace.errors import require_extra
from grutrace.records import Array, Site
from grutrace.storage.format.schema import row_chunks
from grutrace.storage.read.snapshot import TraceSnapshot

if TYPE_CHECKING:
    import dask.array


from collections.abc import Iterator
from contextlib import contextmanager

from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import LazyRows
from grutrace.storage.read.sequence_index import Integers, SequenceIndex, as_slice, ranges

#: Beside the quantities: the state that each sequence began from.
INITIAL = "initial"


class QuantityRef:
    """Which quantity of which site, as it was at one moment. Small and picklable, as its look is.

    Attributes:
        name: Of the quantity, or `INITIAL`.
        shape: (N, W); of the initial states (S, W)
        dtype: Of the elements.

    Raises:
        NotRecordedError: It was not recorded.
    """

    def __init__(
        self, handle: SnapshotHandle, snapshot: TraceSnapshot, module: int, site: Site, name: str
    ) -> None:
        self.handle, self.name = handle, name
        self._module, self._suffix = module, site.suffix
        self._calls = snapshot.extent(module).calls
        rows = self._rows(snapshot)
        self.shape: tuple[int, int] = (rows.shape[0], rows.shape[1])
        self.dtype = rows.dtype

    @contextmanager
    def open(self) -> Iterator[tuple[Rows, TraceSnapshot]]:
        """Its rows, of which there may be more by now, and the moment that they are of."""
        with self.handle.snapshot(self._module, self._calls) as snapshot:
            yield self._rows(snapshot), snapshot

    def index(self, snapshot: TraceSnapshot) -> SequenceIndex:
        """The pieces of its module."""
        return snapshot.index(self._module)

    def _rows(self, snapshot: TraceSnapshot) -> Rows:
        sites = snapshot.header.modules[self._module].sites
        site = next(site for site in sites if site.suffix == self._suffix)
        if self.name == INITIAL:
            return snapshot.initial(self._module, site)
        return snapshot.rows(self._module, site, self.name)

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return self.handle.__dask_tokenize__(), self._module, self._suffix, self.name, self.shape


class QuantityRows(LazyRows):
    """All rows of a quantity, (N, W)."""

    def __init__(self, quantity: QuantityRef) -> None:
        super().__init__(quantity.shape, quantity.dtype)
        self._quantity = quantity

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is where its rows are, and not the rows."""
        return QuantityRows, (self._quantity,)

    def __getitem__(self, key: Any) -> Any:
        """As they are, without a copy: dask and xarray write to nothing that they are given."""
        return self._get(key)

    def _read(self, rows: slice, columns: slice) -> Array:
        with self._quantity.open() as (all_rows, _):
            return np.asarray(all_rows[rows, columns])

    def _take(self, rows: Array, columns: slice) -> Array:
        with self._quantity.open() as (all_rows, _):
            return np.asarray(all_rows[rows, columns])

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return self._quantity.__dask_tokenize__()


class PaddedRows:
    """All sequences of a quantity, (S, L, W), with nan after the end of each."""

    ndim = 3

    def __init__(self, quantity: QuantityRef, sequences: int, longest: int) -> None:
        self.shape = (sequences, longest, quantity.shape[1])
        self.dtype = quantity.dtype
        self._quantity = quantity

    def __getitem__(self, key: tuple[Any, ...]) -> Array:
        """By slices and integers: of the sequences, no more is read than is asked for."""
        sequences, rest = normalize_slice(key[0], self.shape[0])
        return np.asarray(self._read(sequences)[(rest, *key[1:])])

    def _read(self, sequences: range) -> Array:
        found = np.full((len(sequences), *self.shape[1:]), np.nan, self.dtype)
        with self._quantity.open() as (all_rows, snapshot):
            of, steps, rows = padded_positions(self._quantity.index(snapshot), sequences)
            # Sequences may have gone on since.
            known = rows < self._quantity.shape[0]
            found[of[known], steps[known]] = all_rows[as_slice(rows[known])]
        return found

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return "padded", self._quantity.__dask_tokenize__(), self.shape


def normalize_slice(key: slice | int, size: int) -> tuple[range, slice | int]:
    """What to read of an axis of this size, and what to take of that afterwards."""
    if not isinstance(key, slice):
        number = range(size)[key]
        return range(number, number + 1), 0
    taken = range(size)[key]
    if not len(taken):
        return range(0), slice(None)
    low, high = sorted((taken[0], taken[-1]))
    return range(low, high + 1), slice(None, None, taken.step)


def padded_positions(index: SequenceIndex, sequences: range) -> tuple[Integers, Integers, Integers]:
    """Where each row of neighbouring sequences goes in a padded array.

    Returns:
        By row: which of these sequences, from 0; which step of it; the number of the row.
    """
    pieces = index.order[index.bounds[sequences.start] : index.bounds[sequences.stop]]
    steps = index.steps[pieces]
    of = np.repeat(index.sequences[pieces] - sequences.start, steps)
    return of, ranges(index.steps_before[pieces], steps), ranges(index.starts[pieces], steps)


#: What one task of dask reads at once: many chunks of the file, and little beside a worker's
#: memory. Bytes.
CHUNK = 16 * 1024 * 1024


def to_dask(snapshot: TraceSnapshot, module: int, site: Site, quantity: str) -> dask.array.Array:
    """The rows of a quantity as a dask array, (N, H), or (N, I) for the input.

    Raises:
        MissingExtraError: dask is not installed.
        NotRecordedError: The quantity was not recorded.
    """
    with require_extra("to_dask", "dask"):
        import dask.array  # noqa: F401
    found = QuantityRef(SnapshotHandle(snapshot), snapshot, module, site, quantity)
    return chunked_rows(found, aligned_rows(found))


def aligned_rows(quantity: QuantityRef) -> int:
    """How many rows make a chunk of dask's: about `CHUNK` bytes, and whole chunks of the file."""
    width = quantity.shape[1]
    of_file = row_chunks(quantity.dtype, width)[0]
    size = max(1, width * quantity.dtype.itemsize)
    return max(1, CHUNK // (size * of_file)) * of_file


def chunked_rows(quantity: QuantityRef, rows: int) -> dask.array.Array:
    """All rows, so many in a chunk."""
    found: dask.array.Array = _chunked(QuantityRows(quantity), rows, quantity.handle)
    return found


def chunked_sequences(padded: PaddedRows, handle: SnapshotHandle) -> dask.array.Array:
    """All sequences, padded: as many in a chunk as `CHUNK` holds."""
    size = padded.shape[1] * padded.shape[2] * padded.dtype.itemsize
    found: dask.array.Array = _chunked(padded, max(1, CHUNK // max(1, size)), handle)
    return found


def _chunked(whole: Any, length: int, handle: SnapshotHandle) -> Any:
    # dask has no types of its own yet.
    array: Any = import_module("dask.array")
    chunks = (length, *whole.shape[1:])
    meta = np.empty((0,) * whole.ndim, whole.dtype)
    if not handle.in_memory:
        # With the array in every task, for it is small: it would be a task of its own otherwise,
        # which one worker has and the others ask for.
        return array.from_array(
            whole, chunks, asarray=False, fancy=False, meta=meta, inline_array=True
        )
    sizes = array.core.normalize_chunks(chunks, whole.shape, dtype=whole.dtype)
    name = f"grutrace-{uuid.uuid4().hex}"
    starts = np.cumsum((0, *sizes[0])).tolist()
    beyond = (0,) * (whole.ndim - 1)
    graph = {
        (name, number, *beyond): (np.asarray, _InMemoryChunk(whole, slice(start, start + size)))
        for number, (start, size) in enumerate(zip(starts, sizes[0], strict=False))
    }
    return array.Array(graph, name, sizes, meta=meta)


class _InMemoryChunk:
    """A part of what is in memory. Pickled, it is an array.

    So a cluster gets arrays, while the threads of this process copy nothing beforehand, and derive
    gates side by side.
    """

    def __init__(self, whole: Any, rows: slice) -> None:
        self._whole, self._rows = whole, rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        part = self._whole[(self._rows, *(slice(None),) * (self._whole.ndim - 1))]
        return np.array(part, dtype) if copy else np.asarray(part, dtype)

    def __reduce__(self) -> tuple[object, ...]:
        return np.asarray, (np.ascontiguousarray(self),)
