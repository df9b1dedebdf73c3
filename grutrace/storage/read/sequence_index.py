"""The sequences of a module: their stored segments, their pieces and their rows.

A piece is the part of a sequence that one call made. A segment is a part of a sequence that is
stored with an initial state of its own; `join_segments` joins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from grutrace.records import MARK_PREFIX, Array
from grutrace.storage.format.tables import ModuleCounts, Tables

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
        totals = np.concatenate([[0], np.cumsum(self.steps[self.order])])
        return np.asarray(np.diff(totals[self.bounds]))

    @cached_property
    def call_steps(self) -> Integers:
        """(calls,) number of rows of each call of the module."""
        batch = self._tables.calls["batch"][self.call_numbers]
        totals = np.concatenate([[0], np.cumsum(self.steps)])
        bounds = np.concatenate([[0], np.cumsum(batch, dtype=np.int64)])
        return np.asarray(np.diff(totals[bounds]))

    @cached_property
    def steps_before(self) -> Integers:
        """(P,) number of steps of the sequence before each piece."""
        piece_positions = self._piece_positions
        sequence_positions = np.repeat(piece_positions[self.bounds[:-1]], np.diff(self.bounds))
        steps_before = np.empty_like(piece_positions)
        steps_before[self.order] = piece_positions - sequence_positions
        return steps_before

    @cached_property
    def last_rows_before(self) -> Integers:
        """(P,) last row before each piece in its segment; -1 for the first piece."""
        rows = np.full(len(self.order), -1, np.int64)
        # Pieces without steps are skipped: they have no last row.
        order = self.order[self.steps[self.order] > 0]
        follows = np.flatnonzero(self.segments[order][1:] == self.segments[order][:-1])
        last_rows = self.starts + self.steps - 1
        rows[order[follows + 1]] = last_rows[order[follows]]
        return rows

    @cached_property
    def parents(self) -> tuple[Integers, Integers]:
        """(S,) parent of each forked sequence, and (S,) steps of the parent; -1 for no parent."""
        parents = np.full((2, len(self)), -1, np.int64)
        forks = self._tables.forks[self._tables.forks["module"] == self._module]
        parents[:, forks["sequence"].astype(np.int64)] = forks["parent"], forks["steps"]
        return parents[0], parents[1]


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


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of the sequences of one module. R segments, S sequences.

    Attributes:
        sequences: (R,) the sequence of each segment.
        steps_before: (R,) number of steps of the sequence before each segment.
        first: (S,) first segment of each sequence.
        later: (R - S,) all other segments, by sequence, in time order.
    """

    sequences: Integers
    steps_before: Integers
    first: Integers
    later: Integers


@dataclass(frozen=True, eq=False)
class JoinedSegments:
    """The tables of a trace with joined segments.

    Attributes:
        tables: The tables, without the annotations that mark sequences.
        segments: Segments of each module; None if each of its sequences is one segment.
        marks: Marks of sequences, by module and sequence.
    """

    tables: Tables
    segments: tuple[Segments | None, ...]
    marks: dict[tuple[int, int], str]


def join_segments(tables: Tables) -> JoinedSegments:
    """Join the segments of sequences, and remove the marks from the annotations.

    A sequence that the user names may continue from a state other than its last one. Its further
    steps are stored as a sequence with its own initial state and the mark ``continued``. A reader
    that ignores marks still gets correct numbers.
    """
    is_mark = _is_mark(tables)
    segments: list[Segments | None] = [None] * len(tables.pieces)
    if not is_mark.any():
        return JoinedSegments(tables, tuple(segments), {})
    entries = tables.annotations[is_mark]
    names = [tables.texts[number - 1].removeprefix(MARK_PREFIX) for number in entries["name"]]
    continued = entries[np.array(names) == "continued"]
    for module in np.unique(continued["module"]).tolist():
        sequences = continued["sequence"][continued["module"] == module].astype(np.int64)
        segments[module] = _find_segments(tables, module, sequences)
    joined = _join_tables(tables, tables.annotations[~is_mark], segments)
    marks = {}
    for module, sequence, name in zip(
        entries["module"].tolist(), entries["sequence"].tolist(), names, strict=True
    ):
        module_segments = segments[module]
        if name != "continued":
            number = sequence if module_segments is None else module_segments.sequences[sequence]
            marks[module, int(number)] = name
    return JoinedSegments(joined, tuple(segments), marks)


