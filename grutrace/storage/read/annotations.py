"""Tokens and labels of one sequence, or of all rows of a module as a coded column; set gates.

N rows, T steps of a sequence, n rows that are read, H hidden size, U units.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from grutrace.errors import NotRecordedError, join_names
from grutrace.records import VALUE_PREFIX, Array
from grutrace.storage.format.tables import Tables
from grutrace.storage.read.sequence_index import Integers, SequenceIndex, ranges

#: Name of a gate and the units that were set, in the name of the label of their values.
_NAME = re.compile(r"(\w+)\[(\d+(?:,\d+)*)\]")


@dataclass(frozen=True, eq=False)
class LabelColumn:
    """A label of each row, coded as an index into its distinct values.

    Attributes:
        name: Name of the label, or ``tokens``.
        values: The distinct values: numbers, then strings, each sorted.
        codes: (N,) index of each row's value in `values`; -1 for a missing label.

    Examples:
        >>> from grutrace.storage.read.annotations import encode_labels
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


def encode_labels(name: str, labels: Sequence[str | float | None] | Array) -> LabelColumn:
    """Encode one label per row: numbers or strings, with None or NaN for a missing label."""
    array = labels if isinstance(labels, np.ndarray) else np.array(list(labels), object)
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


class AnnotationIndex:
    """The annotations of each sequence of a module.

    Args:
        tables: Tables of the trace.
        module: Index of the module in the header.
    """

    def __init__(self, tables: Tables, module: int) -> None:
        counts = tables.annotations["count"].astype(np.int64)
        entries = np.flatnonzero((tables.annotations["module"] == module) & ~_are_set_gates(tables))
        order = np.argsort(tables.annotations["sequence"][entries], kind="stable")
        self._tables = tables
        self._entries = tables.annotations[entries][order]
        self._starts = (np.cumsum(counts) - counts)[entries][order]

    def values(self, sequence: int, length: int) -> dict[str, Array | list[str | float | None]]:
        """Return one value per step by name: (T,) numbers with NaN, or a list with any string.

        Args:
            sequence: Number of the sequence.
            length: Number of its steps, T. Later values belong to steps that are not recorded yet.
        """
        low, high = np.searchsorted(self._entries["sequence"], [sequence, sequence + 1])
        by_name: dict[str, Array | list[str | float | None]] = {}
        for entry, start in zip(self._entries[low:high], self._starts[low:high], strict=True):
            name = self._tables.texts[entry["name"] - 1]
            first = min(int(entry["first"]), length)
            numbers = self._tables.values[start : start + int(entry["count"])][: length - first]
            values = by_name.get(name)
            if entry["text"] or isinstance(values, list):
                labels = _as_list(values, length)
                labels[first : first + len(numbers)] = (
                    [self._tables.texts[int(number)] for number in numbers]
                    if entry["text"]
                    else numbers.tolist()
                )
                by_name[name] = labels
            else:
                array = np.full(length, np.nan) if values is None else values
                array[first : first + len(numbers)] = numbers
                by_name[name] = array
        return by_name


def _as_list(
    values: Array | list[str | float | None] | None, length: int
) -> list[str | float | None]:
    """Return the values of a sequence as a list, with None for a missing value."""
    if values is None:
        return [None] * length
    if isinstance(values, list):
        return values
    return [None if np.isnan(number) else number for number in values.tolist()]


def annotation_names(tables: Tables, module: int) -> tuple[str, ...]:
    """Return the names of a module's annotations, in the order of recording."""
    is_own = (tables.annotations["module"] == module) & ~_are_set_gates(tables)
    numbers = tables.annotations["name"][is_own]
    _, first_entries = np.unique(numbers, return_index=True)
    names = [tables.texts[int(number) - 1] for number in numbers[np.sort(first_entries)]]
    return tuple(dict.fromkeys(names))


def _are_set_gates(tables: Tables) -> npt.NDArray[np.bool_]:
    """Return which annotations are values of gates, which no user reads as labels."""
    numbers = np.unique(tables.annotations["name"])
    hidden = [
        number
        for number in numbers.tolist()
        if number and tables.texts[number - 1].startswith(VALUE_PREFIX)
    ]
    return np.isin(tables.annotations["name"], hidden)


