"""Rows that are made when they are asked for, indexed as NumPy indexes an array."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import h5py
import numpy as np

from grutrace.record import Array
from grutrace.storage.compression import is_compressed
from grutrace.storage.source import Rows

#: Rows between two wanted ones that are read along, since another read takes as long. Bytes.
GAP = 256 * 1024

#: The most that one read brings into memory beside the result, when rows are picked out. Bytes.
BLOCK = 16 * 1024 * 1024

_ALL = slice(None)


class LazyRows(ABC):
    """A two-dimensional array of which an index gives a part, made when it is asked for."""

    ndim = 2

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.dtype = dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shape} {self.dtype}, not read yet>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("rows that are not in memory cannot become an array without a copy")
        return np.asarray(self[:], dtype)

    def __iter__(self) -> Iterator[Array]:
        step = self._fitting(BLOCK)
        for start in range(0, len(self), step):
            yield from self[start : start + step]

    def __getitem__(self, key: Any) -> Any:
        rows, columns = _split(key)
        read, rest = self._columns(columns)
        if isinstance(rows, slice):
            return self._slice(rows, read)[:, rest]
        if np.ndim(rows) == 0 and not isinstance(rows, (bool, np.bool_)):
            (row,) = self._indices([operator.index(rows)])
            return self._read(slice(row, row + 1), read)[0, rest]
        found = self._pick(self._indices(rows), read)
        return found[_ALL if np.ndim(rest) == 0 else np.arange(len(found)), rest]

    @abstractmethod
    def _read(self, rows: slice, columns: slice) -> Array:
        """Make rows from first to last. Steps are positive."""

    @abstractmethod
    def _pick(self, rows: Array, columns: slice) -> Array:
        """Make rows of these numbers, none negative, in any order."""

    def _slice(self, rows: slice, columns: slice) -> Array:
        taken = range(len(self))[rows]
        if taken.step > 0:
            return self._read(slice(taken.start, taken.stop, taken.step), columns)
        forward = taken[::-1]
        return self._read(slice(forward.start, forward.stop, forward.step), columns)[::-1]

    def _columns(self, columns: Any) -> tuple[slice, Any]:
        """What to select while reading, and what of that to select afterwards."""
        if isinstance(columns, slice):
            taken = range(self.shape[1])[columns]
            return (columns, _ALL) if taken.step > 0 else (_ALL, columns)
        if np.ndim(columns) == 0:
            column = range(self.shape[1])[operator.index(columns)]
            return slice(column, column + 1), 0
        return _ALL, np.asarray(columns)

    def _indices(self, rows: Any) -> Array:
        indices = np.asarray(rows)
        if indices.dtype == bool and indices.shape == (len(self),):
            return np.flatnonzero(indices)
        if indices.size == 0:
            indices = indices.astype(np.int64)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise IndexError(f"rows are picked by integers or a mask of {len(self)}, in one axis")
        if np.any((indices < -len(self)) | (indices >= len(self))):
            raise IndexError(f"rows {rows} are not all among {len(self)}")
        return np.where(indices < 0, indices + len(self), indices)

    def _fitting(self, size: int) -> int:
        """Rows in this many bytes, at least one."""
        return max(1, size // max(1, self.shape[1] * self.dtype.itemsize))


class FileRows(LazyRows):
    """The first rows of a dataset, (rows, width). Indexing reads, and gives NumPy arrays.

    Args:
        lent: Gives the open dataset for one read.
        shape: (rows, width)
        dtype: Type of the elements.

    Raises:
        MissingExtraError: When it is read, if hdf5plugin would unpack it and is not installed.
    """

    def __init__(
        self,
        lent: Callable[[], AbstractContextManager[h5py.Dataset]],
        shape: tuple[int, int],
        dtype: np.dtype[Any],
    ) -> None:
        super().__init__(shape, dtype)
        self._lent, self._asked = lent, False

    def _read(self, rows: slice, columns: slice) -> Array:
        with self._lent() as dataset:
            if not self._asked:
                # Not before: looking into a compressed trace needs no library to unpack it.
                is_compressed(dataset)
                self._asked = True
            return np.asarray(dataset[rows, columns])

    def _pick(self, rows: Array, columns: slice) -> Array:
        """Rows in any order, read in spans of neighbours."""
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
        """Cut rising row numbers where the gap is wide or the span grows long."""
        wide = 1 + np.flatnonzero(np.diff(rising) > self._fitting(GAP))
        longest = self._fitting(BLOCK)
        for start, stop in zip([0, *wide.tolist()], [*wide.tolist(), len(rising)], strict=True):
            while start < stop:
                end = int(np.searchsorted(rising[start:stop], rising[start] + longest)) + start
                yield start, end
                start = end


class SelectedRows(LazyRows):
    """Some of other rows, by their numbers. Indexing reads them.

    Args:
        rows: The others, (N, width).
        numbers: (n,) which of them.
    """

    def __init__(self, rows: Rows, numbers: Array) -> None:
        super().__init__((len(numbers), rows.shape[1]), rows.dtype)
        self._rows, self._numbers = rows, numbers

    def _read(self, rows: slice, columns: slice) -> Array:
        return np.asarray(self._rows[self._numbers[rows], columns])

    def _pick(self, rows: Array, columns: slice) -> Array:
        return np.asarray(self._rows[self._numbers[rows], columns])


def _split(key: Any) -> tuple[Any, Any]:
    """The index of the rows and that of the columns."""
    if not isinstance(key, tuple):
        key = (key,)
    if any(part is Ellipsis for part in key):
        place = next(place for place, part in enumerate(key) if part is Ellipsis)
        missing = (_ALL,) * (3 - len(key))
        key = (*key[:place], *missing, *key[place + 1 :])
    if len(key) > 2 or any(part is None or part is Ellipsis for part in key):
        raise IndexError(f"rows have two axes, which {key} does not index")
    return (*key, _ALL, _ALL)[:2]
