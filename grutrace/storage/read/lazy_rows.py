"""Two-dimensional arrays that are read when they are indexed, with NumPy's indexing.

Module contents: `LazyRows`, the base class; `FileRows`, `MemoryRows`, `SelectedRows` and
`ConcatenatedRows`, for rows in a file, in memory, by number and in several arrays; `as_rows` and
`blocks`.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import h5py
import numpy as np

from grutrace.records import Array
from grutrace.storage.hdf5.filters import is_compressed
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.array_like import ArrayLike

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

    Example:
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

    def _get(self, key: Any) -> Any:
        if _is_mask(key, self.shape):
            return self._masked(key[0] if isinstance(key, tuple) else key)
        split = _split_index(key)
        if split is None:
            # Raise NumPy's error for a wrong index before anything is read.
            np.broadcast_to(np.zeros((), bool), self.shape)[key]
            return self._slice(_ALL, _ALL)[key]
        rows, columns = split
        read, rest = self._columns(columns)
        if isinstance(rows, slice):
            return self._slice(rows, read)[:, rest]
        if np.ndim(rows) == 0:
            (row,) = self._indices([operator.index(rows)])
            return self._read(slice(row, row + 1), read)[0, rest]
        found = self._take(self._indices(rows), read)
        return found[_ALL if _is_slice(rest) else np.arange(len(found)), rest]

    def _blocks(self, size: int) -> Iterator[Array]:
        step = self._rows_per_block(size)
        for start in range(0, len(self), step):
            yield self._read(slice(start, min(start + step, len(self)), 1), _ALL)

    def _masked(self, mask: Array) -> Array:
        """Return the elements where a mask (N, W) is True, (n,)."""
        found, start = [np.empty(0, self.dtype)], 0
        for block in self._blocks(BLOCK):
            found.append(block[mask[start : start + len(block)]])
            start += len(block)
        return np.concatenate(found, dtype=self.dtype)

    @abstractmethod
    def _read(self, rows: slice, columns: slice) -> Array:
        """Read a slice of rows. Its step is positive."""

    @abstractmethod
    def _take(self, rows: Array, columns: slice) -> Array:
        """Read rows by their numbers, which are not negative, in any order."""

    def _slice(self, rows: slice, columns: slice) -> Array:
        taken = range(len(self))[rows]
        if taken.step > 0:
            return self._read(slice(taken.start, taken.stop, taken.step), columns)
        forward = taken[::-1]
        return self._read(slice(forward.start, forward.stop, forward.step), columns)[::-1]

    def _columns(self, columns: Any) -> tuple[slice, Any]:
        """Split a column index into a slice to read and an index into the result."""
        if isinstance(columns, slice):
            taken = range(self.shape[1])[columns]
            return (columns, _ALL) if taken.step > 0 else (_ALL, columns)
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

    def _rows_per_block(self, size: int) -> int:
        """Return how many rows fit in this many bytes, at least one."""
        return items_per_block(size, self.shape[1] * self.dtype.itemsize)


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

    def _read(self, rows: slice, columns: slice) -> Array:
        with self._acquire() as dataset:
            if not self._filter_checked:
                # Checked on the first read: opening a compressed trace needs no hdf5plugin.
                is_compressed(dataset)
                self._filter_checked = True
            return np.asarray(dataset[rows, columns])

    def _take(self, rows: Array, columns: slice) -> Array:
        """Read rows in any order, in spans of nearby rows."""
        order = np.argsort(rows, kind="stable")
        rising = rows[order]
        width = len(range(self.shape[1])[columns])
        found = np.empty((len(rows), width), self.dtype)
        for start, stop in self._spans(rising):
            first = int(rising[start])
            span = self._read(slice(first, int(rising[stop - 1]) + 1), columns)
            found[order[start:stop]] = span[rising[start:stop] - first]
        return found

    def _spans(self, rising: Array) -> Iterator[tuple[int, int]]:
        """Split sorted row numbers at wide gaps, and where a span exceeds `BLOCK` bytes."""
        wide = 1 + np.flatnonzero(np.diff(rising) > self._rows_per_block(GAP))
        longest = self._rows_per_block(BLOCK)
        for start, stop in zip([0, *wide.tolist()], [*wide.tolist(), len(rising)], strict=True):
            while start < stop:
                end = int(np.searchsorted(rising[start:stop], rising[start] + longest)) + start
                yield start, end
                start = end


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
        return np.asarray(self._rows[self._numbers[rows], columns])

    def _take(self, rows: Array, columns: slice) -> Array:
        return np.asarray(self._rows[self._numbers[rows], columns])


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


def _writable(found: Any) -> Any:
    """Return a writable array with positive strides, which torch requires; copy if necessary."""
    if isinstance(found, np.ndarray) and (
        not found.flags.writeable or any(stride < 0 for stride in found.strides)
    ):
        return found.copy()
    return found


def _is_mask(key: Any, shape: tuple[int, int]) -> bool:
    """Return whether an index is a mask of all elements."""
    if isinstance(key, tuple) and len(key) == 1:
        key = key[0]
    return isinstance(key, np.ndarray) and key.dtype == bool and key.shape == shape


def _is_slice(index: Any) -> bool:
    return isinstance(index, slice)


def _split_index(key: Any) -> tuple[Any, Any] | None:
    """Split an index into those of rows and columns; None if it needs the whole array."""
    if not isinstance(key, tuple):
        key = (key,)
    if any(part is Ellipsis for part in key):
        position = next(position for position, part in enumerate(key) if part is Ellipsis)
        missing = (_ALL,) * (3 - len(key))
        key = (*key[:position], *missing, *key[position + 1 :])
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
        parts: The arrays, (n, W) each, all of one width and type.
        shape: (N, W) of the concatenation.
        dtype: Type of the elements.
    """

    _location = "in several files: not read yet"

    def __init__(self, parts: Sequence[Rows], shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        super().__init__(shape, dtype)
        self._parts = [part for part in parts if len(part)]
        self._bounds = np.cumsum([0, *map(len, self._parts)])

    def _read(self, rows: slice, columns: slice) -> Array:
        taken = range(len(self))[rows]
        first, last = np.searchsorted(self._bounds, [taken.start, taken.stop], side="right")
        read = []
        for part in range(first - 1, min(last, len(self._parts))) if len(taken) else ():
            low, high = self._bounds[part : part + 2].tolist()
            # The first requested row from `low` on.
            start = taken.start + max(0, -(-(low - taken.start) // taken.step)) * taken.step
            if start < min(high, taken.stop):
                within = slice(start - low, min(high, taken.stop) - low, taken.step)
                read.append(np.asarray(self._parts[part][within, columns]))
        if len(read) == 1:
            return read[0]
        width = len(range(self.shape[1])[columns])
        return np.concatenate([np.empty((0, width), self.dtype), *read], dtype=self.dtype)

    def _take(self, rows: Array, columns: slice) -> Array:
        found = np.empty((len(rows), len(range(self.shape[1])[columns])), self.dtype)
        owners = np.searchsorted(self._bounds, rows, side="right") - 1
        for part in np.unique(owners):
            wanted = np.flatnonzero(owners == part)
            found[wanted] = self._parts[part][rows[wanted] - self._bounds[part], columns]
        return found


def items_per_block(block_bytes: int, item_bytes: int) -> int:
    """Return how many items of this size fit in a block, at least one."""
    return max(1, block_bytes // max(1, item_bytes))


def blocks(rows: Rows) -> Iterator[Array]:
    """Yield all rows in blocks of `BLOCK` bytes."""
    each = items_per_block(BLOCK, rows.shape[1] * rows.dtype.itemsize)
    for start in range(0, len(rows), each):
        yield np.asarray(rows[start : start + each])