def annotation_mask(tables: Tables, module: int, name: str) -> npt.NDArray[np.bool_]:
    """Return which annotations are of a module and have this name, (annotations,)."""
    numbers = [number for number, text in enumerate(tables.texts, 1) if text == name]
    has_name = np.isin(tables.annotations["name"], numbers)
    return np.asarray((tables.annotations["module"] == module) & has_name)


def row_labels(tables: Tables, module: int, index: SequenceIndex, name: str) -> LabelColumn:
    """Return the label of each row of a module.

    Raises:
        NotRecordedError: The module has no label of this name.
    """
    mask = annotation_mask(tables, module, name)
    if not mask.any():
        names = join_names(annotation_names(tables, module))
        raise NotRecordedError(f"there is no label {name!r}; there are: {names}")
    positions, values = labelled_positions(tables, index, mask)
    total = int(index.lengths.sum())
    numbers, text = np.full(total, np.nan), np.zeros(total, bool)
    # The last of several values of a step counts: NumPy assigns in order.
    numbers[positions] = tables.values[values]
    counts = tables.annotations["count"].astype(np.int64)
    is_text = np.repeat(tables.annotations["text"] > 0, counts)
    text[positions] = is_text[values]
    rows = index.rows_between(0, len(index))
    if not isinstance(rows, slice):
        numbers[rows], text[rows] = numbers.copy(), text.copy()
    return _encode(name, numbers, text, tables.texts)


def labelled_positions(
    tables: Tables, index: SequenceIndex, mask: npt.NDArray[np.bool_]
) -> tuple[Integers, Integers]:
    """Return the steps that have a value of these annotations, and the index of each value.

    Args:
        tables: Tables of the trace.
        index: The sequences of the module of the annotations.
        mask: Which annotations, (annotations,).

    Returns:
        (k,) positions of the steps among those of all sequences, in order; and (k,) indices in
        `Tables.values`. Steps that have not been made yet are left out.
    """
    counts = tables.annotations["count"].astype(np.int64)
    starts = (np.cumsum(counts) - counts)[mask]
    entries, counts = tables.annotations[mask], counts[mask]
    sequences = entries["sequence"].astype(np.int64)
    lengths = index.lengths[sequences]
    # Labels may be recorded for steps that have not been made yet.
    first_steps = np.minimum(entries["first"], lengths.astype(np.uint64)).astype(np.int64)
    counts = np.minimum(lengths - first_steps, counts)
    positions = ranges(index.first_positions[sequences] + first_steps, counts)
    return positions, ranges(starts, counts)


def labelled_calls(
    tables: Tables, module: int, index: SequenceIndex, prefix: str
) -> Iterator[tuple[str, Integers, list[str]]]:
    """Yield the labels of a module whose names begin with a prefix, and the calls that have them.

    Args:
        tables: Tables of the trace.
        module: Index of the module in the header.
        index: The module's sequences.
        prefix: Beginning of the names.

    Yields:
        For each name: the rest of the name; (k,) calls, numbered among all calls; and (k,) texts. A
        call has one entry for each different text.
    """
    entries = tables.annotations
    counts = entries["count"].astype(np.int64)
    starts = np.cumsum(counts) - counts
    is_own = (entries["module"] == module) & (entries["text"] > 0)
    for number in np.unique(entries["name"][is_own]).tolist():
        name = tables.texts[number - 1]
        if not name.startswith(prefix):
            continue
        chosen = np.flatnonzero(is_own & (entries["name"] == number))
        sequences = entries["sequence"][chosen].astype(np.int64)
        is_made = entries["first"][chosen] < index.lengths[sequences].astype(np.uint64)
        chosen, sequences = chosen[is_made], sequences[is_made]
        first = entries["first"][chosen].astype(np.int64)
        rows = index.sequential_rows(index.first_positions[sequences] + first)
        calls = np.repeat(index.calls[index.pieces_of(rows)], counts[chosen])
        texts = tables.values[ranges(starts[chosen], counts[chosen])].astype(np.int64)
        pairs = np.unique(np.stack([calls, texts]), axis=1)
        yield name.removeprefix(prefix), pairs[0], [tables.texts[text] for text in pairs[1]]


