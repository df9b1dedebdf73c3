"""What is known of each step beside its rows: which sequence, which step of it, call, tag, token.

All follow from the tables, which a trace has in memory; they are worked out for the steps that are
asked for, since a column of them takes as much memory as a unit of a gate. N rows, S sequences, L
steps of the longest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property, partial
from typing import Any

import numpy as np

from grutrace.arrays.dask_arrays import normalize_slice, padded_positions
from grutrace.records import Array
from grutrace.storage.read.row_labels import annotation_mask, row_labels
from grutrace.storage.read.sequence_index import Integers, SequenceIndex
from grutrace.storage.read.snapshot import TraceSnapshot

_INTEGER, _NUMBER, _TEXT = np.dtype(np.int64), np.dtype(np.float64), np.dtype(object)


class StepColumn(ABC):
    """One value a row, (N,), worked out when it is indexed."""

    ndim = 1

    def __init__(self, index: SequenceIndex, dtype: np.dtype[Any]) -> None:
        self.shape = (int(index.steps.sum()),)
        self.dtype = dtype
        self._index = index

    def __getitem__(self, key: tuple[Any, ...]) -> Array:
        """By a slice or an integer."""
        rows = np.arange(self.shape[0])[key]
        return np.asarray(self.values_at(np.atleast_1d(rows))).reshape(rows.shape)

    @abstractmethod
    def values_at(self, rows: Integers) -> Array:
        """The values of these rows."""


class SequenceNumbers(StepColumn):
    """The sequence that each row is of."""

    def __init__(self, index: SequenceIndex) -> None:
        super().__init__(index, _INTEGER)

    def values_at(self, rows: Integers) -> Array:
        """The values of these rows."""
        return self._index.sequences[self._index.pieces_of(rows)]


class StepNumbers(StepColumn):
    """Which step of its sequence each row is."""

    def __init__(self, index: SequenceIndex) -> None:
        super().__init__(index, _INTEGER)

    def values_at(self, rows: Integers) -> Array:
        """The values of these rows."""
        pieces = self._index.pieces_of(rows)
        return self._index.steps_before[pieces] + rows - self._index.starts[pieces]


class CallNumbers(StepColumn):
    """The call that made each row, as a row of `Trace.calls`."""

    def __init__(self, index: SequenceIndex) -> None:
        super().__init__(index, _INTEGER)

    def values_at(self, rows: Integers) -> Array:
        """The values of these rows."""
        return self._index.calls[self._index.pieces_of(rows)]


class Tags(StepColumn):
    """The tag of the call that made each row, or None.

    Args:
        index: Of the module.
        tags: (calls,) of each call.
    """

    def __init__(self, index: SequenceIndex, tags: Array) -> None:
        super().__init__(index, _TEXT)
        self._tags = tags

    def values_at(self, rows: Integers) -> Array:
        """The values of these rows."""
        return self.values_of_calls(self._index.calls[self._index.pieces_of(rows)])

    def values_of_calls(self, calls: Integers) -> Array:
        """The tags of these calls."""
        return np.asarray(self._tags[calls])


class AnnotationColumn(StepColumn):
    """The tokens, or a label, of each row: numbers with nan for none; with None, if one is text.

    Args:
        moment: Of the trace.
        module: Place of the module in the header.
        name: ``tokens``, or the label's.
    """

    def __init__(self, snapshot: TraceSnapshot, module: int, name: str) -> None:
        tables, index = snapshot.tables, snapshot.index(module)
        self._read = partial(row_labels, tables, module, index, name)
        texts = tables.annotations["text"][annotation_mask(tables, module, name)].any()
        super().__init__(index, _TEXT if texts else _NUMBER)

    def values_at(self, rows: Integers) -> Array:
        """The values of these rows."""
        return np.asarray(self._all[rows])

    @cached_property
    def _all(self) -> Array:
        return self._read().to_array(self.dtype)


class PaddedColumn:
    """A column by sequence, (S, L), with nan or None after the end of each."""

    ndim = 2

    def __init__(self, column: StepColumn, index: SequenceIndex) -> None:
        self.shape = (len(index), int(index.lengths.max(initial=0)))
        self.dtype = column.dtype
        self._column, self._index = column, index

    def __getitem__(self, key: tuple[Any, ...]) -> Array:
        """By slices and integers."""
        sequences, rest = normalize_slice(key[0], self.shape[0])
        nothing = None if self.dtype == _TEXT else np.nan
        found = np.full((len(sequences), self.shape[1]), nothing, self.dtype)
        of, steps, rows = padded_positions(self._index, sequences)
        found[of, steps] = self._column.values_at(rows)
        return np.asarray(found[(rest, *key[1:])])


def annotation_names(snapshot: TraceSnapshot, module: int) -> list[str]:
    """Names of the annotations of a module, in the order in which they came."""
    tables = snapshot.tables
    names = tables.annotations["name"][tables.annotations["module"] == module]
    numbers, firsts = np.unique(names, return_index=True)
    found = [tables.texts[number - 1] for number in numbers[np.argsort(firsts)].tolist()]
    return list(dict.fromkeys(found))
