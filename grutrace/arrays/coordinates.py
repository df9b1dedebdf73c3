"""Coordinates of each step: sequence, step within the sequence, call, tag, tokens and labels.

They are computed from the tables on demand, because a coordinate of all steps takes as much memory
as one unit of a gate.

N rows, S sequences, L steps of the longest sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property, partial
from typing import Any

import numpy as np

from grutrace.arrays.dask_arrays import normalize_slice, padded_positions
from grutrace.records import Array
from grutrace.storage.read.annotations import annotation_mask, row_labels
from grutrace.storage.read.sequence_index import Integers, SequenceIndex
from grutrace.storage.read.snapshot import TraceSnapshot

_INTEGER, _NUMBER, _TEXT = np.dtype(np.int64), np.dtype(np.float64), np.dtype(object)


class StepColumn(ABC):
    """One value per row, (N,), computed when it is indexed."""

    ndim = 1

    def __init__(self, index: SequenceIndex, dtype: np.dtype[Any]) -> None:
        self.shape = (int(index.steps.sum()),)
        self.dtype = dtype
        self._index = index

    def __getitem__(self, key: tuple[Any, ...]) -> Array:
        """Return the values of a slice or an integer."""
        rows = np.arange(self.shape[0])[key]
        return np.asarray(self.values_at(np.atleast_1d(rows))).reshape(rows.shape)

    @abstractmethod
    def values_at(self, rows: Integers) -> Array:
        """Return the values of these rows."""


class SequenceNumbers(StepColumn):
    """The sequence of each row."""

    def __init__(self, index: SequenceIndex) -> None:
        super().__init__(index, _INTEGER)

    def values_at(self, rows: Integers) -> Array:
        """Return the values of these rows."""
        return self._index.sequences[self._index.pieces_of(rows)]


class StepNumbers(StepColumn):
    """The step of each row within its sequence."""

    def __init__(self, index: SequenceIndex) -> None:
        super().__init__(index, _INTEGER)

    def values_at(self, rows: Integers) -> Array:
        """Return the values of these rows."""
        pieces = self._index.pieces_of(rows)
        return self._index.steps_before[pieces] + rows - self._index.starts[pieces]


class CallNumbers(StepColumn):
    """The call of each row, as a row of `Trace.calls`."""

    def __init__(self, index: SequenceIndex) -> None:
        super().__init__(index, _INTEGER)

    def values_at(self, rows: Integers) -> Array:
        """Return the values of these rows."""
        return self._index.calls[self._index.pieces_of(rows)]


class Tags(StepColumn):
    """The tag of each row's call, or None.

    Args:
        index: Index of the module's sequences.
        tags: (calls,) tag of each call.
    """

    def __init__(self, index: SequenceIndex, tags: Array) -> None:
        super().__init__(index, _TEXT)
        self._tags = tags

    def values_at(self, rows: Integers) -> Array:
        """Return the values of these rows."""
        return self.values_of_calls(self._index.calls[self._index.pieces_of(rows)])

    def values_of_calls(self, calls: Integers) -> Array:
        """Return the tags of these calls."""
        return np.asarray(self._tags[calls])


class AnnotationColumn(StepColumn):
    """The token or label of each row: floats with NaN, or with any string, objects with None.

    Args:
        snapshot: Snapshot of the trace.
        module: Index of the module in the header.
        name: Name of the label, or ``tokens``.
    """

    def __init__(self, snapshot: TraceSnapshot, module: int, name: str) -> None:
        tables, index = snapshot.tables, snapshot.index(module)
        self._read = partial(row_labels, tables, module, index, name)
        texts = tables.annotations["text"][annotation_mask(tables, module, name)].any()
        super().__init__(index, _TEXT if texts else _NUMBER)

    def values_at(self, rows: Integers) -> Array:
        """Return the values of these rows."""
        return np.asarray(self._all[rows])

    @cached_property
    def _all(self) -> Array:
        return self._read().to_array(self.dtype)


class PaddedColumn:
    """A coordinate by sequence, (S, L), padded with NaN or None."""

    ndim = 2

    def __init__(self, column: StepColumn, index: SequenceIndex) -> None:
        self.shape = (len(index), int(index.lengths.max(initial=0)))
        self.dtype = column.dtype
        self._column, self._index = column, index

    def __getitem__(self, key: tuple[Any, ...]) -> Array:
        """Return the values of slices or integers."""
        sequences, rest = normalize_slice(key[0], self.shape[0])
        nothing = None if self.dtype == _TEXT else np.nan
        values = np.full((len(sequences), self.shape[1]), nothing, self.dtype)
        of, steps, rows = padded_positions(self._index, sequences)
        values[of, steps] = self._column.values_at(rows)
        return np.asarray(values[(rest, *key[1:])])
