"""Rows of a trace as dask arrays, with chunks that are whole chunks of the file.

Module contents: `QuantityRef`, a picklable reference to one quantity; `QuantityRows` and
`PaddedRows`, arrays that read it; `to_dask`, `chunked_rows` and `chunked_sequences`, their dask
arrays.

N rows, S sequences, L steps of the longest sequence, W units or features.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from grutrace.arrays.reopen import SnapshotHandle
from grutrace.errors import require_extra
from grutrace.records import Array, Site
from grutrace.storage.format.schema import row_chunks
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import LazyRows, items_per_block
from grutrace.storage.read.sequence_index import Integers, SequenceIndex, as_slice, ranges
from grutrace.storage.read.snapshot import TraceSnapshot

if TYPE_CHECKING:
    import dask.array

#: Name of the initial states, which are read like a quantity.
INITIAL = "initial"

#: Bytes of a dask chunk: several chunks of the file, and little of a worker's memory.
CHUNK = 16 * 1024 * 1024


class QuantityRef:
    """A small, picklable reference to one quantity of one site in a snapshot.

    Attributes:
        name: Name of the quantity, or `INITIAL`.
        shape: (N, W); (S, W) for the initial states.
        dtype: Type of the elements.

    Raises:
        NotRecordedError: The quantity was not recorded.
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
        """Yield the rows and a snapshot that has them. It may have more rows than `shape`."""
        with self.handle.snapshot(self._module, self._calls) as snapshot:
            yield self._rows(snapshot), snapshot

    def index(self, snapshot: TraceSnapshot) -> SequenceIndex:
        """Return the index of the module's sequences."""
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
        """Pickle the reference instead of the rows."""
        return QuantityRows, (self._quantity,)

    def __getitem__(self, key: Any) -> Any:
        """Return rows without the copy of `LazyRows`: dask and xarray do not modify them."""
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
    """All sequences of a quantity, (S, L, W), padded with NaN."""

    ndim = 3

    def __init__(self, quantity: QuantityRef, sequences: int, longest: int) -> None:
        self.shape = (sequences, longest, quantity.shape[1])
        self.dtype = quantity.dtype
        self._quantity = quantity

    def __getitem__(self, key: tuple[Any, ...]) -> Array:
        """Return the values of slices or integers. Only the requested sequences are read."""
        sequences, rest = normalize_slice(key[0], self.shape[0])
        return np.asarray(self._read(sequences)[(rest, *key[1:])])

    def _read(self, sequences: range) -> Array:
        padded = np.full((len(sequences), *self.shape[1:]), np.nan, self.dtype)
        with self._quantity.open() as (all_rows, snapshot):
            of, steps, rows = padded_positions(self._quantity.index(snapshot), sequences)
            # The sequences may have more steps than when this array was created.
            known = rows < self._quantity.shape[0]
            padded[of[known], steps[known]] = all_rows[as_slice(rows[known])]
        return padded

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return "padded", self._quantity.__dask_tokenize__(), self.shape


def normalize_slice(key: slice | int, size: int) -> tuple[range, slice | int]:
    """Split the index of an axis into a range to read and an index into the result."""
    if not isinstance(key, slice):
        number = range(size)[key]
        return range(number, number + 1), 0
    selected = range(size)[key]
    if not len(selected):
        return range(0), slice(None)
    low, high = sorted((selected[0], selected[-1]))
    return range(low, high + 1), slice(None, None, selected.step)


def padded_positions(index: SequenceIndex, sequences: range) -> tuple[Integers, Integers, Integers]:
    """Return the position of each row of consecutive sequences in a padded array.

    Returns:
        For each row: the sequence, counted from the first one; the step; the number of the row.
    """
    pieces = index.order[index.bounds[sequences.start] : index.bounds[sequences.stop]]
    steps = index.steps[pieces]
    of = np.repeat(index.sequences[pieces] - sequences.start, steps)
    return of, ranges(index.steps_before[pieces], steps), ranges(index.starts[pieces], steps)


def to_dask(snapshot: TraceSnapshot, module: int, site: Site, quantity: str) -> dask.array.Array:
    """Return the rows of a quantity as a dask array, (N, H), or (N, I) for the input.

    Raises:
        MissingExtraError: dask is not installed.
        NotRecordedError: The quantity was not recorded.
    """
    with require_extra("to_dask", "dask"):
        import dask.array  # noqa: F401
    reference = QuantityRef(SnapshotHandle(snapshot), snapshot, module, site, quantity)
    return chunked_rows(reference, aligned_rows(reference))


def aligned_rows(quantity: QuantityRef) -> int:
    """Return the rows of a dask chunk: about `CHUNK` bytes, in whole chunks of the file."""
    width = quantity.shape[1]
    of_file = row_chunks(quantity.dtype, width)[0]
    return of_file * items_per_block(CHUNK, of_file * width * quantity.dtype.itemsize)


def chunked_rows(quantity: QuantityRef, rows: int) -> dask.array.Array:
    """Return all rows as a dask array with this many rows per chunk."""
    array: dask.array.Array = _chunked(QuantityRows(quantity), rows, quantity.handle)
    return array


def chunked_sequences(padded: PaddedRows, handle: SnapshotHandle) -> dask.array.Array:
    """Return all padded sequences as a dask array with chunks of about `CHUNK` bytes."""
    sequence_bytes = padded.shape[1] * padded.shape[2] * padded.dtype.itemsize
    length = items_per_block(CHUNK, sequence_bytes)
    array: dask.array.Array = _chunked(padded, length, handle)
    return array


def _chunked(whole: Any, length: int, handle: SnapshotHandle) -> Any:
    # dask is not typed.
    array: Any = import_module("dask.array")
    chunks = (length, *whole.shape[1:])
    meta = np.empty((0,) * whole.ndim, whole.dtype)
    if not handle.in_memory:
        # Each task gets its own copy of the small reference. A shared task would have to be sent
        # from one worker to all others.
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
    """A chunk of an array in memory, which is pickled as a NumPy array.

    A cluster gets arrays, while the threads of this process copy nothing in advance and recompute
    gates in parallel.
    """

    def __init__(self, whole: Any, rows: slice) -> None:
        self._whole, self._rows = whole, rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        part = self._whole[(self._rows, *(slice(None),) * (self._whole.ndim - 1))]
        return np.array(part, dtype) if copy else np.asarray(part, dtype)

    def __reduce__(self) -> tuple[object, ...]:
        return np.asarray, (np.ascontiguousarray(self),)
