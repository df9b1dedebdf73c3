"""Indexes from sequences to rows and annotations, computed once per snapshot.

A piece is the part of a sequence that one call made.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from grutrace.records import Array
from grutrace.storage.format.tables import Tables

Integers = npt.NDArray[np.int64]


class SequenceIndex:
    """The pieces and rows of each sequence of a module. P pieces, S sequences.

    Args:
        tables: Tables of the trace, with joined segments.
        module: Index of the module in the header.
        stored: (P,) the stored sequence (segment) of each piece; `sequences` by default.

    Attributes:
        steps: (P,) number of rows of each piece.
        starts: (P,) first row of each piece.
        sequences: (P,) sequence of each piece.
        segments: (P,) stored sequence of each piece, the index of its initial state.
        segment_count: Number of stored sequences.
        call_numbers: (calls,) numbers of the module's calls among all calls.
        calls: (P,) call of each piece, numbered among all calls.
        batch_indices: (P,) batch index of each piece in its call.
        order: (P,) the pieces sorted by sequence, in time order.
        bounds: (S + 1,) start of each sequence in `order`.
    """

    def __init__(self, tables: Tables, module: int, stored: Array | None = None) -> None:
        pieces = tables.pieces[module]
        self._tables = tables
        self._module = module
        self.call_numbers = np.flatnonzero(tables.calls["module"] == module)
        batch = tables.calls["batch"][self.call_numbers].astype(np.int64)
        self.steps: Integers = pieces["steps"].astype(np.int64)
        self.starts = _starts(self.steps)
        self.sequences: Integers = pieces["sequence"].astype(np.int64)
        self.segments = self.sequences if stored is None else stored.astype(np.int64)
        self.segment_count = int(self.segments.max(initial=-1)) + 1
        self.calls = np.repeat(self.call_numbers, batch)
        self.batch_indices = np.arange(len(pieces)) - np.repeat(_starts(batch), batch)
        count = tables.module_counts[module].sequences
        if count == len(pieces):
            # Every sequence is one piece, and sequences are numbered in the order of their pieces.
            self.order, self.bounds = np.arange(count), np.arange(count + 1)
        else:
            self.order = np.argsort(self.sequences, kind="stable")
            self.bounds = np.searchsorted(self.sequences[self.order], np.arange(count + 1))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def pieces(self, sequence: int) -> Integers:
        """Return the pieces of a sequence, in time order."""
        return self.order[self.bounds[sequence] : self.bounds[sequence + 1]]

    def pieces_of(self, rows: Integers) -> Integers:
        """Return the piece of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def rows(self, sequence: int) -> slice | Integers:
        """Return the rows of a sequence, in time order."""
        pieces = self.pieces(sequence)
        if len(pieces) == 1:
            start = int(self.starts[pieces[0]])
            return slice(start, start + int(self.steps[pieces[0]]))
        return ranges(self.starts[pieces], self.steps[pieces])

    def rows_between(self, first: int, last: int) -> slice | Integers:
        """Return the rows of sequences `first` to `last` - 1, by sequence, each in time order."""
        pieces = self.order[self.bounds[first] : self.bounds[last]]
        starts, steps = self.starts[pieces], self.steps[pieces]
        if not len(pieces):
            return slice(0, 0)
        if np.array_equal(starts[1:], starts[:-1] + steps[:-1]):
            return slice(int(starts[0]), int(starts[-1] + steps[-1]))
        return ranges(starts, steps)

    @cached_property
    def first_positions(self) -> Integers:
        """(S,) position of each sequence's first step in the concatenation of all sequences."""
        return _starts(self.lengths)

    def sequential_rows(self, positions: Integers) -> Integers:
        """Return the rows at these positions in the concatenation of all sequences."""
        pieces = np.searchsorted(self._piece_positions, positions, side="right") - 1
        return self.starts[self.order[pieces]] + positions - self._piece_positions[pieces]

    @cached_property
    def _piece_positions(self) -> Integers:
        """(P,) position of each piece of `order` in the concatenation of all sequences."""
        return _starts(self.steps[self.order])

    @property
    def first_pieces(self) -> Integers:
        """(S,) first piece of each sequence."""
        return self.order[self.bounds[:-1]]

    @cached_property
    def lengths(self) -> Integers:
        """(S,) number of steps of each sequence."""
        ends = np.concatenate([[0], np.cumsum(self.steps[self.order])])
        return np.asarray(np.diff(ends[self.bounds]))

    @cached_property
    def call_steps(self) -> Integers:
        """(calls,) number of rows of each call of the module."""
        batch = self._tables.calls["batch"][self.call_numbers]
        ends = np.concatenate([[0], np.cumsum(self.steps)])
        bounds = np.concatenate([[0], np.cumsum(batch, dtype=np.int64)])
        return np.asarray(np.diff(ends[bounds]))

    @cached_property
    def steps_before(self) -> Integers:
        """(P,) number of steps of the sequence before each piece."""
        ordered = self.steps[self.order]
        within = _starts(ordered)
        sizes = np.diff(self.bounds)
        before = np.empty_like(within)
        before[self.order] = within - np.repeat(within[self.bounds[:-1]], sizes)
        return before

    @cached_property
    def last_rows_before(self) -> Integers:
        """(P,) last row before each piece in its segment; -1 for the first piece."""
        before = np.full(len(self.order), -1, np.int64)
        # Pieces without steps are skipped: they have no last row.
        order = self.order[self.steps[self.order] > 0]
        follows = np.flatnonzero(self.segments[order][1:] == self.segments[order][:-1])
        ends = self.starts + self.steps - 1
        before[order[follows + 1]] = ends[order[follows]]
        return before

    @cached_property
    def parents(self) -> tuple[Integers, Integers]:
        """(S,) parent of each forked sequence, and (S,) steps of the parent; -1 for no parent."""
        parents = np.full((2, len(self)), -1, np.int64)
        forks = self._tables.forks[self._tables.forks["module"] == self._module]
        parents[:, forks["sequence"].astype(np.int64)] = forks["parent"], forks["steps"]
        return parents[0], parents[1]


