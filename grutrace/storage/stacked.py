"""Rows that lie in several places, one after another, as one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from grutrace.record import Array
from grutrace.storage.rows import LazyRows
from grutrace.storage.source import Rows


class StackedRows(LazyRows):
    """The rows of several arrays, end to end, (rows, width). Indexing reads from where they are.

    Args:
        parts: (n, width) each, all of one width and type.
        shape: (rows, width) of all together.
        dtype: Type of the elements.
    """

    _where = "in several files: not read yet"

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
            # The first row from `low` on that is one of those to be taken.
            start = taken.start + max(0, -(-(low - taken.start) // taken.step)) * taken.step
            if start < min(high, taken.stop):
                within = slice(start - low, min(high, taken.stop) - low, taken.step)
                read.append(np.asarray(self._parts[part][within, columns]))
        if len(read) == 1:
            return read[0]
        width = len(range(self.shape[1])[columns])
        return np.concatenate([np.empty((0, width), self.dtype), *read], dtype=self.dtype)

    def _pick(self, rows: Array, columns: slice) -> Array:
        found = np.empty((len(rows), len(range(self.shape[1])[columns])), self.dtype)
        owners = np.searchsorted(self._bounds, rows, side="right") - 1
        for part in np.unique(owners):
            wanted = np.flatnonzero(owners == part)
            found[wanted] = self._parts[part][rows[wanted] - self._bounds[part], columns]
        return found