def _encode(
    name: str, numbers: Array, text: npt.NDArray[np.bool_], texts: Sequence[str]
) -> LabelColumn:
    """Return the coded labels.

    Args:
        name: Name of the label.
        numbers: (N,) the label of each row; NaN if missing; for a string, its index in `texts`.
        text: (N,) whether the label is a string.
        texts: The strings.
    """
    codes = np.full(len(numbers), -1, np.int32)
    is_number = ~text & ~np.isnan(numbers)
    values, positions = np.unique(numbers[is_number], return_inverse=True)
    codes[is_number] = positions
    text_numbers, positions = np.unique(numbers[text].astype(np.int64), return_inverse=True)
    # One string can have several numbers if files were concatenated.
    strings = [texts[int(number)] for number in text_numbers]
    string_codes = {value: code for code, value in enumerate(sorted(set(strings)), len(values))}
    codes[text] = np.array([string_codes[value] for value in strings], np.int32)[positions]
    return LabelColumn(name, (*values.tolist(), *string_codes), codes)


class _Values(NamedTuple):
    """Values of some units of one gate, the same for all of them.

    Attributes:
        gate: Name of the gate.
        units: (k,) the units.
        rows: (n,) the rows, ascending.
        values: (n,) the values.
    """

    gate: str
    units: Integers
    rows: Integers
    values: Array


class SetGates:
    """The gates of a site that an intervention has set.

    Args:
        tables: Tables of the trace.
        module: Index of the module in the header.
        index: Index of the module's sequences.
        suffix: Suffix of the site.
        size: H
    """

    def __init__(
        self, tables: Tables, module: int, index: SequenceIndex, suffix: str, size: int
    ) -> None:
        self._size = size
        self._values = list(_read_values(tables, module, index, f"{VALUE_PREFIX}{suffix}:", size))

    def at(self, rows: Integers, units: slice) -> dict[str, tuple[npt.NDArray[np.bool_], Array]]:
        """Return which values were set and the values, (n, U) each, by gate.

        Args:
            rows: (n,) row numbers.
            units: The units.
        """
        found: dict[str, tuple[npt.NDArray[np.bool_], Array]] = {}
        for set_values in self._values:
            # The last of several values of a row counts.
            places = np.searchsorted(set_values.rows, rows, side="right") - 1
            chosen = np.flatnonzero((places >= 0) & (set_values.rows[places] == rows))
            if not len(chosen):
                continue
            if set_values.gate not in found:
                shape = len(rows), self._size
                found[set_values.gate] = np.zeros(shape, bool), np.zeros(shape)
            mask, values = found[set_values.gate]
            mask[np.ix_(chosen, set_values.units)] = True
            values[np.ix_(chosen, set_values.units)] = set_values.values[places[chosen], np.newaxis]
        return {gate: (mask[:, units], values[:, units]) for gate, (mask, values) in found.items()}


def _read_values(
    tables: Tables, module: int, index: SequenceIndex, prefix: str, size: int
) -> Iterator[_Values]:
    entries = tables.annotations
    is_own = (entries["module"] == module) & (entries["text"] == 0)
    for number in np.unique(entries["name"][is_own]).tolist():
        name = tables.texts[number - 1]
        if not name.startswith(prefix):
            continue
        match = _NAME.fullmatch(name.removeprefix(prefix))
        units = np.array([int(unit) for unit in match[2].split(",")] if match else [], np.int64)
        if match is None or units.max() >= size:
            # Not a name that grutrace writes.
            continue
        positions, values = labelled_positions(tables, index, is_own & (entries["name"] == number))
        if not len(positions):
            continue
        rows = index.sequential_rows(positions)
        order = np.argsort(rows, kind="stable")
        yield _Values(match[1], units, rows[order], tables.values[values][order])
