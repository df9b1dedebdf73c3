"""Join the stored segments of sequences.

A sequence that the user names may continue from a state other than its last one. Its further steps
are stored as a sequence with its own initial state and the mark ``continued``. A reader that
ignores marks still gets correct numbers.

R stored sequences (segments) of a module, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from grutrace.records import MARK_PREFIX, Array
from grutrace.storage.format.tables import ModuleCounts, Tables

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of the sequences of one module.

    Attributes:
        sequences: (R,) the sequence of each segment.
        before: (R,) number of steps of the sequence before each segment.
        first: (S,) first segment of each sequence.
        later: (R - S,) all other segments, by sequence, in time order.
    """

    sequences: Integers
    before: Integers
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
    """Join the segments of sequences, and remove the marks from the annotations."""
    marked = _marked(tables)
    segments: list[Segments | None] = [None] * len(tables.pieces)
    if not marked.any():
        return JoinedSegments(tables, tuple(segments), {})
    entries = tables.annotations[marked]
    names = [tables.texts[number - 1].removeprefix(MARK_PREFIX) for number in entries["name"]]
    continued = entries[np.array(names) == "continued"]
    for module in np.unique(continued["module"]).tolist():
        of_module = continued["sequence"][continued["module"] == module].astype(np.int64)
        segments[module] = _segments(tables, module, of_module)
    joined = _joined(tables, tables.annotations[~marked], segments)
    marks = {}
    for module, sequence, name in zip(
        entries["module"].tolist(), entries["sequence"].tolist(), names, strict=True
    ):
        of = segments[module]
        if name != "continued":
            marks[module, sequence if of is None else int(of.sequences[sequence])] = name
    return JoinedSegments(joined, tuple(segments), marks)


def _marked(tables: Tables) -> npt.NDArray[np.bool_]:
    """Return which annotations are marks, (annotations,)."""
    # Marks have no values. Most traces have no marks.
    marked = tables.annotations["count"] == 0
    if marked.any():
        marks = [
            number for number, text in enumerate(tables.texts, 1) if text.startswith(MARK_PREFIX)
        ]
        marked &= np.isin(tables.annotations["name"], marks)
    return np.asarray(marked)


def _segments(tables: Tables, module: int, continued: Integers) -> Segments | None:
    count = tables.module_counts[module].sequences
    parents = _parents(tables, module, continued, count)
    steps = np.zeros(count, np.int64)
    pieces = tables.pieces[module]
    np.add.at(steps, pieces["sequence"].astype(np.int64), pieces["steps"].astype(np.int64))
    is_later = parents != np.arange(count)
    if not is_later.any():
        return None
    # Pointer doubling: each round doubles the distance, until all roots are first segments.
    root, before = parents, np.where(is_later, steps[parents], 0)
    while (root[root] != root).any():
        before = before + before[root]
        root = root[root]
    first = np.flatnonzero(~is_later)
    sequences = (np.cumsum(~is_later) - 1)[root]
    later = np.flatnonzero(is_later)
    return Segments(sequences, before, first, later[np.argsort(sequences[later], kind="stable")])


def _parents(tables: Tables, module: int, continued: Integers, count: int) -> Integers:
    """Return the segment before each segment, (R,); a first segment is its own parent."""
    parents = np.arange(count)
    forks = tables.forks[tables.forks["module"] == module]
    sequence, parent = forks["sequence"].astype(np.int64), forks["parent"].astype(np.int64)
    # A parent is an earlier segment and has one child, so chains have no cycles and no branches.
    of_segment = np.isin(sequence, continued) & (parent < sequence)
    sequence, parent = sequence[of_segment], parent[of_segment]
    parent, positions = np.unique(parent, return_index=True)
    parents[sequence[positions]] = parent
    return parents


def _joined(tables: Tables, annotations: Array, segments: Sequence[Segments | None]) -> Tables:
    annotations, forks = annotations.copy(), tables.forks.copy()
    pieces: list[Array] = list(tables.pieces)
    module_counts: list[ModuleCounts] = list(tables.module_counts)
    is_fork = np.ones(len(forks), bool)
    for module, of in enumerate(segments):
        if of is None:
            continue
        pieces[module] = pieces[module].copy()
        pieces[module]["sequence"] = of.sequences[pieces[module]["sequence"].astype(np.int64)]
        module_counts[module] = replace(module_counts[module], sequences=len(of.first))
        own = np.flatnonzero(annotations["module"] == module)
        stored = annotations["sequence"][own].astype(np.int64)
        annotations["first"][own] += of.before[stored].astype(np.uint64)
        annotations["sequence"][own] = of.sequences[stored]
        own = np.flatnonzero(forks["module"] == module)
        stored, parents = (forks[name][own].astype(np.int64) for name in ("sequence", "parent"))
        is_fork[own] = ~np.isin(stored, of.later)
        forks["steps"][own] += of.before[parents].astype(np.uint64)
        forks["sequence"][own], forks["parent"][own] = of.sequences[stored], of.sequences[parents]
    return replace(
        tables,
        annotations=annotations,
        forks=forks[is_fork],
        pieces=tuple(pieces),
        module_counts=tuple(module_counts),
    )
