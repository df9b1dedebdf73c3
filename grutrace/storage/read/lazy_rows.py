"""Two-dimensional arrays that are read when they are indexed, with NumPy's indexing.

Module contents: `LazyRows`, the base class; `FileRows`, `MemoryRows`, `SelectedRows` and
`ConcatenatedRows`, for rows in a file, in memory, by number and in several arrays; `as_rows` and
`blocks`.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import h5py
import numpy as np

from grutrace.records import Array
from grutrace.storage.hdf5.chunk_reads import SMALLEST, find_rows
from grutrace.storage.hdf5.filters import is_compressed
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.array_like import ArrayLike
from grutrace.storage.read.sequence_index import as_slice

#: Two requested rows with at most this many bytes between them are read together: a second read
#: takes as long.
GAP = 256 * 1024

#: Bytes of a read buffer.
BLOCK = 16 * 1024 * 1024

_ALL = slice(None)


class LazyRows(ArrayLike):
    """Rows of a trace, (N, W): an array that is read when it is indexed.

    It supports the indexing, operators and methods of NumPy arrays. Indexing reads only the
    requested rows. The resulting NumPy arrays are writable copies.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru = torch.nn.GRU(2, 3)
        >>> with grutrace.trace(gru, "run.h5") as tracer:
        ...     output, state = gru(torch.randn(5, 4, 2))
        >>> with grutrace.open("run.h5") as trace:
        ...     update = trace["l0"].update
        ...     print(update)
        ...     print(update[:10, 0].shape, update.mean(axis=0).shape)
        <rows (20, 3) float32, in a file: not read yet>
        (10,) (3,)
    """

    #: Location of the rows, for `repr`.
    _location = "not read yet"

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.dtype = dtype

    def __repr__(self) -> str:
        return f"<rows {self.shape} {self.dtype}, {self._location}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle and copy the rows as a NumPy array."""
        return np.asarray, (np.asarray(self),)

    def __iter__(self) -> Iterator[Array]:
        for block in self._blocks(BLOCK):
            yield from _writable(block)

    def __getitem__(self, key: Any) -> Any:
        return _writable(self._get(key))

    def read_into(self, rows: slice, target: Array) -> Array:  # noqa: ARG002
        """Read a slice of rows, (n, W), into memory that is used again, if they must be copied.

        Args:
            rows: The rows, from a first to a last one in steps of one.
            target: (n, W) of the type of the rows, C-contiguous.

        Returns:
            The target, or another array, which may be read-only.
        """
        return self._read(rows, _ALL)

    def _get(self, key: Any) -> Any:
        if _is_mask(key, self.shape):
            return self._masked(key[0] if isinstance(key, tuple) else key)
        split = _split_index(key)
        if split is None:
            # Raise NumPy's error for a wrong index before anything is read.
            np.broadcast_to(np.zeros((), bool), self.shape)[key]
            return self._slice(_ALL, _ALL)[key]
        rows, columns = split
        columns_read, remaining_index = self._split_columns(columns)
        if isinstance(rows, slice):
            return self._slice(rows, columns_read)[:, remaining_index]
        if np.ndim(rows) == 0:
            (row,) = self._indices([operator.index(rows)])
            return self._read(slice(row, row + 1), columns_read)[0, remaining_index]
        array = self._take(self._indices(rows), columns_read)
        if isinstance(remaining_index, slice):
            return array[:, remaining_index]
        # NumPy pairs the indices of rows and columns.
        return array[np.arange(len(array)), remaining_index]

    def _blocks(self, size: int) -> Iterator[Array]:
        for rows in block_slices(len(self), size, item_bytes(self)):
            yield self._read(rows, _ALL)

    def _masked(self, mask: Array) -> Array:
        """Return the elements where a mask (N, W) is True, (n,)."""
        elements, start = [np.empty(0, self.dtype)], 0
        for block in self._blocks(BLOCK):
            elements.append(block[mask[start : start + len(block)]])
            start += len(block)
        return np.concatenate(elements, dtype=self.dtype)

    @abstractmethod
    def _read(self, rows: slice, columns: slice) -> Array:
        """Read a slice of rows. Its step is positive."""

    @abstractmethod
    def _take(self, rows: Array, columns: slice) -> Array:
        """Read rows by their numbers, which are not negative, in any order."""

    def _slice(self, rows: slice, columns: slice) -> Array:
        numbers = range(len(self))[rows]
        if numbers.step > 0:
            return self._read(slice(numbers.start, numbers.stop, numbers.step), columns)
        forward = numbers[::-1]
        return self._read(slice(forward.start, forward.stop, forward.step), columns)[::-1]

    def _split_columns(self, columns: Any) -> tuple[slice, Any]:
        """Split a column index into a slice to read and an index into the result."""
        if isinstance(columns, slice):
            is_forward = range(self.shape[1])[columns].step > 0
            return (columns, _ALL) if is_forward else (_ALL, columns)
        if np.ndim(columns) == 0:
            column, width = operator.index(columns), self.shape[1]
            if not -width <= column < width:
                raise IndexError(
                    f"column index {column} is out of bounds: there are {width} columns"
                )
            column %= width
            return slice(column, column + 1), 0
        indices = np.asarray(columns)
        return _ALL, indices if indices.size else indices.astype(np.int64)

    def _indices(self, rows: Any) -> Array:
        indices = np.asarray(rows)
        if indices.dtype == bool and indices.shape == (len(self),):
            return np.flatnonzero(indices)
        if indices.size == 0:
            indices = indices.astype(np.int64)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise IndexError(
                f"row index: expected integers or a mask of length {len(self)}, in one dimension; "
                f"found {indices.dtype} of shape {indices.shape}"
            )
        if np.any((indices < -len(self)) | (indices >= len(self))):
            raise IndexError(f"row index {rows} is out of bounds: there are {len(self)} rows")
        return np.where(indices < 0, indices + len(self), indices)