class AnnotationIndex:
    """The annotations of each sequence of a module.

    Args:
        tables: Tables of the trace.
        module: Index of the module in the header.
    """

    def __init__(self, tables: Tables, module: int) -> None:
        counts = tables.annotations["count"].astype(np.int64)
        own = np.flatnonzero(tables.annotations["module"] == module)
        order = np.argsort(tables.annotations["sequence"][own], kind="stable")
        self._tables = tables
        self._entries = tables.annotations[own][order]
        self._starts = _starts(counts)[own][order]

    def values(self, sequence: int, length: int) -> dict[str, Array | list[str | float | None]]:
        """Return one value per step by name: (T,) numbers with NaN, or a list with any string.

        Args:
            sequence: Number of the sequence.
            length: Number of its steps, T. Later values belong to steps that are not recorded yet.
        """
        low, high = np.searchsorted(self._entries["sequence"], [sequence, sequence + 1])
        named: dict[str, Array | list[str | float | None]] = {}
        for entry, start in zip(self._entries[low:high], self._starts[low:high], strict=True):
            name = self._tables.texts[entry["name"] - 1]
            first = min(int(entry["first"]), length)
            found = self._tables.values[start : start + int(entry["count"])][: length - first]
            known = named.get(name)
            if entry["text"] or isinstance(known, list):
                named[name] = self._with_texts(known, first, found, bool(entry["text"]), length)
            else:
                numbers = np.full(length, np.nan) if known is None else known
                numbers[first : first + len(found)] = found
                named[name] = numbers
        return named

    def _with_texts(
        self,
        known: Array | list[str | float | None] | None,
        first: int,
        found: Array,
        text: bool,
        length: int,
    ) -> list[str | float | None]:
        values: list[str | float | None]
        if known is None:
            values = [None] * length
        elif isinstance(known, list):
            values = known
        else:
            values = [None if np.isnan(number) else number for number in known.tolist()]
        texts = self._tables.texts
        numbers = found.tolist()
        values[first : first + len(numbers)] = (
            [texts[int(number)] for number in numbers] if text else numbers
        )
        return values


def ranges(starts: Integers, counts: Integers) -> Integers:
    """Return the concatenation of ``range(start, start + count)`` for each start and count."""
    return np.repeat(starts - _starts(counts), counts) + np.arange(int(counts.sum()))


def as_slice(rows: Integers) -> slice | Integers:
    """Return consecutive rows as a slice, which is read at once; other rows unchanged."""
    if len(rows) and np.all(np.diff(rows) == 1):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _starts(counts: Integers) -> Integers:
    return np.asarray(np.cumsum(counts) - counts)