def _is_mark(tables: Tables) -> npt.NDArray[np.bool_]:
    """Return which annotations are marks, (annotations,)."""
    # Marks have no values. Most traces have no marks.
    is_mark = tables.annotations["count"] == 0
    if is_mark.any():
        numbers = [
            number for number, text in enumerate(tables.texts, 1) if text.startswith(MARK_PREFIX)
        ]
        is_mark &= np.isin(tables.annotations["name"], numbers)
    return np.asarray(is_mark)


def _find_segments(tables: Tables, module: int, continued: Integers) -> Segments | None:
    """Return the segments of a module; None if each of its sequences is one segment.

    Args:
        tables: Tables of the trace.
        module: Index of the module in the header.
        continued: The stored sequences with the mark ``continued``.
    """
    count = tables.module_counts[module].sequences
    parents = _parents(tables, module, continued, count)
    steps = np.zeros(count, np.int64)
    pieces = tables.pieces[module]
    np.add.at(steps, pieces["sequence"].astype(np.int64), pieces["steps"].astype(np.int64))
    is_later = parents != np.arange(count)
    if not is_later.any():
        return None
    # Pointer doubling: each round doubles the distance, until all roots are first segments.
    root, steps_before = parents, np.where(is_later, steps[parents], 0)
    while (root[root] != root).any():
        steps_before = steps_before + steps_before[root]
        root = root[root]
    first = np.flatnonzero(~is_later)
    sequences = (np.cumsum(~is_later) - 1)[root]
    later = np.flatnonzero(is_later)
    later = later[np.argsort(sequences[later], kind="stable")]
    return Segments(sequences, steps_before, first, later)


def _parents(tables: Tables, module: int, continued: Integers, count: int) -> Integers:
    """Return the segment before each segment, (R,); a first segment is its own parent."""
    parents = np.arange(count)
    forks = tables.forks[tables.forks["module"] == module]
    sequence, parent = forks["sequence"].astype(np.int64), forks["parent"].astype(np.int64)
    # A parent is an earlier segment and has one child, so chains have no cycles and no branches.
    is_segment = np.isin(sequence, continued) & (parent < sequence)
    sequence, parent = sequence[is_segment], parent[is_segment]
    parent, positions = np.unique(parent, return_index=True)
    parents[sequence[positions]] = parent
    return parents


def _join_tables(tables: Tables, annotations: Array, segments: Sequence[Segments | None]) -> Tables:
    """Return the tables with the numbers of sequences in place of those of segments."""
    annotations, forks = annotations.copy(), tables.forks.copy()
    pieces: list[Array] = list(tables.pieces)
    module_counts: list[ModuleCounts] = list(tables.module_counts)
    is_fork = np.ones(len(forks), bool)
    for module, module_segments in enumerate(segments):
        if module_segments is None:
            continue
        sequences, steps_before = module_segments.sequences, module_segments.steps_before
        pieces[module] = pieces[module].copy()
        pieces[module]["sequence"] = sequences[pieces[module]["sequence"].astype(np.int64)]
        module_counts[module] = replace(module_counts[module], sequences=len(module_segments.first))
        entries = np.flatnonzero(annotations["module"] == module)
        stored = annotations["sequence"][entries].astype(np.int64)
        annotations["first"][entries] += steps_before[stored].astype(np.uint64)
        annotations["sequence"][entries] = sequences[stored]
        entries = np.flatnonzero(forks["module"] == module)
        stored = forks["sequence"][entries].astype(np.int64)
        parents = forks["parent"][entries].astype(np.int64)
        is_fork[entries] = ~np.isin(stored, module_segments.later)
        forks["steps"][entries] += steps_before[parents].astype(np.uint64)
        forks["sequence"][entries] = sequences[stored]
        forks["parent"][entries] = sequences[parents]
    return replace(
        tables,
        annotations=annotations,
        forks=forks[is_fork],
        pieces=tuple(pieces),
        module_counts=tuple(module_counts),
    )
