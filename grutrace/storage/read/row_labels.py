"""Tokens or a label of all rows of a module at once. N rows, S sequences."""

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
    """One value a row, as its place among the values that there are.

    Attributes:
        name: ``tokens``, or the label's name.
        values: The distinct values: first numbers, then texts, each in order.
        codes: (N,) the place of each row's value in `values`; -1 where it has none.
    """

    name: str
    values: tuple[str | float, ...]
    codes: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.codes)

    def to_array(self, dtype: np.dtype[Any] | None = None) -> Array:
        """(N,) float64 with nan for none; where a value is a text, objects with None for none.

        Args:
            dtype: That of float64 or of objects, if it is to be one of them whatever there is.
        """
        if dtype is None:
            texts = any(isinstance(value, str) for value in self.values)
            dtype = np.dtype(object if texts else np.float64)
        # The last one is what -1 picks.
        return np.array([*self.values, None if dtype.hasobject else np.nan], dtype)[self.codes]


def encode_labels(name: str, given: Sequence[str | float | None] | Array) -> LabelColumn:
    """Labels from one value a row: numbers or texts, None or nan for none."""
    array = given if isinstance(given, np.ndarray) else np.array(list(given), object)
    if array.dtype.kind in "biuf":
        return _coded(name, array.astype(np.float64), np.zeros(len(array), bool), ())
    positions: dict[str, int] = {}
    numbers, text = np.full(len(array), np.nan), np.zeros(len(array), bool)
    for row, value in enumerate(array.tolist()):
        if isinstance(value, str):
            numbers[row], text[row] = positions.setdefault(value, len(positions)), True
        elif value is not None:
            numbers[row] = value
    return _coded(name, numbers, text, tuple(positions))


def annotation_names(tables: Tables, module: int) -> tuple[str, ...]:
    """What a module's rows have tokens or labels of, in the order in which it came."""
    own = tables.annotations["name"][tables.annotations["module"] == module]
    _, first = np.unique(own, return_index=True)
    names = [tables.texts[int(number) - 1] for number in own[np.sort(first)]]
    return tuple(dict.fromkeys(names))


def annotation_mask(tables: Tables, module: int, name: str) -> npt.NDArray[np.bool_]:
    """(annotations,) which are of a module and have this name."""
    called = [number for number, text in enumerate(tables.texts, 1) if text == name]
    named = np.isin(tables.annotations["name"], called)
    return np.asarray((tables.annotations["module"] == module) & named)


def row_labels(tables: Tables, module: int, index: SequenceIndex, name: str) -> LabelColumn:
    """The value of each row, whichever sequences and steps it was given for.

    Raises:
        NotRecordedError: No row of the module has one of this name.
    """
    entries, own = tables.annotations, annotation_mask(tables, module, name)
    if not own.any():
        found = ", ".join(annotation_names(tables, module)) or "none"
        raise NotRecordedError(f"there is no label {name!r}; there are: {found}")
    counts = entries["count"].astype(np.int64)
    starts = (np.cumsum(counts) - counts)[own]
    lengths = index.lengths
    sequences = entries["sequence"][own].astype(np.int64)
    # Values may have been given for steps that are not there yet, however far on.
    first = np.minimum(entries["first"][own], lengths[sequences].astype(np.uint64)).astype(np.int64)
    counts = np.minimum(lengths[sequences] - first, counts[own])
    total = int(lengths.sum())
    numbers, text = np.full(total, np.nan), np.zeros(total, bool)
    # Where a step was given several values, the last one stays: NumPy assigns in order.
    positions = ranges((np.cumsum(lengths) - lengths)[sequences] + first, counts)
    numbers[positions] = tables.values[ranges(starts, counts)]
    text[positions] = np.repeat(entries["text"][own] > 0, counts)
    rows = index.rows_between(0, len(index))
    if not isinstance(rows, slice):
        numbers[rows], text[rows] = numbers.copy(), text.copy()
    return _coded(name, numbers, text, tables.texts)


def _coded(
    name: str, numbers: Array, text: npt.NDArray[np.bool_], texts: Sequence[str]
) -> LabelColumn:
    """Number the values. Where it is a text, the number is its place among the texts."""
    codes = np.full(len(numbers), -1, np.int32)
    known = ~text & ~np.isnan(numbers)
    values, positions = np.unique(numbers[known], return_inverse=True)
    codes[known] = positions
    used, positions = np.unique(numbers[text].astype(np.int64), return_inverse=True)
    # A text may have several numbers, where files were joined.
    found = [texts[int(number)] for number in used]
    ordered = {value: len(values) + position for position, value in enumerate(sorted(set(found)))}
    codes[text] = np.array([ordered[value] for value in found], np.int32)[positions]
    return LabelColumn(name, (*values.tolist(), *ordered), codes)