class FileRows(LazyRows):
    """The first rows of a dataset, (rows, width). Indexing reads, and gives NumPy arrays.

    Args:
        acquire: Gives the open dataset for one read.
        shape: (rows, width)
        dtype: Type of the elements.

    Raises:
        MissingExtraError: On reading, if the rows are compressed and hdf5plugin is not installed.
    """

    _location = "in a file: not read yet"

    def __init__(
        self,
        acquire: Callable[[], AbstractContextManager[h5py.Dataset]],
        shape: tuple[int, int],
        dtype: np.dtype[Any],
    ) -> None:
        super().__init__(shape, dtype)
        self._acquire, self._filter_checked = acquire, False

    def read_into(self, rows: slice, target: Array) -> Array:
        """Read a slice of rows into the target, where it is not read by HDF5."""
        return self._read_all_columns(rows, target)

    def _read(self, rows: slice, columns: slice) -> Array:
        numbers = range(len(self))[rows]
        is_whole = numbers.step == 1 and range(self.shape[1])[columns] == range(self.shape[1])
        if is_whole and len(numbers) * item_bytes(self) >= SMALLEST:
            return self._read_all_columns(slice(numbers.start, numbers.stop))
        with self._open() as dataset:
            return np.asarray(dataset[rows, columns])

    def _read_all_columns(self, rows: slice, target: Array | None = None) -> Array:
        """Read rows from a first to a last one, into an array of their shape if one is given."""
        with self._open() as dataset:
            pieces = find_rows(dataset, rows.start, rows.stop, self.dtype)
            if pieces is None:
                return np.asarray(dataset[rows])
        if target is None:
            target = np.empty((rows.stop - rows.start, self.shape[1]), self.dtype)
        with pieces:
            if pieces.read_into(target):
                return target
        # HDF5 says what is wrong with the file.
        with self._open() as dataset:
            return np.asarray(dataset[rows])

    @contextmanager
    def _open(self) -> Iterator[h5py.Dataset]:
        with self._acquire() as dataset:
            if not self._filter_checked:
                # Checked on the first read: opening a compressed trace needs no hdf5plugin.
                is_compressed(dataset)
                self._filter_checked = True
            yield dataset

    def _take(self, rows: Array, columns: slice) -> Array:
        """Read rows in any order, in spans of nearby rows."""
        order = np.argsort(rows, kind="stable")
        rising = rows[order]
        width = len(range(self.shape[1])[columns])
        array = np.empty((len(rows), width), self.dtype)
        for start, stop in self._spans(rising):
            first_row = int(rising[start])
            span = self._read(slice(first_row, int(rising[stop - 1]) + 1), columns)
            array[order[start:stop]] = span[rising[start:stop] - first_row]
        return array

    def _spans(self, rising: Array) -> Iterator[tuple[int, int]]:
        """Split sorted row numbers at wide gaps, and where a span exceeds `BLOCK` bytes."""
        gaps = 1 + np.flatnonzero(np.diff(rising) > items_per_block(GAP, item_bytes(self)))
        max_rows = items_per_block(BLOCK, item_bytes(self))
        for start, stop in pairwise([0, *gaps.tolist(), len(rising)]):
            while start < stop:
                span = int(np.searchsorted(rising[start:stop], rising[start] + max_rows))
                yield start, start + span
                start += span


class SelectedRows(LazyRows):
    """A selection of the rows of another array.

    Args:
        rows: The other array, (N, W).
        numbers: (n,) numbers of the selected rows.
    """

    def __init__(self, rows: Rows, numbers: Array) -> None:
        super().__init__((len(numbers), rows.shape[1]), rows.dtype)
        self._rows, self._numbers = rows, numbers

    def _read(self, rows: slice, columns: slice) -> Array:
        return np.asarray(self._rows[as_slice(self._numbers[rows]), columns])

    def _take(self, rows: Array, columns: slice) -> Array:
        return np.asarray(self._rows[as_slice(self._numbers[rows]), columns])


