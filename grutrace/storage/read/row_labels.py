"""Labels of all rows of a module as coded columns. N rows, S sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grutrace.errors import NotRecordedError
from grutrace.records import Array
from grutrace.storage.format.tables import Tables
from grutrace.storage.read.sequence_index import SequenceIndex, ranges


@dataclass(frozen=True, eq=False)
class LabelColumn:
    """A label of each row, coded as an index into its distinct values.

    Attributes:
        name: Name of the label, or ``tokens``.
        values: The distinct values: numbers, then strings, each sorted.
        codes: (N,) index of each row's value in `values`; -1 for a missing label.

    Example:
        >>> from grutrace.storage.read.row_labels import encode_labels
        >>> column = encode_labels("pos", ["noun", "verb", None, "noun"])
        >>> column.values, column.codes
        (('noun', 'verb'), array([ 0,  1, -1,  0], dtype=int32))
        >>> column.to_array()
        array(['noun', 'verb', None, 'noun'], dtype=object)
    """

    name: str
    values: tuple[str | float, ...]
    codes: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.codes)

    def to_array(self, dtype: np.dtype[Any] | None = None) -> Array:
        """Return the labels, (N,): float64 with NaN, or with any string, objects with None.

        Args:
            dtype: float64 or object, to set the type regardless of the values.
        """
        if dtype is None:
            texts = any(isinstance(value, str) for value in self.values)
            dtype = np.dtype(object if texts else np.float64)
        # Code -1 selects the last item.
        return np.array([*self.values, None if dtype.hasobject else np.nan], dtype)[self.codes]


def encode_labels(name: str, given: Sequence[str | float | None] | Array) -> LabelColumn:
    """Encode one label per row: numbers or strings, with None or NaN for a missing label."""
    array = given if isinstance(given, np.ndarray) else np.array(list(given), object)
    if array.dtype.kind in "biuf":
        return _encode(name, array.astype(np.float64), np.zeros(len(array), bool), ())
    positions: dict[str, int] = {}
    numbers, text = np.full(len(array), np.nan), np.zeros(len(array), bool)
    for row, value in enumerate(array.tolist()):
        if isinstance(value, str):
            numbers[row], text[row] = positions.setdefault(value, len(positions)), True
        elif value is not None:
            numbers[row] = value
    return _encode(name, numbers, text, tuple(positions))


def annotation_names(tables: Tables, module: int) -> tuple[str, ...]:
    """Return the names of a module's annotations, in the order of recording."""
    own = tables.annotations["name"][tables.annotations["module"] == module]
    _, first = np.unique(own, return_index=True)
    names = [tables.texts[int(number) - 1] for number in own[np.sort(first)]]
    return tuple(dict.fromkeys(names))


def annotation_mask(tables: Tables, module: int, name: str) -> npt.NDArray[np.bool_]:
    """Return which annotations are of a module and have this name, (annotations,)."""
    called = [number for number, text in enumerate(tables.texts, 1) if text == name]
    named = np.isin(tables.annotations["name"], called)
    return np.asarray((tables.annotations["module"] == module) & named)


def row_labels(tables: Tables, module: int, index: SequenceIndex, name: str) -> LabelColumn:
    """Return the label of each row of a module.

    Raises:
        NotRecordedError: The module has no label of this name.
    """
    entries, own = tables.annotations, annotation_mask(tables, module, name)
    if not own.any():
        found = ", ".join(annotation_names(tables, module)) or "none"
        raise NotRecordedError(f"there is no label {name!r}; there are: {found}")
    counts = entries["count"].astype(np.int64)
    starts = (np.cumsum(counts) - counts)[own]
    lengths = index.lengths
    sequences = entries["sequence"][own].astype(np.int64)
    # Labels may be recorded for steps that have not been made yet.
    first = np.minimum(entries["first"][own], lengths[sequences].astype(np.uint64)).astype(np.int64)
    counts = np.minimum(lengths[sequences] - first, counts[own])
    total = int(lengths.sum())
    numbers, text = np.full(total, np.nan), np.zeros(total, bool)
    # The last of several values of a step counts: NumPy assigns in order.
    positions = ranges((np.cumsum(lengths) - lengths)[sequences] + first, counts)
    numbers[positions] = tables.values[ranges(starts, counts)]
    text[positions] = np.repeat(entries["text"][own] > 0, counts)
    rows = index.rows_between(0, len(index))
    if not isinstance(rows, slice):
        numbers[rows], text[rows] = numbers.copy(), text.copy()
    return _encode(name, numbers, text, tables.texts)


def _encode(
    name: str, numbers: Array, text: npt.NDArray[np.bool_], texts: Sequence[str]
) -> LabelColumn:
    """Return the coded labels. The number of a string is its index in `texts`."""
    codes = np.full(len(numbers), -1, np.int32)
    known = ~text & ~np.isnan(numbers)
    values, positions = np.unique(numbers[known], return_inverse=True)
    codes[known] = positions
    used, positions = np.unique(numbers[text].astype(np.int64), return_inverse=True)
    # One string can have several numbers if files were concatenated.
    found = [texts[int(number)] for number in used]
    ordered = {value: len(values) + position for position, value in enumerate(sorted(set(found)))}
    codes[text] = np.array([ordered[value] for value in found], np.int32)[positions]
    return LabelColumn(name, (*values.tolist(), *ordered), codes)