class MemoryRows(LazyRows):
    """Rows in memory. Indexing returns copies."""

    def __init__(self, array: Array) -> None:
        super().__init__((array.shape[0], array.shape[1]), array.dtype)
        self._array = array.view()
        self._array.flags.writeable = False

    def __repr__(self) -> str:
        values = np.array2string(
            self._array, max_line_width=80, precision=4, threshold=20, edgeitems=2
        )
        return f"<rows {self.shape} {self.dtype}, in memory>\n{values}"

    def _read(self, rows: slice, columns: slice) -> Array:
        return self._array[rows, columns]

    def _take(self, rows: Array, columns: slice) -> Array:
        return self._array[rows, columns]


def as_rows(rows: Rows) -> LazyRows:
    """Return rows of a source as the `LazyRows` that users get, in memory and in a file alike."""
    return rows if isinstance(rows, LazyRows) else MemoryRows(np.asarray(rows))


def _writable(values: Any) -> Any:
    """Return a writable array with positive strides, which torch requires; copy if necessary."""
    if isinstance(values, np.ndarray) and (
        not values.flags.writeable or any(stride < 0 for stride in values.strides)
    ):
        return values.copy()
    return values


def _is_mask(key: Any, shape: tuple[int, int]) -> bool:
    """Return whether an index is a mask of all elements."""
    if isinstance(key, tuple) and len(key) == 1:
        key = key[0]
    return isinstance(key, np.ndarray) and key.dtype == bool and key.shape == shape


def _split_index(key: Any) -> tuple[Any, Any] | None:
    """Split an index into those of rows and columns; None if it needs the whole array."""
    if not isinstance(key, tuple):
        key = (key,)
    ellipses = [position for position, index in enumerate(key) if index is Ellipsis]
    if ellipses:
        missing_axes = (_ALL,) * (3 - len(key))
        key = (*key[: ellipses[0]], *missing_axes, *key[ellipses[0] + 1 :])
    if len(key) > 2 or not all(map(_is_basic_index, key)):
        return None
    return (*key, _ALL, _ALL)[:2]


def _is_basic_index(index: Any) -> bool:
    """Return whether an index is a slice, an integer, or integers or a mask along one axis."""
    if isinstance(index, slice):
        return True
    if index is None or index is Ellipsis or isinstance(index, (bool, np.bool_, str)):
        return False
    return np.ndim(index) == 1 or (np.ndim(index) == 0 and not isinstance(index, np.ndarray))


class ConcatenatedRows(LazyRows):
    """The concatenation of several arrays, (N, W). Indexing reads from the arrays.

    Args:
        arrays: The arrays, (n, W) each, all of one width and type.
        shape: (N, W) of the concatenation.
        dtype: Type of the elements.
    """

    _location = "in several files: not read yet"

    def __init__(
        self, arrays: Sequence[Rows], shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> None:
        super().__init__(shape, dtype)
        self._arrays = [array for array in arrays if len(array)]
        self._bounds = np.cumsum([0, *map(len, self._arrays)])

    def _read(self, rows: slice, columns: slice) -> Array:
        numbers = range(len(self))[rows]
        owners = np.searchsorted(self._bounds, [numbers.start, numbers.stop], side="right") - 1
        blocks = []
        for owner in range(owners[0], min(owners[1] + 1, len(self._arrays))) if numbers else ():
            low, high = self._bounds[owner : owner + 2].tolist()
            # The first requested row from `low` on.
            skipped = max(0, -(-(low - numbers.start) // numbers.step))
            start, stop = numbers.start + skipped * numbers.step, min(high, numbers.stop)
            if start < stop:
                local_rows = slice(start - low, stop - low, numbers.step)
                blocks.append(np.asarray(self._arrays[owner][local_rows, columns]))
        if len(blocks) == 1:
            return blocks[0]
        width = len(range(self.shape[1])[columns])
        return np.concatenate([np.empty((0, width), self.dtype), *blocks], dtype=self.dtype)

    def _take(self, rows: Array, columns: slice) -> Array:
        array = np.empty((len(rows), len(range(self.shape[1])[columns])), self.dtype)
        owners = np.searchsorted(self._bounds, rows, side="right") - 1
        for owner in np.unique(owners):
            positions = np.flatnonzero(owners == owner)
            local_rows = rows[positions] - self._bounds[owner]
            array[positions] = self._arrays[owner][local_rows, columns]
        return array


def item_bytes(array: Rows) -> int:
    """Return the size of one item of an array with one or more axes, in bytes."""
    return math.prod(array.shape[1:]) * array.dtype.itemsize


def items_per_block(block_bytes: int, item_bytes: int) -> int:
    """Return how many items of this size fit in a block, at least one."""
    return max(1, block_bytes // max(1, item_bytes))


def block_slices(count: int, block_bytes: int, item_bytes: int) -> Iterator[slice]:
    """Yield slices of `count` items, each of at most this many bytes, or of one item."""
    step = items_per_block(block_bytes, item_bytes)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def blocks(rows: Rows) -> Iterator[Array]:
    """Yield all rows in blocks of `BLOCK` bytes."""
    for part in block_slices(len(rows), BLOCK, item_bytes(rows)):
        yield np.asarray(rows[part])
